"""TRL's DPO trainer, judged by the embeddings that the model gives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import trl.trainer.utils
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, Trainer, TrainerControl
from trl import DPOTrainer

from sempa_st.embed import embed_packed
from sempa_st.errors import SempaError
from sempa_st.finite import check_finite
from sempa_st.peft_models import is_peft_model
from sempa_st.prompt_eol import PromptEOL
from sempa_st.runinfo import fingerprint
from sempa_st.stsdata import GradedPairs
from sempa_st.train.callbacks import DEV_METRIC
from sempa_st.train.prefixes import pairs_together
from sempa_st.train.reference import REFERENCE, cached_tensor

_REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@contextmanager
def completion_tokens_only() -> Iterator[None]:
    """Make TRL's fused LM head skip prompt and padding positions on a CPU too, for the time of a call.

    TRL does so where Triton runs and scores every position elsewhere, to throw most of them away: on a vocabulary of
    262,144 that is three quarters of a step. The values of the loss are the same.
    """
    original = trl.trainer.utils._use_triton
    trl.trainer.utils._use_triton = lambda device: True
    try:
        yield
    finally:
        trl.trainer.utils._use_triton = original


class DevScorer:
    """Score a live model on graded pairs, with the vectors that the finished folder gives.

    Args:
        pairs: Graded sentence pairs.
        tokenizer: Tokenizer with the embedding template installed.
        template: Name of the template.
        max_seq_length: Longest input in tokens, template included.
        batch_size: Sentences a batch.
    """

    def __init__(
        self,
        pairs: GradedPairs,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str,
        max_seq_length: int,
        batch_size: int,
    ) -> None:
        self.tokenizer = tokenizer
        self._pairs = pairs
        self._template = template
        self._max_seq_length = max_seq_length
        self._batch_size = batch_size

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return len(self._pairs)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the graded pairs."""
        return fingerprint(zip(self._pairs.first, self._pairs.second, self._pairs.scores, strict=True))

    def __call__(self, model: Any) -> float:
        """Return the Spearman correlation (times 100) of the cosine with the grades.

        Raises:
            SempaError: If it is not a number, as when the model has diverged.
        """
        from sentence_transformers import SentenceTransformer

        module = PromptEOL(
            model,
            self.tokenizer,
            template=self._template,
            max_seq_length=self._max_seq_length,
            forward_rows=embed_packed,
        )
        embedder = SentenceTransformer(modules=[module], device=str(model.device))
        vectors = embedder.encode(
            self._pairs.sentences, batch_size=self._batch_size, show_progress_bar=False, convert_to_tensor=True
        )
        try:
            check_finite(vectors, self._pairs.sentences)
        except SempaError as error:
            raise SempaError(
                f"The embeddings of the dev pairs have diverged: lower the learning rate. {error}"
            ) from error
        score = self._pairs.spearman(vectors.float())
        if not math.isfinite(score):
            raise SempaError(
                f"The dev score is not a number ({score}): the embeddings have diverged. Lower the learning rate."
            )
        return score


class DevScored(Trainer):
    """A trainer whose ``evaluate`` is the dev score of the embeddings and not a loss.

    Args:
        dev_scorer: Judge of a checkpoint.
        train_dataset: Data set to train on. An ``eval_dataset`` is neither needed nor used.
        **kwargs: Arguments of the Transformers trainer, or of the other one that a subclass derives from.
    """

    def __init__(self, *, dev_scorer: DevScorer, train_dataset: Any, **kwargs: Any) -> None:
        # The trainer's loop wants an evaluation set before it evaluates at all; one row is never looked at.
        super().__init__(train_dataset=train_dataset, eval_dataset=train_dataset.select([0]), **kwargs)
        self._dev_scorer = dev_scorer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return (and log) the dev score of the model as it stands."""
        model = self.generator()
        was_training = model.training
        metrics = {DEV_METRIC: self._dev_scorer(model)}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        model.train(was_training)
        return metrics

    def generator(self) -> Any:
        """Return the causal language model that is trained, adapter included."""
        return self.accelerator.unwrap_model(self.model)


class SempaTrainer(DevScored, DPOTrainer):
    """DPO on preference data, judged by the dev score.

    The reference is run once, before training, and kept on disk for the next run on the same base and data.

    Args:
        reference: All that decides the reference's log-probabilities.
        **kwargs: Arguments of TRL's trainer, with ``precompute_ref_log_probs`` set; see also :class:`DevScored`.
    """

    def __init__(self, *, reference: dict[str, Any], **kwargs: Any) -> None:
        self._reference = reference
        super().__init__(**kwargs)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        # TRL's own form keeps its results beside a data set that lies on the disk; this one is in memory.
        if name == "eval":
            return dataset  # never looked at
        main = self.accelerator.is_main_process
        kept = cached_tensor(REFERENCE, self._reference, lambda: self._run_reference(dataset, batch_size), write=main)
        for column, values in zip(_REFERENCE_COLUMNS, kept.T.tolist(), strict=True):
            dataset = dataset.add_column(column, values)
        return dataset

    def _run_reference(self, dataset: Any, batch_size: int) -> Tensor:
        """Return the log-probabilities of chosen and rejected, of shape (rows, 2); rows of similar length together."""
        order = torch.tensor(
            [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in dataset]
        ).argsort()
        loader = self.accelerator.prepare(
            DataLoader(dataset.select(order.tolist()), batch_size, collate_fn=self.data_collator)
        )
        hidden = not self.accelerator.is_main_process
        found = [
            torch.stack(self.accelerator.gather_for_metrics(self.compute_ref_log_probs(self.model, batch)), dim=1).cpu()
            for batch in tqdm(loader, desc="reference", unit="batch", dynamic_ncols=True, disable=hidden)
        ]
        return torch.cat(found)[order.argsort()]

    def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's log-probabilities of the reference, at the price of :meth:`compute_loss`."""
        with self._once():
            return super().compute_ref_log_probs(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss; prompts are run once for both completions, and the LM head on completion tokens only."""
        with self._once():
            return super().compute_loss(*args, **kwargs)

    @contextmanager
    def _once(self) -> Iterator[None]:
        model = self.generator()
        causal_lm = model.get_base_model() if is_peft_model(model) else model
        with completion_tokens_only(), pairs_together(causal_lm.base_model):
            yield
