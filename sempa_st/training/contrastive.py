"""Contrastive learning of the same embedding with sentence-transformers' trainer and loss, as a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch import nn
from transformers import Trainer

from sempa_st.data.nli import Triplet
from sempa_st.model.prompt_eol import PromptEOL, save_model
from sempa_st.training.dev_score import DevScoreTrainer


class ContrastiveTrainer(DevScoreTrainer, SentenceTransformerTrainer):
    """InfoNCE over in-batch and hard negatives (arXiv 2307.16645), evaluated by the dev score.

    Args:
        module: Embedding module around the model to train.
        temperature: Divisor of the cosine, above 0.
        widths: Widths of the embedding to train, with the mean of their losses; empty for the full width alone.
        **kwargs: Arguments of sentence-transformers' trainer except model and loss.
    """

    def __init__(self, *, module: PromptEOL, temperature: float, widths: Sequence[int] = (), **kwargs: Any) -> None:
        embedder = SentenceTransformer(modules=[module], device=str(module.model.device))
        loss: nn.Module = MultipleNegativesRankingLoss(embedder, scale=1 / temperature)
        if widths:
            loss = MatryoshkaLoss(embedder, loss, widths, [1 / len(widths)] * len(widths))
        super().__init__(model=embedder, loss=loss, **kwargs)

    def generator(self) -> Any:
        """Return the trained causal language model, adapter included."""
        return self.accelerator.unwrap_model(self.model)[0].model

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Only the trained weights: a tokenizer in every checkpoint would take many megabytes.
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.generator(), folder)

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        # sentence-transformers would load a whole model folder, which a checkpoint is not.
        Trainer._load_from_checkpoint(self, checkpoint_path, self.generator())


def contrastive_dataset(triplets: Sequence[Triplet]) -> Dataset:
    """Return the triplets as a data set with the columns ``anchor``, ``positive`` and, but for pairs, ``negative``."""
    return Dataset.from_list(
        [
            {"anchor": row.premise, "positive": row.entailed}
            | ({"negative": row.contradicted} if row.contradicted else {})
            for row in triplets
        ]
    )
