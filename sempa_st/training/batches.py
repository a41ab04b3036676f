"""Tensors of a training batch: sentences under the embedding template, and paraphrase prompts with ranked answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sempa_st.data.nli import Triplet
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.token_rows import fitting, pad_rows
from sempa_st.training.answers import answer_ids
from sempa_st.training.word_bags import bag_matrix, without_shared

Batch = dict[str, Tensor]
Bagger = Callable[[str], dict[int, float]]


@dataclass(frozen=True)
class EmbeddingInputs:
    """Make the tensors of sentences under the embedding template.

    Args:
        module: Embedding module, which renders the template and tokenises.
        roles: Fields of a triplet to embed: ``premise`` first, then the sentences it is compared with.
        candidates: Fields of a triplet to choose from: ``entailed``, and maybe ``contradicted`` and ``neutral``.
        bagger: Turns a sentence into its bag of words; None if no objective scores words.
        pairwise: Whether to add ``pair_bags`` for the objective ``one-word``.
    """

    module: PromptEOL
    roles: tuple[str, ...]
    candidates: tuple[str, ...]
    bagger: Bagger | None
    pairwise: bool = False

    def __call__(self, triplets: Sequence[Triplet]) -> Batch:
        """Return the tensors of some triplets.

        ``input_ids`` and ``attention_mask``, of shape (roles * batch, seq_len), hold the first sentence field of all
        triplets, then the next one; the bags are ordered in the same way. The others are

        - ``texts`` (roles * batch,): a number for each sentence, the same for equal ones,
        - ``same_premise`` (batch, batch): True for two different triplets with the same premise,
        - ``has_neutral`` (batch,): False for a triplet without a neutral sentence,

        and with a bagger

        - ``words`` (words,): the token ids that occur in a bag,
        - ``bags`` (candidates * batch, words): weight of each word in each candidate,
        - ``pair_bags`` (2 * batch, words), only if ``pairwise``: entailed and contradicted sentences, without the words
          that a triplet's two share.
        """
        sentences = [sentence_of(triplet, role) for role in self.roles for triplet in triplets]
        padded = pad_rows(self.module.tokenizer, self.module.token_rows(sentences), "left")
        premises = [triplet.premise for triplet in triplets]
        same = [[first == second and i != j for j, second in enumerate(premises)] for i, first in enumerate(premises)]
        has_neutral = [triplet.neutral is not None for triplet in triplets]
        numbers = {sentence: number for number, sentence in enumerate(sentences)}
        batch: Batch = {
            **padded,
            "texts": torch.tensor([numbers[sentence] for sentence in sentences]),
            "same_premise": torch.tensor(same),
            "has_neutral": torch.tensor(has_neutral),
        }
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
    """Return a field of a triplet; the contradicted sentence is a placeholder for a missing neutral one."""
    sentence: str | None = getattr(triplet, role)
    return triplet.contradicted if sentence is None else sentence


@dataclass(frozen=True)
class AnswerInputs:
    """Make the tensors of paraphrase prompts with ranked answers.

    Args:
        tokenizer: The base model's tokenizer.
        examples: Prompt and answers, best first, of each triplet.
        num_answers: Maximum number of answers per prompt: 2 for ``dpo`` (the first and the last), 3 for ``listwise``.
        max_length: Maximum sequence length in tokens; longer sequences are truncated at the end.
        decoder: Layers with the input embeddings, for tokens that have none (see
            :func:`sempa_st.model.token_rows.fitting`); None if all have one.
    """

    tokenizer: Any
    examples: Sequence[tuple[Any, list[Any]]]
    num_answers: int
    max_length: int
    decoder: Any = None

    def __call__(self, indices: Sequence[int]) -> Batch:
        """Return the tensors of these examples, padded on the right.

        ``answer_input_ids``, ``answer_attention_mask`` and ``answer_mask`` (True on answer tokens) have the shape
        (batch * num_answers, seq_len), with the answers of a prompt in consecutive rows. ``answer_counts``, of shape
        (batch,), is the number of answers that a prompt has; missing ones repeat its last answer.
        """
        sequences: list[tuple[list[int], list[int]]] = []
        counts = []
        for index in indices:
            prompt, ranked = self.examples[index]
            used = ranked if self.num_answers > 2 else [ranked[0], ranked[-1]]
            counts.append(len(used))
            used = used + [used[-1]] * (self.num_answers - len(used))
            sequences += [answer_ids(self.tokenizer, prompt, answer) for answer in used]
        token_ids = [(prompt_ids + answer)[: self.max_length] for prompt_ids, answer in sequences]
        if self.decoder is not None:
            token_ids = fitting(self.tokenizer, token_ids, self.decoder)
        padded = pad_rows(self.tokenizer, token_ids, "right")
        positions = torch.arange(padded["input_ids"].shape[1])[None]
        starts = torch.tensor([len(prompt_ids) for prompt_ids, _ in sequences])[:, None]
        return {
            "answer_input_ids": padded["input_ids"],
            "answer_attention_mask": padded["attention_mask"],
            "answer_mask": (positions >= starts) & padded["attention_mask"].bool(),
            "answer_counts": torch.tensor(counts),
        }
