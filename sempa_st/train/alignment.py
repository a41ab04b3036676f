"""The trainer of every objective but plain DPO and plain contrastive learning, which TRL and ST have trainers for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from sempa_st.config import TrainConfig
from sempa_st.nli import Triplet
from sempa_st.prompt_eol import PromptEOL
from sempa_st.train.batches import Batch
from sempa_st.train.forwards import answer_log_probabilities, full_logits, last_states, word_logits
from sempa_st.train.objectives import (
    Outcome,
    in_batch_outcome,
    one_word_outcome,
    ranked_answers_outcome,
    reference_kl,
)
from sempa_st.train.scores import similarity_score, word_score
from sempa_st.train.trainer import DevScored

Part = Callable[[Sequence[int], Sequence[Triplet]], Batch]
"""Makes some tensors of a batch from the numbers of its triplets and the triplets themselves."""


class Collator:
    """Join the parts of a batch.

    Args:
        triplets: All triplets; a data set of their numbers (column ``index``) is what the trainer draws from.
        parts: Makers of the tensors.
    """

    def __init__(self, triplets: Sequence[Triplet], parts: Sequence[Part]) -> None:
        self._triplets = triplets
        self._parts = parts

    def __call__(self, items: Sequence[Mapping[str, int]]) -> Batch:
        """Return the tensors of the triplets with these numbers."""
        indices = [item["index"] for item in items]
        triplets = [self._triplets[index] for index in indices]
        return {key: tensor for part in self._parts for key, tensor in part(indices, triplets).items()}


class AlignmentTrainer(DevScored, Trainer):
    """Sum of objectives over the batches of a :class:`Collator`; ``evaluate`` is the dev score of the embeddings.

    Args:
        config: Settings; the objectives' strengths are read from it.
        module: Embedding module around the model that is trained.
        **kwargs: Arguments of the Transformers trainer.
    """

    def __init__(self, *, config: TrainConfig, module: PromptEOL, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._config = config
        self._weights = config.objective_weights
        self._module = module
        self._figures: dict[str, list[Tensor]] = {"rewards/accuracies": [], "rewards/margins": []}
        # Every loss here is a mean over its own micro-batch.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the weighted sum of the objectives, and of the reference term on ordinary text."""
        loss = torch.zeros((), device=self.args.device)
        if "input_ids" in inputs:
            loss = loss + self._reading_loss(inputs)
        if "answer" in inputs:
            loss = loss + self._answer_loss(inputs)
        if "plain_input_ids" in inputs:
            loss = loss + self._config.kl * self._kl(inputs)
        return (loss, {}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one forward and backward pass; before a step, average the gradients of all processes.

        The wrapper that would do so sees no forward pass here: the objectives run the decoder by itself.
        """
        loss: Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            for parameter in self._module.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        return loss

    def _reading_loss(self, batch: Batch) -> Tensor:
        config, weights = self._config, self._weights
        rows = len(batch["same"])
        # Where only closing tokens are adapted the reference is at hand; else it is in the batch, from the disk.
        at_hand = rows if "words" in batch and "reference_states" not in batch else 0
        states, reference_states = last_states(self._module, batch["input_ids"], batch["attention_mask"], at_hand)
        reference_states = batch.get("reference_states", reference_states)
        roles = states.split(rows)  # the premises, then what they are compared with
        loss = states.new_zeros(())
        if "words" in batch:
            policy = word_logits(self._module.causal_lm, roles[0], batch["words"])
            reference = word_logits(self._module.causal_lm, reference_states, batch["words"]).detach()
            if weight := weights.get("one-word"):
                outcome = one_word_outcome(policy, reference, batch["pair_bags"], config.word_beta)
                loss = loss + weight * self._note(outcome)
            if weight := weights.get("one-word-listwise"):
                scores = word_score(policy, reference, batch["bags"], config.word_beta)
                loss = loss + weight * self._note(self._in_batch(scores, batch))
        if weight := weights.get("contrastive"):
            scores = similarity_score(roles[0], torch.cat(roles[1:]), config.temperature)
            loss = loss + weight * self._note(self._in_batch(scores, batch))
        return loss

    def _in_batch(self, scores: Tensor, batch: Batch) -> Outcome:
        return in_batch_outcome(scores, batch["same"], batch["neutral_known"], neutral=self._config.neutral)

    def _answer_loss(self, batch: Batch) -> Tensor:
        policy = answer_log_probabilities(self._module.causal_lm, batch).view(len(batch["answers"]), -1)
        reference = batch["reference_log_probabilities"]
        name = "listwise" if "listwise" in self._weights else "dpo"
        outcome = ranked_answers_outcome(policy, reference, batch["answers"], self._config.beta)
        return self._weights[name] * self._note(outcome)

    def _kl(self, batch: Batch) -> Tensor:
        inputs = {"input_ids": batch["plain_input_ids"], "attention_mask": batch["plain_attention_mask"]}
        places = inputs["attention_mask"].nonzero()
        chosen = places[torch.randperm(len(places))[: self._config.kl_positions].to(places.device)].unbind(1)
        decoder = self._module.decoder
        with torch.no_grad(), self._module.model.disable_adapter():
            reference = full_logits(
                self._module.causal_lm, decoder(**inputs, use_cache=False).last_hidden_state[chosen]
            )
        policy = full_logits(self._module.causal_lm, decoder(**inputs, use_cache=False).last_hidden_state[chosen])
        kl = reference_kl(policy, reference)
        self._figures.setdefault("kl", []).append(kl.detach())
        return kl

    def _note(self, outcome: Outcome) -> Tensor:
        self._figures["rewards/accuracies"].append((outcome.margins > 0).float().mean())
        self._figures["rewards/margins"].append(outcome.margins.mean())
        return outcome.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the preference figures since the last line."""
        if "loss" in logs:
            logs |= {name: float(torch.stack(values).mean()) for name, values in self._figures.items() if values}
            for values in self._figures.values():
                values.clear()
        super().log(logs, *args, **kwargs)
