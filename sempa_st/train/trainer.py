"""TRL's DPO trainer, judged by the embeddings that the model gives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trl.trainer.utils
from transformers import PreTrainedTokenizerBase, Trainer, TrainerControl
from trl import DPOTrainer

from sempa_st.errors import SempaError
from sempa_st.prompt_eol import PromptEOL
from sempa_st.runinfo import fingerprint
from sempa_st.stsdata import GradedPairs
from sempa_st.train.callbacks import DEV_METRIC
from sempa_st.train.prefixes import pairs_together


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
    """Score a live model on graded pairs, through the same module that the finished folder is read with.

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
        from scipy.stats import spearmanr
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.util import pairwise_cos_sim

        module = PromptEOL(model, self.tokenizer, template=self._template, max_seq_length=self._max_seq_length)
        embedder = SentenceTransformer(modules=[module], device=str(model.device))
        sentences = list(dict.fromkeys([*self._pairs.first, *self._pairs.second]))
        vectors = embedder.encode(
            sentences, batch_size=self._batch_size, show_progress_bar=False, convert_to_tensor=True
        ).float()
        place = {sentence: index for index, sentence in enumerate(sentences)}
        first, second = (
            vectors[[place[sentence] for sentence in side]] for side in (self._pairs.first, self._pairs.second)
        )
        score = 100 * float(spearmanr(pairwise_cos_sim(first, second).cpu(), self._pairs.scores).statistic)
        if math.isnan(score):
            raise SempaError("The dev score is not a number: the embeddings have diverged. Lower the learning rate.")
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
    """DPO on preference data, judged by the dev score; see :class:`DevScored` for the arguments."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss; prompts are run once for both completions, and the LM head on completion tokens only."""
        model = self.generator()
        causal_lm = model.get_base_model() if hasattr(model, "peft_config") else model
        with completion_tokens_only(), pairs_together(causal_lm.base_model):
            return super().compute_loss(*args, **kwargs)
