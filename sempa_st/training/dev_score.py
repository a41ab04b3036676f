"""The dev score of a model in training, and a trainer that selects checkpoints by it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainerControl

from sempa_st.data.sts import GradedPairs
from sempa_st.errors import SempaError
from sempa_st.forward.embed import embed_rows_fast
from sempa_st.model.prompt_eol import ForwardRows, PromptEOL
from sempa_st.training.callbacks import DEV_METRIC
from sempa_st.training.divergence import DivergedError, GradientCheck, diverged_loss, likely_cause
from sempa_st.training.launch import whole
from sempa_st.utils.finite import check_finite


@dataclass(frozen=True)
class DevScorer:
    """Score a model in memory on graded pairs, with the embeddings that its model folder would give.

    Args:
        pairs: Graded sentence pairs.
        tokenizer: Tokenizer with the embedding template installed.
        template: Name of the embedding template.
        max_seq_length: Maximum input length in tokens, template included.
        batch_size: Number of sentences in a batch.
    """

    pairs: GradedPairs
    tokenizer: PreTrainedTokenizerBase
    template: str
    max_seq_length: int
    batch_size: int

    def module(self, model: Any, forward_rows: ForwardRows | None = None) -> PromptEOL:
        """Return the embedding module around a model, with this tokenizer and template."""
        return PromptEOL(
            model,
            self.tokenizer,
            template=self.template,
            max_seq_length=self.max_seq_length,
            forward_rows=forward_rows,
        )

    def __call__(self, model: Any) -> float:
        """Return the Spearman correlation, times 100, of cosine similarities with the grades.

        Raises:
            SempaError: If the score is not a number, because training has diverged.
        """
        from sentence_transformers import SentenceTransformer

        sentences = self.pairs.sentences
        embedder = SentenceTransformer(modules=[self.module(model, embed_rows_fast)], device=str(model.device))
        vectors = embedder.encode(
            sentences, batch_size=self.batch_size, show_progress_bar=False, convert_to_tensor=True
        )
        try:
            check_finite(vectors, sentences)
        except SempaError as error:
            raise DivergedError(f"The dev pairs cannot be scored. {error} {likely_cause(model)}") from error
        score = self.pairs.spearman(vectors.float())
        if not math.isfinite(score):
            raise DivergedError(
                f"The dev score is not a number ({score}): the embeddings have diverged. Lower the learning rate."
            )
        return score


class DevScoreTrainer(Trainer):
    """A trainer whose ``evaluate`` returns the dev score of the embeddings instead of a loss.

    Args:
        dev_scorer: Scores the model at each checkpoint.
        train_dataset: Data set to train on. There is no ``eval_dataset``.
        **kwargs: Other arguments of the Transformers trainer, or of the trainer that a subclass derives from.
    """

    def __init__(self, *, dev_scorer: DevScorer, train_dataset: Any, **kwargs: Any) -> None:
        # The Transformers trainer evaluates only if it has an eval_dataset; this one is never used.
        super().__init__(train_dataset=train_dataset, eval_dataset=train_dataset.select([0]), **kwargs)
        self._dev_scorer = dev_scorer
        self.add_callback(GradientCheck(self))

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run a forward and backward pass; raises :class:`DivergedError` if the loss is infinite or NaN."""
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not loss.isfinite():
            raise diverged_loss(loss, self, self._dev_scorer.module(self.generator()), inputs)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return and log the dev score of the model."""
        model = self.generator()
        was_training = model.training
        with whole(self.accelerator.unwrap_model(self.model), self._dev_scorer.module(model).decoder):
            metrics = {DEV_METRIC: self._dev_scorer(model)}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        model.train(was_training)
        return metrics

    def generator(self) -> Any:
        """Return the trained causal language model, adapter included."""
        return self.accelerator.unwrap_model(self.model)
