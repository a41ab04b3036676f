"""Log-likelihoods for lm-evaluation-harness: a prefix that many requests share runs once.

Requests form a prefix tree, which is scored from its leaves to its root. A prefix gets a forward pass and a key/value
cache of its own if it saves enough tokens. Three questions after the same examples, with two answers each::

    examples ─┬─ question 1 ─┬─ answer a        "examples" runs once; each question runs once on a copy of its cache;
              │              └─ answer b        the answers to a question run as one batch on a copy of that.
              ├─ question 2 ─┬─ answer a
              │              └─ answer b
              └─ question 3 ─┬─ ...
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from sempa_st.errors import SempaError
from sempa_st.forward.decoder import cache_argument, can_cache
from sempa_st.model.patching import edited
from sempa_st.model.peft_models import invocation_tokens, is_peft_model
from sempa_st.model.token_rows import common_prefix
from sempa_st.utils.finite import OVERFLOW_ADVICE

_BATCH_TOKENS = 1 << 14
"""Most tokens in the key/value cache of a batch (batch size times length), which bounds its memory."""
_LOGITS = 1 << 27
"""Most logits at once: 512 MiB in float32."""
_WORTH_ON_CPU, _WORTH = 64, 1024
"""Tokens that a longer prefix must save to get a forward pass of its own. An accelerator prefers full batches."""
Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Texts, token ids of the context, and token ids of the continuation."""


@dataclass(frozen=True)
class ScoredSequence:
    """A sequence that the model runs for one or more requests.

    Args:
        tokens: Context and continuation, without the last token.
        requests: (Index of the request, continuation) for each; the last positions of the sequence predict it.
    """

    tokens: tuple[int, ...]
    requests: list[tuple[int, list[int]]]

    @property
    def scored(self) -> int:
        """Number of positions at the end whose predictions are scored."""
        return max(len(continuation) for _, continuation in self.requests)

    @property
    def sharable(self) -> int:
        """Number of tokens before those positions, which may be part of a shared prefix."""
        return len(self.tokens) - self.scored


class SharedPrefixLM(HFLM):
    """The harness's Hugging Face model with faster log-likelihoods, equal to the original's.

    Args:
        *args: As for ``HFLM``.
        **kwargs: As for ``HFLM``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cut = 0
        """Number of requests that were longer than the model allows and lost their beginning."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate like the harness, and count the prompts that it cuts to leave room for the answer."""
        for prompt, settings in (request.args for request in requests):
            room = self.max_length - settings.get("max_gen_toks", self.max_gen_toks)
            self.cut += len(self.tok_encode(prompt)) > room
        answers: list[str] = super().generate_until(requests, disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        by_tokens: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        whole: list[int] = []  # requests that the harness itself scores
        invocation = tuple(invocation_tokens(self.model))
        shares = can_cache(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise SempaError(
                    f"An answer of {len(continuation)} tokens cannot be scored: the model takes {self.max_length}. "
                    "Leave out the task, or shorten the answer."
                )
            tokens = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            self.cut += len(context) + len(continuation) > self.max_length + 1
            # PEFT finds the invocation tokens of an activated adapter only in one piece.
            if not shares or (invocation and _contains(tokens, invocation)):
                whole.append(number)
            else:
                by_tokens.setdefault(tokens, []).append((number, continuation))
        scorer = _Scorer(self.model, len(requests), self.device, int(self.batch_size))
        with (
            tqdm(total=len(requests) - len(whole), desc="Log-likelihoods", disable=disable_tqdm) as bar,
            torch.no_grad(),
        ):
            scorer.score([ScoredSequence(tokens, by_tokens[tokens]) for tokens in sorted(by_tokens)], bar)
        answers = list(zip(scorer.sums.tolist(), scorer.greedy.tolist(), strict=True))
        if whole:
            plain = super()._loglikelihood_tokens([requests[number] for number in whole], disable_tqdm, override_bs)
            for number, answer in zip(whole, plain, strict=True):
                answers[number] = answer
        _check_finite(answers, requests)
        return answers


def _check_finite(answers: Sequence[tuple[float, bool]], requests: Sequence[Any]) -> None:
    """Raise :class:`SempaError` on a log-likelihood of NaN; the harness would take the first answer for the best."""
    bad = [number for number, (value, _) in enumerate(answers) if not math.isfinite(value)]
    if bad:
        texts = "".join(requests[bad[0]][0])
        raise SempaError(
            f"{len(bad)} of {len(answers)} log-likelihoods are infinite or NaN: of {texts!a:.80}. {OVERFLOW_ADVICE}"
        )


def _contains(tokens: tuple[int, ...], piece: tuple[int, ...]) -> bool:
    return any(tokens[start : start + len(piece)] == piece for start in range(len(tokens) - len(piece) + 1))


class _Scorer:
    """Sums of log-probabilities (``sums``) and whether each token was the likeliest (``greedy``), by request."""

    def __init__(self, model: Any, requests: int, device: torch.device, batch_size: int) -> None:
        self.model = model
        self.device = device
        self.batch_size = batch_size
        self.worth = _WORTH_ON_CPU if device.type == "cpu" else _WORTH
        self.max_scored = max(1, _LOGITS // model.get_output_embeddings().weight.shape[0])
        self.sums = torch.zeros(requests, dtype=torch.float64)
        self.greedy = torch.ones(requests, dtype=torch.bool)

    def score(self, sequences: list[ScoredSequence], bar: tqdm[Any]) -> None:
        """Score sequences that are sorted by their tokens."""
        self._run(self._visit(sequences, 0, 0, None, bar), 0, None, bar)

    def _visit(
        self, sequences: list[ScoredSequence], depth: int, cached: int, cache: Any, bar: tqdm[Any]
    ) -> list[ScoredSequence]:
        """Score the sequences for which a longer cached prefix pays, and return the others.

        Args:
            sequences: Sequences below one node of the prefix tree, sorted: their first ``depth`` tokens are equal.
            depth: Number of these tokens.
            cached: Number of tokens in ``cache``, at most ``depth``.
            cache: Keys and values of those, for one sequence.
            bar: Progress in requests.
        """
        others = [sequence for sequence in sequences if sequence.sharable <= depth]
        deeper = (sequence for sequence in sequences if sequence.sharable > depth)
        for _, group in groupby(deeper, key=lambda sequence: sequence.tokens[depth]):
            child = list(group)
            shared = _shared(child)
            if (len(child) - 1) * (shared - cached) >= self.worth:
                longer = self._extend(cache, child[0].tokens[cached:shared])
                self._run(self._visit(child, shared, shared, longer, bar), shared, longer, bar)
            elif len(child) > 1:
                others += self._visit(child, shared, cached, cache, bar)
            else:
                others += child
        return others

    def _extend(self, cache: Any, tokens: Sequence[int]) -> Any:
        longer = self._copy(cache, 1)
        self._logits(torch.tensor([tokens], device=self.device), longer, torch.tensor([], dtype=torch.long))
        return longer

    def _copy(self, cache: Any, batch_size: int) -> Any:
        if cache is None:
            return DynamicCache(config=self.model.config)
        branch = copy.deepcopy(cache)
        if batch_size > 1:
            branch.batch_repeat_interleave(batch_size)
        return branch

    def _run(self, sequences: list[ScoredSequence], cached: int, cache: Any, bar: tqdm[Any]) -> None:
        for batch in self._batches(sequences, cached):
            self._run_batch(batch, cached, cache)
            bar.update(sum(len(sequence.requests) for sequence in batch))

    def _batches(self, sequences: list[ScoredSequence], cached: int) -> Iterator[list[ScoredSequence]]:
        batch: list[ScoredSequence] = []
        for sequence in sorted(sequences, key=lambda sequence: -len(sequence.tokens)):
            longest = len((batch or [sequence])[0].tokens)
            full = (
                len(batch) == self.batch_size
                or (len(batch) + 1) * longest > _BATCH_TOKENS
                or sum(other.scored for other in batch) + sequence.scored > self.max_scored
                or 2 * (len(sequence.tokens) - cached) < longest - cached  # it would be mostly padding
            )
            if batch and full:
                yield batch
                batch = []
            batch.append(sequence)
        if batch:
            yield batch

    def _run_batch(self, batch: list[ScoredSequence], cached: int, cache: Any) -> None:
        length = len(batch[0].tokens) - cached
        # Padding on the right needs no mask: it comes after all tokens, which cannot see it.
        padded = [[*one.tokens[cached:], *[0] * (length + cached - len(one.tokens))] for one in batch]
        tokens = torch.tensor(padded)
        predictions = torch.tensor(list(_predictions(batch, cached)))
        # One sequence with too many predictions (a document) runs piece by piece.
        width = length if len(predictions) <= self.max_scored or len(batch) > 1 else self.max_scored
        branch = None if cache is None and width == length else self._copy(cache, len(batch))
        for start in range(0, length, width):
            piece = tokens[:, start : start + width]
            in_piece = (predictions[:, 2] >= start) & (predictions[:, 2] < start + width)
            number, index, position, target = predictions[in_piece].T
            flat, back = torch.unique(index * piece.shape[1] + position - start, return_inverse=True)
            logits = self._logits(piece.to(self.device), branch, flat).float()
            best = logits.argmax(-1).cpu()[back]
            chosen = logits[back.to(self.device), target.to(self.device)].cpu() - logits.logsumexp(-1).cpu()[back]
            self.sums.index_add_(0, number, chosen.double())
            self.greedy[number[best != target]] = False

    def _logits(self, tokens: Tensor, cache: Any, indices: Tensor) -> Tensor:
        """Run tokens after those in the cache, if any; return logits at ``indices`` of the flattened batch only."""
        with _head_only_at(self.model.get_output_embeddings(), indices.to(self.device)):
            past = {} if cache is None else {cache_argument(self.model): cache}
            output = self.model(input_ids=tokens, use_cache=cache is not None, **past)
        return output.logits[0]


def _shared(sequences: list[ScoredSequence]) -> int:
    """Return the length of the prefix that sorted sequences share, without scored positions."""
    limit = min(sequence.sharable for sequence in sequences)
    return common_prefix([sequence.tokens[:limit] for sequence in (sequences[0], sequences[-1])])


def _predictions(batch: list[ScoredSequence], cached: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield each token to predict as (index of the request, index in the batch, position after the cache, token)."""
    for index, sequence in enumerate(batch):
        for number, continuation in sequence.requests:
            start = len(sequence.tokens) - cached - len(continuation)
            yield from ((number, index, start + offset, token) for offset, token in enumerate(continuation))


def _head_only_at(head: torch.nn.Module, indices: Tensor) -> AbstractContextManager[None]:
    """Run the LM head at some indices of the flattened batch only: it is the slowest layer of a small model."""

    def select(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states, *others = args
        return (states.flatten(0, 1)[indices][None], *others), kwargs

    return edited(head, before=select)
