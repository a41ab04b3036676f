"""Log-likelihoods for lm-evaluation-harness that run a prefix which many requests share only once."""

from __future__ import annotations

import copy
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
from sempa_st.forward.decoder import cache_argument
from sempa_st.model.patching import edited
from sempa_st.model.peft_models import invocation_tokens
from sempa_st.model.token_rows import common_prefix

_BATCH_TOKENS = 1 << 14
"""Most tokens in the key/value cache of a batch, rows times length: what bounds its memory."""
_LOGITS = 1 << 27
"""Most logits at once: 512 MiB in float32."""
_WORTH_ON_CPU, _WORTH = 64, 1024
"""Tokens that a longer prefix must save to be worth a forward pass of its own; an accelerator is rather kept full."""
Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""The texts, the context's tokens and the continuation's tokens."""


@dataclass(frozen=True)
class Row:
    """What the model reads for one or more requests.

    Args:
        tokens: Context and continuation without its last token.
        wanted: Number of the request and its continuation; the last tokens of the row predict it.
    """

    tokens: tuple[int, ...]
    wanted: list[tuple[int, list[int]]]

    @property
    def scored(self) -> int:
        """Number of positions whose prediction is needed."""
        return max(len(continuation) for _, continuation in self.wanted)

    @property
    def free(self) -> int:
        """Number of tokens before those positions, which may lie in a shared prefix."""
        return len(self.tokens) - self.scored


class SharedPrefixLM(HFLM):
    """The harness's Hugging Face model with faster log-likelihoods; they equal the original's.

    Args:
        *args: As for ``HFLM``.
        **kwargs: As for ``HFLM``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cut = 0
        """Number of requests that were longer than the model takes and lost their beginning."""

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        rows: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        whole: list[int] = []
        invocation = tuple(invocation_tokens(self.model))
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise SempaError(
                    f"An answer of {len(continuation)} tokens cannot be scored: the model takes {self.max_length}. "
                    "Leave out the task, or shorten the answer."
                )
            tokens = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            self.cut += len(context) + len(continuation) > self.max_length + 1
            # An activated adapter acts from these tokens on, and finds them in one piece only.
            if invocation and _holds(tokens, invocation):
                whole.append(number)
            else:
                rows.setdefault(tokens, []).append((number, continuation))
        scorer = _Scorer(self.model, len(requests), self.device, int(self.batch_size))
        with (
            tqdm(total=len(requests) - len(whole), desc="Log-likelihoods", disable=disable_tqdm) as bar,
            torch.no_grad(),
        ):
            scorer.score([Row(tokens, rows[tokens]) for tokens in sorted(rows)], bar)
        answers = list(zip(scorer.sums.tolist(), scorer.greedy.tolist(), strict=True))
        if whole:
            plain = super()._loglikelihood_tokens([requests[number] for number in whole], disable_tqdm, override_bs)
            for number, answer in zip(whole, plain, strict=True):
                answers[number] = answer
        return answers


def _holds(tokens: tuple[int, ...], part: tuple[int, ...]) -> bool:
    return any(tokens[start : start + len(part)] == part for start in range(len(tokens) - len(part) + 1))


class _Scorer:
    """Adds up log-probabilities (``sums``) and tells whether each token was the likeliest (``greedy``), by request."""

    def __init__(self, model: Any, requests: int, device: torch.device, batch_size: int) -> None:
        self.model = model
        self.device = device
        self.batch_size = batch_size
        self.worth = _WORTH_ON_CPU if device.type == "cpu" else _WORTH
        self.most_scored = max(1, _LOGITS // model.get_output_embeddings().weight.shape[0])
        self.sums = torch.zeros(requests, dtype=torch.float64)
        self.greedy = torch.ones(requests, dtype=torch.bool)

    def score(self, rows: list[Row], bar: tqdm[Any]) -> None:
        """Score rows that are in order of their tokens."""
        self._run(self._visit(rows, 0, 0, None, bar), 0, None, bar)

    def _visit(self, rows: list[Row], same: int, held: int, cache: Any, bar: tqdm[Any]) -> list[Row]:
        """Score the rows that gain from a longer prefix and return the others.

        Args:
            rows: Rows whose first ``same`` tokens are the same, in order.
            same: Number of tokens.
            held: Number of tokens that ``cache`` holds.
            cache: Keys and values of those, for one row.
            bar: Progress in requests.
        """
        others = [row for row in rows if row.free <= same]
        for _, group in groupby((row for row in rows if row.free > same), key=lambda row: row.tokens[same]):
            alike = list(group)
            shared = _shared(alike)
            if (len(alike) - 1) * (shared - held) >= self.worth:
                longer = self._extend(cache, alike[0].tokens[held:shared])
                self._run(self._visit(alike, shared, shared, longer, bar), shared, longer, bar)
            elif len(alike) > 1:
                others += self._visit(alike, shared, held, cache, bar)
            else:
                others += alike
        return others

    def _extend(self, cache: Any, tokens: Sequence[int]) -> Any:
        longer = self._copy(cache, 1)
        self._logits(torch.tensor([tokens], device=self.device), longer, torch.tensor([], dtype=torch.long))
        return longer

    def _copy(self, cache: Any, rows: int) -> Any:
        if cache is None:
            return DynamicCache(config=self.model.config)
        branch = copy.deepcopy(cache)
        if rows > 1:
            branch.batch_repeat_interleave(rows)
        return branch

    def _run(self, rows: list[Row], held: int, cache: Any, bar: tqdm[Any]) -> None:
        for batch in self._batches(rows, held):
            self._run_batch(batch, held, cache)
            bar.update(sum(len(row.wanted) for row in batch))

    def _batches(self, rows: list[Row], held: int) -> Iterator[list[Row]]:
        batch: list[Row] = []
        for row in sorted(rows, key=lambda row: -len(row.tokens)):
            longest = len((batch or [row])[0].tokens)
            full = (
                len(batch) == self.batch_size
                or (len(batch) + 1) * longest > _BATCH_TOKENS
                or sum(other.scored for other in batch) + row.scored > self.most_scored
                or 2 * (len(row.tokens) - held) < longest - held  # it would be padding for the most part
            )
            if batch and full:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _run_batch(self, batch: list[Row], held: int, cache: Any) -> None:
        length = len(batch[0].tokens) - held
        # Padding on the right needs no mask: no token before it sees it.
        tokens = torch.tensor([[*row.tokens[held:], *[0] * (length + held - len(row.tokens))] for row in batch])
        cells = torch.tensor(list(_cells(batch, held)))
        # One row with too many predictions (a document) goes piece by piece.
        width = length if len(cells) <= self.most_scored or len(batch) > 1 else self.most_scored
        branch = None if cache is None and width == length else self._copy(cache, len(batch))
        for start in range(0, length, width):
            piece = tokens[:, start : start + width]
            number, row, position, target = cells[(cells[:, 2] >= start) & (cells[:, 2] < start + width)].T
            places, back = torch.unique(row * piece.shape[1] + position - start, return_inverse=True)
            logits = self._logits(piece.to(self.device), branch, places).float()
            best = logits.argmax(-1).cpu()[back]
            chosen = logits[back.to(self.device), target.to(self.device)].cpu() - logits.logsumexp(-1).cpu()[back]
            self.sums.index_add_(0, number, chosen.double())
            self.greedy[number[best != target]] = False

    def _logits(self, tokens: Tensor, cache: Any, places: Tensor) -> Tensor:
        """Run tokens, on top of the cache where there is one, and predict at ``places`` of the flattened batch only."""
        with _head_sees(self.model.get_output_embeddings(), places.to(self.device)):
            kept = {} if cache is None else {cache_argument(self.model): cache}
            output = self.model(input_ids=tokens, use_cache=cache is not None, **kept)
        logits: Tensor = output.logits[0]
        return logits


def _shared(rows: list[Row]) -> int:
    """Return how many tokens rows in order have in common, of those that may lie in a prefix."""
    most = min(row.free for row in rows)
    return common_prefix([row.tokens[:most] for row in (rows[0], rows[-1])])


def _cells(batch: list[Row], held: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield each token to predict as number of the request, row, position behind the prefix, and token."""
    for index, row in enumerate(batch):
        for number, continuation in row.wanted:
            start = len(row.tokens) - held - len(continuation)
            yield from ((number, index, start + offset, token) for offset, token in enumerate(continuation))


def _head_sees(head: torch.nn.Module, places: Tensor) -> AbstractContextManager[None]:
    """Let the LM head work on some places of the flattened batch only: it is the dearest layer of a small model."""

    def select(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states, *others = args
        return (states.flatten(0, 1)[places][None], *others), kwargs

    return edited(head, before=select)
