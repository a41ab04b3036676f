"""Contrastive learning on the same embedding, through sentence-transformers' own trainer and loss: the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import Trainer

from sempa_st.data.nli import Triplet
from sempa_st.model.prompt_eol import PromptEOL, save_model
from sempa_st.training.dev_score import DevScoreTrainer


class ContrastiveTrainer(DevScoreTrainer, SentenceTransformerTrainer):
    """InfoNCE over in-batch and hard negatives (arXiv 2307.16645), judged by the dev score.

    Args:
        module: Embedding module around the model that is trained.
        temperature: What the cosine is divided by, above 0.
        **kwargs: Arguments of sentence-transformers' trainer, without model and loss.
    """

    def __init__(self, *, module: PromptEOL, temperature: float, **kwargs: Any) -> None:
        embedder = SentenceTransformer(modules=[module], device=str(module.model.device))
        loss = MultipleNegativesRankingLoss(embedder, scale=1 / temperature)
        super().__init__(model=embedder, loss=loss, **kwargs)

    def generator(self) -> Any:
        """Return the causal language model that is trained, adapter included."""
        return self.accelerator.unwrap_model(self.model)[0].model

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # What training changes, and no copy of a tokenizer of many megabytes in every checkpoint.
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.generator(), folder)

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        # Not sentence-transformers' way, which loads a whole folder of its own.
        Trainer._load_from_checkpoint(self, checkpoint_path, self.generator())


def contrastive_rows(triplets: Sequence[Triplet]) -> Dataset:
    """Return the triplets as columns ``anchor``, ``positive`` and ``negative``."""
    return Dataset.from_dict(
        {
            "anchor": [triplet.premise for triplet in triplets],
            "positive": [triplet.entailed for triplet in triplets],
            "negative": [triplet.contradicted for triplet in triplets],
        }
    )
