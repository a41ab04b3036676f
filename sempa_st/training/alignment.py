"""The trainer of all runs that neither TRL's nor sentence-transformers' trainer covers.

Without a KL term, ``dpo`` alone runs on TRL's, and ``contrastive`` alone with ``neutral`` none runs on
sentence-transformers'.

From batch to scalar, in three files:

    Collator (collator.py) -> batch
      AlignmentTrainer.compute_loss              alignment.py   sums the objectives by weight
        last_states, word_logits,                forward.py     runs the model: hidden states, logits,
        answer_log_probabilities                                log-probabilities
          in_batch_loss, retrieval_loss,         losses.py      scores candidates; each loss is a call of
          one_word_loss, ranked_answers_loss,                   plackett_luce_loss, but for the KL term
          reference_kl
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import Trainer

from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.training.batches import Batch
from sempa_st.training.config import TrainConfig
from sempa_st.training.dev_score import DevScoreTrainer
from sempa_st.training.forward import answer_log_probabilities, full_logits, last_states, word_logits
from sempa_st.training.losses import (
    ObjectiveLoss,
    in_batch_loss,
    one_word_loss,
    ranked_answers_loss,
    reference_kl,
    retrieval_loss,
    similarity_score,
    word_score,
)
from sempa_st.training.objectives import SIMILARITY_OBJECTIVES


class AlignmentTrainer(DevScoreTrainer, Trainer):
    """Train on the weighted sum of a run's objectives; ``evaluate`` returns the dev score of the embeddings.

    Args:
        config: Training settings, with the weight of each objective.
        module: Embedding module around the model to train.
        **kwargs: Arguments of the Transformers trainer, with a :class:`sempa_st.training.collator.Collator`.
    """

    def __init__(self, *, config: TrainConfig, module: PromptEOL, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._config = config
        self._weights = config.objective_weights
        self._module = module
        self._metrics: dict[str, list[Tensor]] = {"rewards/accuracies": [], "rewards/margins": []}
        # Every loss here is a mean over its own micro-batch.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the weighted sum of the objectives and of the KL term."""
        loss = torch.zeros((), device=self.args.device)
        if "input_ids" in inputs:
            loss = loss + self._embedding_loss(inputs)
        if "answer_mask" in inputs:
            loss = loss + self._answer_loss(inputs)
        if "kl_mask" in inputs:
            loss = loss + self._config.kl * self._kl(inputs)
        return (loss, {}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run a forward and backward pass; before an optimiser step, average the gradients of all processes.

        The DDP wrapper cannot do that: the objectives call the decoder directly, so the wrapper sees no forward pass.
        DeepSpeed does it as gradients appear.
        """
        loss: Tensor = super().training_step(*args, **kwargs)
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients and not is_deepspeed:
            for parameter in self._module.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        return loss

    def _embedding_loss(self, batch: Batch) -> Tensor:
        """Return the weighted sum of the objectives of the embedding, as far as they are trained."""
        size = len(batch["same_premise"])
        # If only suffix tokens are adapted, the prefix cache also gives the reference; otherwise it is in the batch.
        from_cache = size if "words" in batch and "reference_states" not in batch else 0
        states, reference_states = last_states(self._module, batch["input_ids"], batch["attention_mask"], from_cache)
        reference_states = batch.get("reference_states", reference_states)
        loss = states.new_zeros(())
        if "words" in batch:
            loss = loss + self._word_loss(batch, states[:size], reference_states)
        widths: list[Any] = [*self._config.embedding_widths] or [None]
        for name in filter(self._weights.__contains__, SIMILARITY_OBJECTIVES):  # in the same order in each process
            for width in widths:
                result = self._similarity_loss(name, states, batch, width)
                loss = loss + self._weights[name] / len(widths) * self._record(result)
        return loss

    def _similarity_loss(self, name: str, states: Tensor, batch: Batch, width: int | None) -> ObjectiveLoss:
        size, temperature = len(batch["same_premise"]), self._config.temperature
        if name == "contrastive":
            return self._in_batch(similarity_score(states[:size], states[size:], temperature, width), batch)
        scores = similarity_score(states[: 2 * size], states, temperature, width)
        own = batch["texts"], batch["same_premise"], batch["has_neutral"]
        return retrieval_loss(scores, *own, neutral=self._config.neutral)

    def _word_loss(self, batch: Batch, states: Tensor, reference_states: Tensor) -> Tensor:
        beta, weights = self._config.word_beta, self._weights
        policy = word_logits(self._module.causal_lm, states, batch["words"])
        reference = word_logits(self._module.causal_lm, reference_states, batch["words"]).detach()
        loss = states.new_zeros(())
        if weight := weights.get("one-word"):
            loss = loss + weight * self._record(one_word_loss(policy, reference, batch["pair_bags"], beta))
        if weight := weights.get("one-word-listwise"):
            scores = word_score(policy, reference, batch["bags"], beta)
            loss = loss + weight * self._record(self._in_batch(scores, batch))
        return loss

    def _in_batch(self, scores: Tensor, batch: Batch) -> ObjectiveLoss:
        return in_batch_loss(scores, batch["same_premise"], batch["has_neutral"], neutral=self._config.neutral)

    def _answer_loss(self, batch: Batch) -> Tensor:
        counts = batch["answer_counts"]
        policy = answer_log_probabilities(self._module.causal_lm, batch).view(len(counts), -1)
        reference = batch["reference_log_probabilities"]
        name = "listwise" if "listwise" in self._weights else "dpo"
        return self._weights[name] * self._record(ranked_answers_loss(policy, reference, counts, self._config.beta))

    def _kl(self, batch: Batch) -> Tensor:
        """Return the KL divergence at random positions of the KL term's text."""
        inputs = {"input_ids": batch["kl_input_ids"], "attention_mask": batch["kl_attention_mask"]}
        positions = batch["kl_mask"].nonzero()
        sample = torch.randperm(len(positions))[: self._config.kl_positions]
        rows_and_columns = positions[sample.to(positions.device)].unbind(1)

        def logits() -> Tensor:
            states = self._module.decoder(**inputs, use_cache=False).last_hidden_state
            return full_logits(self._module.causal_lm, states[rows_and_columns])

        with torch.no_grad(), self._module.model.disable_adapter():
            reference = logits()
        kl = reference_kl(logits(), reference)
        self._metrics.setdefault("kl", []).append(kl.detach())
        return kl

    def _record(self, result: ObjectiveLoss) -> Tensor:
        """Return the loss, after noting its reward accuracy and margin for the log."""
        self._metrics["rewards/accuracies"].append((result.margins > 0).float().mean())
        self._metrics["rewards/margins"].append(result.margins.mean())
        return result.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the means of the preference metrics since the last call."""
        if "loss" in logs:
            logs |= {name: float(torch.stack(values).mean()) for name, values in self._metrics.items() if values}
            for values in self._metrics.values():
                values.clear()
        super().log(logs, *args, **kwargs)
