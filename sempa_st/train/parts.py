"""Which tensors the objectives of a run need in a batch, and what the reference says of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sempa_st.config import TrainConfig
from sempa_st.nli import NliData, Triplet
from sempa_st.objectives import READING_OBJECTIVES, SEQUENCE_OBJECTIVES, WORD_OBJECTIVES
from sempa_st.preferences import ranked_answers
from sempa_st.prompt_eol import PromptEOL
from sempa_st.token_rows import pad_rows
from sempa_st.train.alignment import Part
from sempa_st.train.batches import AnswerRows, Batch, ReadingRows
from sempa_st.train.forwards import answer_log_probabilities
from sempa_st.train.passages import PASSAGE_TOKENS, Passages
from sempa_st.train.reference import REFERENCE, cached_tensor, collect, in_batches
from sempa_st.words import WordBags, document_frequencies

_REFERENCE_TOKENS = 2048


def batch_parts(
    config: TrainConfig,
    data: NliData,
    tokenizer: PreTrainedTokenizerBase,
    module: PromptEOL,
    base_digest: str,
    passages: Passages | None = None,
) -> list[Part]:
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
    parts: list[Part] = []
    if weights.keys() & READING_OBJECTIVES:
        rows = _reading_rows(config, data, module)
        parts.append(lambda _, triplets: rows(triplets))
    if weights.keys() & WORD_OBJECTIVES and config.activation != "template":
        parts.append(_picked(_reference_states(config, data, module, identity)))
    if weights.keys() & SEQUENCE_OBJECTIVES:
        answers = AnswerRows(
            tokenizer,
            ranked_answers(data.triplets, tokenizer, paraphrase=config.paraphrase),
            3 if "listwise" in weights else 2,
            config.max_length,
        )
        parts.append(lambda indices, _: answers(indices))
        parts.append(_picked(_reference_answers(config, answers, module, identity)))
    if config.kl:
        parts.append(
            _passages(tokenizer, passages, config.kl_positions, len(data.triplets))
            if passages
            else _premises(tokenizer, config.max_seq_length)
        )
    return parts


def reference_identity(data: NliData, model: PreTrainedModel, dtype: torch.dtype, base_digest: str) -> dict[str, Any]:
    """Return what decides anything that the reference says of the data.

    Args:
        data: Triplets.
        model: The reference.
        dtype: Type of its arithmetic.
        base_digest: Tells the base's weights from others.
    """
    return {
        "base": base_digest,
        "data": data.fingerprint(),
        "dtype": str(dtype),
        "attention": model.config._attn_implementation,
        "transformers": version("transformers"),
    }


def answers_identity(config: TrainConfig, identity: dict[str, Any], answers: int) -> dict[str, Any]:
    """Return what decides the log-probabilities of whole answers, ``answers`` of a row."""
    return {**identity, "answers": answers, "paraphrase": config.paraphrase, "max_length": config.max_length}


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


def _picked(tensor: dict[str, Tensor]) -> Part:
    return lambda indices, _: {name: values[list(indices)] for name, values in tensor.items()}


def _reference_states(
    config: TrainConfig, data: NliData, module: PromptEOL, identity: dict[str, Any]
) -> dict[str, Tensor]:
    """Return ``reference_states`` of the premises, of shape (triplets, hidden)."""

    def compute() -> Tensor:
        premises = [triplet.premise for triplet in data.triplets]
        distinct = list(dict.fromkeys(premises))
        rows = module.token_rows(distinct)

        def states(batch: list[int]) -> Tensor:
            padded = pad_rows(module.tokenizer, [rows[index] for index in batch])
            features = module({name: tensor.to(module.model.device) for name, tensor in padded.items()})
            embedding: Tensor = features["sentence_embedding"]
            return embedding

        lengths = [len(row) for row in rows]
        result = collect(len(rows), in_batches(lengths, _REFERENCE_TOKENS, "reference"), states)
        place = {sentence: index for index, sentence in enumerate(distinct)}
        return result[[place[premise] for premise in premises]]

    full = {**identity, "template": config.template, "max_seq_length": config.max_seq_length}
    name = "reference_states"
    return {name: cached_tensor(name, full, compute, write=PartialState().is_main_process)}


def _reference_answers(
    config: TrainConfig, answers: AnswerRows, module: PromptEOL, identity: dict[str, Any]
) -> dict[str, Tensor]:
    """Return ``reference_log_probabilities`` of shape (triplets, answers)."""

    def compute() -> Tensor:
        def log_probabilities(indices: list[int]) -> Tensor:
            batch = {name: tensor.to(module.model.device) for name, tensor in answers(indices).items()}
            return answer_log_probabilities(module.model, batch).view(len(indices), -1)

        lengths = [len(str(prompt)) + max(len(str(answer)) for answer in ranked) for prompt, ranked in answers.rows]
        batches = in_batches(lengths, 4 * _REFERENCE_TOKENS, "reference")
        return collect(len(lengths), batches, log_probabilities)

    full = answers_identity(config, identity, answers.answers)
    return {REFERENCE: cached_tensor(REFERENCE, full, compute, write=PartialState().is_main_process)}


def _premises(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Part:
    def part(_: Sequence[int], triplets: Sequence[Triplet]) -> Batch:
        return _plain_rows(tokenizer, [tokenizer(triplet.premise)["input_ids"][:max_length] for triplet in triplets])

    return part


def _passages(tokenizer: PreTrainedTokenizerBase, passages: Passages, positions: int, triplets: int) -> Part:
    """Return the maker of rows from a text: as many passages as it takes for the positions that are looked at.

    They begin where the batch's first triplet stands among all, so that over a run the whole text has its turn.
    """
    count = len(passages.rows)

    def part(indices: Sequence[int], _: Sequence[Triplet]) -> Batch:
        first = indices[0] * count // triplets
        wanted = range(first, first + math.ceil(positions / PASSAGE_TOKENS))
        return _plain_rows(tokenizer, [passages.rows[number % count] for number in wanted])

    return part


def _plain_rows(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> Batch:
    return {f"plain_{name}": tensor for name, tensor in pad_rows(tokenizer, rows, "right").items()}
