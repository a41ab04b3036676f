"""The trainer of every objective but plain DPO and plain contrastive learning, which TRL and ST have trainers for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer

from sempa_st.data.nli import NliData, Triplet
from sempa_st.data.passages import Passages
from sempa_st.data.preferences import ranked_answers
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.training.batches import (
    AnswerRows,
    Batch,
    BatchMaker,
    ReadingRows,
    passage_batches,
    picked,
    premise_batches,
)
from sempa_st.training.config import READING_OBJECTIVES, SEQUENCE_OBJECTIVES, WORD_OBJECTIVES, TrainConfig
from sempa_st.training.dev_score import DevScoreTrainer
from sempa_st.training.forward import answer_log_probabilities, full_logits, last_states, word_logits
from sempa_st.training.losses import (
    ObjectiveLoss,
    in_batch_loss,
    one_word_loss,
    ranked_answers_loss,
    reference_kl,
    similarity_score,
    word_score,
)
from sempa_st.training.reference import reference_answers, reference_identity, reference_states
from sempa_st.training.word_bags import WordBags, document_frequencies


class AlignmentTrainer(DevScoreTrainer, Trainer):
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
                outcome = one_word_loss(policy, reference, batch["pair_bags"], config.word_beta)
                loss = loss + weight * self._note(outcome)
            if weight := weights.get("one-word-listwise"):
                scores = word_score(policy, reference, batch["bags"], config.word_beta)
                loss = loss + weight * self._note(self._in_batch(scores, batch))
        if weight := weights.get("contrastive"):
            scores = similarity_score(roles[0], torch.cat(roles[1:]), config.temperature)
            loss = loss + weight * self._note(self._in_batch(scores, batch))
        return loss

    def _in_batch(self, scores: Tensor, batch: Batch) -> ObjectiveLoss:
        return in_batch_loss(scores, batch["same"], batch["neutral_known"], neutral=self._config.neutral)

    def _answer_loss(self, batch: Batch) -> Tensor:
        policy = answer_log_probabilities(self._module.causal_lm, batch).view(len(batch["answers"]), -1)
        reference = batch["reference_log_probabilities"]
        name = "listwise" if "listwise" in self._weights else "dpo"
        outcome = ranked_answers_loss(policy, reference, batch["answers"], self._config.beta)
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

    def _note(self, outcome: ObjectiveLoss) -> Tensor:
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


def make_batch_makers(
    config: TrainConfig,
    data: NliData,
    tokenizer: PreTrainedTokenizerBase,
    module: PromptEOL,
    base_digest: str,
    passages: Passages | None = None,
) -> list[BatchMaker]:
    """Return the makers of a run's batches; runs the reference over the data where no earlier run did.

    Args:
        config: Settings.
        data: Triplets.
        tokenizer: The base's tokenizer, for text outside the embedding template.
        module: Embedding module around the base, no adapter attached.
        base_digest: Tells the base's weights from others, for the cache of the reference.
        passages: Ordinary text for the KL term; the premises when None.
    """
    weights = config.objective_weights
    identity = reference_identity(data, module.model, module.model.dtype, base_digest)
    parts: list[BatchMaker] = []
    if weights.keys() & READING_OBJECTIVES:
        rows = _reading_rows(config, data, module)
        parts.append(lambda _, triplets: rows(triplets))
    if weights.keys() & WORD_OBJECTIVES and config.activation != "template":
        parts.append(picked(reference_states(config, data, module, identity)))
    if weights.keys() & SEQUENCE_OBJECTIVES:
        answers = AnswerRows(
            tokenizer,
            ranked_answers(data.triplets, tokenizer, paraphrase=config.paraphrase),
            3 if "listwise" in weights else 2,
            config.max_length,
        )
        parts.append(lambda indices, _: answers(indices))
        parts.append(picked(reference_answers(config, answers, module, identity)))
    if config.kl:
        parts.append(
            passage_batches(tokenizer, passages, config.kl_positions, len(data.triplets))
            if passages
            else premise_batches(tokenizer, config.max_seq_length)
        )
    return parts


def _reading_rows(config: TrainConfig, data: NliData, module: PromptEOL) -> ReadingRows:
    weights = config.objective_weights
    words = bool(weights.keys() & WORD_OBJECTIVES)
    candidates = ("entailed", "contradicted", *(() if config.neutral == "none" else ("neutral",)))
    compared = candidates if "contrastive" in weights else ()
    return ReadingRows(
        module,
        ("premise", *compared),
        candidates,
        word_bags(config, module.tokenizer, data.triplets) if words else None,
        pairwise="one-word" in weights,
    )


def word_bags(config: TrainConfig, tokenizer: Any, triplets: Sequence[Triplet]) -> WordBags:
    """Return the maker of bags with a run's settings; idf weights are counted over all sentences of the triplets."""
    frequencies = None
    sentences = [s for t in triplets for s in (t.premise, t.entailed, t.contradicted)]
    if config.word_weights == "idf":
        frequencies = document_frequencies(sentences)
    return WordBags(
        tokenizer,
        tokens=config.word_tokens,
        forms=config.word_forms,
        stop_words=config.stop_words,
        frequencies=frequencies,
        sentences=len(sentences),
    )
