"""From triplets to the tensors of a training batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sempa_st.data.nli import Triplet
from sempa_st.data.passages import PASSAGE_TOKENS, Passages
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.token_rows import pad_rows
from sempa_st.training.answers import answer_ids
from sempa_st.training.word_bags import bag_matrix, without_shared

Batch = dict[str, Tensor]
Bagger = Callable[[str], dict[int, float]]


@dataclass(frozen=True)
class ReadingRows:
    """Make the part of a batch that is read under the embedding template.

    Args:
        module: Embedding module, which renders and tokenises.
        roles: Sentences of a triplet to read: ``premise`` first, then those an objective compares states with.
        candidates: Hypotheses that stand for choice: ``entailed``, ``contradicted`` and maybe ``neutral``.
        bagger: Turns a sentence into its bag of words; None where no objective scores words.
        pairwise: Whether ``one-word`` needs bags without the words that a row's two hypotheses share.
    """

    module: PromptEOL
    roles: tuple[str, ...]
    candidates: tuple[str, ...]
    bagger: Bagger | None
    pairwise: bool = False

    def __call__(self, triplets: Sequence[Triplet]) -> Batch:
        """Return the tensors; rows of several roles stand one role after the other.

        Keys are ``input_ids`` and ``attention_mask`` (roles x rows, tokens), ``same`` (rows, rows), ``neutral_known``
        (rows,), and with a bagger ``words`` and the bags over them: ``bags`` (candidates x rows, words) and
        ``pair_bags`` (2 rows, words).
        """
        sentences = [sentence_of(triplet, role) for role in self.roles for triplet in triplets]
        padded = pad_rows(self.module.tokenizer, self.module.token_rows(sentences), "left")
        premises = [triplet.premise for triplet in triplets]
        same = [[first == second and i != j for j, second in enumerate(premises)] for i, first in enumerate(premises)]
        neutral_known = [triplet.neutral is not None for triplet in triplets]
        batch: Batch = {**padded, "same": torch.tensor(same), "neutral_known": torch.tensor(neutral_known)}
        if self.bagger is not None:
            batch |= self._bags(triplets, self.bagger)
        return batch

    def _bags(self, triplets: Sequence[Triplet], bagger: Bagger) -> Batch:
        groups: dict[str, list[Mapping[int, float]]] = {
            "bags": [bagger(sentence_of(triplet, role)) for role in self.candidates for triplet in triplets]
        }
        if self.pairwise:
            pairs = [without_shared(bagger(triplet.entailed), bagger(triplet.contradicted)) for triplet in triplets]
            groups["pair_bags"] = [pair[side] for side in (0, 1) for pair in pairs]
        words, matrix = bag_matrix([bag for group in groups.values() for bag in group])
        weights = torch.tensor(matrix).split([len(group) for group in groups.values()])
        return {"words": torch.tensor(words), **dict(zip(groups, weights, strict=True))}


def sentence_of(triplet: Triplet, role: str) -> str:
    """Return the sentence that has ``role`` in a triplet; the contradicted one fills the place of a missing neutral."""
    sentence: str | None = getattr(triplet, role)
    return triplet.contradicted if sentence is None else sentence


@dataclass(frozen=True)
class AnswerRows:
    """Make the part of a batch that holds paraphrase requests with ranked answers.

    Args:
        tokenizer: The base's tokenizer.
        rows: Request and answers, best first, of each triplet.
        answers: Most answers of a row that are used: 2 for ``dpo`` (the first and the last), 3 for ``listwise``.
        max_length: Longest sequence in tokens; a longer one loses its end.
    """

    tokenizer: Any
    rows: Sequence[tuple[Any, list[Any]]]
    answers: int
    max_length: int

    def __call__(self, indices: Sequence[int]) -> Batch:
        """Return the tensors of these rows: sequences padded on the right, a row's answers next to each other.

        Keys are ``answer_input_ids``, ``answer_attention_mask`` and ``answer`` (rows x answers, tokens) and
        ``answers`` (rows,), the number of answers that a row has; a lacking one repeats the row's last.
        """
        sequences: list[tuple[list[int], list[int]]] = []
        counts = []
        for index in indices:
            prompt, ranked = self.rows[index]
            used = ranked if self.answers > 2 else [ranked[0], ranked[-1]]
            counts.append(len(used))
            used = used + [used[-1]] * (self.answers - len(used))
            sequences += [answer_ids(self.tokenizer, prompt, answer) for answer in used]
        rows = [(request + answer)[: self.max_length] for request, answer in sequences]
        padded = pad_rows(self.tokenizer, rows, "right")
        places = torch.arange(padded["input_ids"].shape[1])[None]
        starts = torch.tensor([len(request) for request, _ in sequences])[:, None]
        return {
            "answer_input_ids": padded["input_ids"],
            "answer_attention_mask": padded["attention_mask"],
            "answer": (places >= starts) & padded["attention_mask"].bool(),
            "answers": torch.tensor(counts),
        }


BatchMaker = Callable[[Sequence[int], Sequence[Triplet]], Batch]
"""Makes some tensors of a batch from the numbers of its triplets and the triplets themselves."""


class Collator:
    """Join the parts of a batch.

    Args:
        triplets: All triplets; a data set of their numbers (column ``index``) is what the trainer draws from.
        parts: Makers of the tensors.
    """

    def __init__(self, triplets: Sequence[Triplet], parts: Sequence[BatchMaker]) -> None:
        self._triplets = triplets
        self._parts = parts

    def __call__(self, items: Sequence[Mapping[str, int]]) -> Batch:
        """Return the tensors of the triplets with these numbers."""
        indices = [item["index"] for item in items]
        triplets = [self._triplets[index] for index in indices]
        return {key: tensor for part in self._parts for key, tensor in part(indices, triplets).items()}


def picked(tensor: dict[str, Tensor]) -> BatchMaker:
    """Return a maker that picks the rows of tensors computed before."""
    return lambda indices, _: {name: values[list(indices)] for name, values in tensor.items()}


def premise_batches(tokenizer: PreTrainedTokenizerBase, max_length: int) -> BatchMaker:
    """Return a maker of batches of premises as ordinary text."""

    def part(_: Sequence[int], triplets: Sequence[Triplet]) -> Batch:
        return padded_batch(tokenizer, [tokenizer(triplet.premise)["input_ids"][:max_length] for triplet in triplets])

    return part


def passage_batches(
    tokenizer: PreTrainedTokenizerBase, passages: Passages, positions: int, triplets: int
) -> BatchMaker:
    """Return the maker of rows from a text: as many passages as it takes for the positions that are looked at.

    They begin where the batch's first triplet stands among all, so that over a run the whole text has its turn.
    """
    count = len(passages.rows)

    def part(indices: Sequence[int], _: Sequence[Triplet]) -> Batch:
        first = indices[0] * count // triplets
        wanted = range(first, first + math.ceil(positions / PASSAGE_TOKENS))
        return padded_batch(tokenizer, [passages.rows[number % count] for number in wanted])

    return part


def padded_batch(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> Batch:
    """Return token ids as the padded batch of ordinary text."""
    return {f"plain_{name}": tensor for name, tensor in pad_rows(tokenizer, rows, "right").items()}
