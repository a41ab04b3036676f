"""The collator of a run's batches: which tensors its objectives need, the reference model's results included."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sempa_st.data.nli import NliData, Triplet
from sempa_st.data.passages import PASSAGE_TOKENS, Passages
from sempa_st.data.preferences import ranked_answers
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.token_rows import fitting, pad_rows
from sempa_st.model.tokenizer import prefix_tokens, suffix_tokens
from sempa_st.training.batches import AnswerInputs, Batch, EmbeddingInputs
from sempa_st.training.config import KL_TEMPLATE, TrainConfig
from sempa_st.training.objectives import (
    EMBEDDING_OBJECTIVES,
    SEQUENCE_OBJECTIVES,
    SIMILARITY_OBJECTIVES,
    WORD_OBJECTIVES,
)
from sempa_st.training.reference import reference_answers, reference_identity, reference_states
from sempa_st.training.word_bags import WordBags, document_frequencies

BatchMaker = Callable[[Sequence[int], Sequence[Triplet]], Batch]
"""Makes some tensors of a batch from the indices of its triplets and the triplets themselves."""


@dataclass(frozen=True)
class Collator:
    """Join the tensors of several batch makers into one batch.

    Args:
        triplets: All triplets. The trainer's data set holds their indices, in the column ``index``.
        makers: Batch makers; no two make a tensor of the same name.
    """

    triplets: Sequence[Triplet]
    makers: Sequence[BatchMaker]

    def __call__(self, items: Sequence[Mapping[str, int]]) -> Batch:
        """Return the batch of the triplets with these indices."""
        indices = [item["index"] for item in items]
        triplets = [self.triplets[index] for index in indices]
        return {name: tensor for make in self.makers for name, tensor in make(indices, triplets).items()}


def make_batch_makers(
    config: TrainConfig,
    data: NliData,
    tokenizer: PreTrainedTokenizerBase,
    module: PromptEOL,
    digest: str,
    passages: Passages | None = None,
) -> list[BatchMaker]:
    """Return the batch makers that a run's objectives need, after running the reference model unless it is cached.

    Args:
        config: Training settings.
        data: Triplets.
        tokenizer: The base model's tokenizer, for text without the embedding template.
        module: Embedding module around the reference, which is the model that training starts from: the base without
            an adapter, or with that of ``--from``.
        digest: Digest of the reference model, a key of the reference cache.
        passages: Ordinary text for the KL term; None for the premises.
    """
    objectives = config.objective_weights.keys()
    identity = reference_identity(data, module.model, module.decoder.dtype, digest)
    makers: list[BatchMaker] = []
    if objectives & EMBEDDING_OBJECTIVES:
        inputs = _embedding_inputs(config, data, module)
        makers.append(lambda _, triplets: inputs(triplets))
    # Without --from, an adapter of the suffix has its reference in the same prefix cache; see AlignmentTrainer.
    if objectives & WORD_OBJECTIVES and (config.activation != "template" or config.from_):
        makers.append(_lookup(reference_states(config, data, module, identity)))
    if objectives & SEQUENCE_OBJECTIVES:
        answers = AnswerInputs(
            tokenizer,
            ranked_answers(data.triplets, tokenizer, paraphrase=config.paraphrase),
            3 if "listwise" in objectives else 2,
            config.max_length,
            module.decoder,
        )
        makers.append(lambda indices, _: answers(indices))
        makers.append(_lookup(reference_answers(config, answers, module, identity)))
    if config.kl:
        makers.append(kl_batches(config, tokenizer, module, passages, len(data.triplets)))
    return makers


def candidate_roles(config: TrainConfig, data: NliData) -> tuple[str, ...]:
    """Return the fields of a triplet that the in-batch objectives choose from."""
    return (
        "entailed",
        *(() if data.is_pairs else ("contradicted",)),
        *(() if config.neutral == "none" else ("neutral",)),
    )


def _embedding_inputs(config: TrainConfig, data: NliData, module: PromptEOL) -> EmbeddingInputs:
    objectives = config.objective_weights.keys()
    candidates = candidate_roles(config, data)
    compared = candidates if objectives & set(SIMILARITY_OBJECTIVES) else ()
    return EmbeddingInputs(
        module,
        ("premise", *compared),
        candidates,
        _word_bags(config, module.tokenizer, data.triplets) if objectives & WORD_OBJECTIVES else None,
        pairwise="one-word" in objectives,
    )


def _word_bags(config: TrainConfig, tokenizer: Any, triplets: Sequence[Triplet]) -> WordBags:
    """Return the bagger for a run's settings; idf counts all sentences but the neutral ones."""
    sentences = [s for t in triplets for s in (t.premise, t.entailed, t.contradicted) if s]
    return WordBags(
        tokenizer,
        tokens=config.word_tokens,
        forms=config.word_forms,
        stop_words=config.stop_words,
        frequencies=document_frequencies(sentences) if config.word_weights == "idf" else None,
        num_sentences=len(sentences),
    )


def _lookup(tensors: Mapping[str, Tensor]) -> BatchMaker:
    """Return a batch maker that looks triplets up in precomputed tensors of shape (triplets, ...)."""
    return lambda indices, _: {name: tensor[list(indices)] for name, tensor in tensors.items()}


def kl_batches(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    module: PromptEOL,
    passages: Passages | None,
    num_triplets: int,
) -> BatchMaker:
    """Return the maker of the KL term's tensors; arguments as for :func:`make_batch_makers`.

    ``kl_input_ids`` and ``kl_attention_mask``, of shape (sequences, seq_len), are padded on the right. ``kl_mask``, of
    the same shape, is True at the positions to sample from.
    """
    if config.kl_text == KL_TEMPLATE:
        return _kl_sentences(config, module)
    return _plain_text(config, tokenizer, module.decoder, passages, num_triplets)


def _plain_text(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    decoder: Any,
    passages: Passages | None,
    num_triplets: int,
) -> BatchMaker:
    """Return a maker of batches of ordinary text for the KL term.

    These are the batch's premises, or as many passages as it takes to hold ``kl_positions`` tokens. The position of the
    batch's first triplet in the data decides where passages start in the text, so that a whole epoch covers all of it.
    """

    def make(indices: Sequence[int], triplets: Sequence[Triplet]) -> Batch:
        if passages is None:
            token_ids = [tokenizer(triplet.premise)["input_ids"][: config.max_seq_length] for triplet in triplets]
        else:
            count = len(passages.token_ids)
            first = indices[0] * count // num_triplets
            selected = range(first, first + math.ceil(config.kl_positions / PASSAGE_TOKENS))
            token_ids = [passages.token_ids[index % count] for index in selected]
        padded = pad_rows(tokenizer, fitting(tokenizer, token_ids, decoder), "right")
        return {**_named_for_kl(padded), "kl_mask": padded["attention_mask"].bool()}

    return make


def _kl_sentences(config: TrainConfig, module: PromptEOL) -> BatchMaker:
    """Return a maker of batches of sentences under the embedding template for the KL term.

    These are as many of the batch's sentences as it takes to hold ``kl_positions`` positions. The positions are those
    at which the model predicts a token of the sentence, or the token after it. Left out are the template's suffix, from
    which the embedding is read, and its prefix, which is the same in all.
    """
    tokenizer = module.tokenizer
    prefix, suffix = (len(ids(tokenizer, config.template)) for ids in (prefix_tokens, suffix_tokens))

    def make(_: Sequence[int], triplets: Sequence[Triplet]) -> Batch:
        sentences = [text for t in triplets for text in (t.premise, t.entailed, t.contradicted) if text]
        rows = module.token_rows(sentences)
        ends = list(accumulate(len(row) - prefix - suffix + 1 for row in rows))
        count = bisect_left(ends, config.kl_positions) + 1
        padded = pad_rows(tokenizer, rows[:count], "right")
        columns = torch.arange(padded["input_ids"].shape[1])
        lengths = padded["attention_mask"].sum(dim=1, keepdim=True)
        return {**_named_for_kl(padded), "kl_mask": (columns >= prefix - 1) & (columns < lengths - suffix)}

    return make


def _named_for_kl(padded: Mapping[str, Tensor]) -> Batch:
    return {f"kl_{name}": tensor for name, tensor in padded.items()}
