"""What the reference says of the data: computed once, before the adapter is there, and kept on disk."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from sempa_st.data.nli import NliData
from sempa_st.errors import SempaError
from sempa_st.forward.batching import batches_within_tokens
from sempa_st.model.patching import attention_implementation
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.token_rows import pad_rows
from sempa_st.training.batches import AnswerRows
from sempa_st.training.config import TrainConfig
from sempa_st.training.forward import answer_log_probabilities
from sempa_st.utils.files import atomic_file, cache_folder
from sempa_st.utils.leftovers import clear_leftovers, unwritable_reason

REFERENCE = "reference_log_probabilities"
"""Name of the log-probabilities of whole answers, best first, of shape (triplets, answers)."""


def cached_tensor(name: str, identity: dict[str, Any], compute: Callable[[], Tensor], *, write: bool) -> Tensor:
    """Return ``compute()``, or what it returned earlier for the same ``identity``; a cache is a help and no need.

    Args:
        name: What the result is called on disk.
        identity: All that decides the result: base, data, template, type. JSON values only.
        compute: Runs the reference; called only when nothing is cached.
        write: Whether this process keeps the result for others.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "reference" / f"{digest[:32]}.safetensors"
    try:
        return load_file(path)[name]
    except (SafetensorError, OSError, KeyError):  # not there, cut short, out of reach, or somebody else's
        tensor = compute()
    if write:
        try:
            clear_leftovers(path.parent)
            with atomic_file(path) as scratch:
                save_file({name: tensor}, scratch, metadata={"identity": json.dumps(identity)})
        except (SafetensorError, SempaError, OSError) as error:
            warn_uncached(path.parent, unwritable_reason(error) or str(error))
    return tensor


@functools.cache
def warn_uncached(folder: Path, reason: str) -> None:
    """Say once that nothing can be kept in the cache, which a run can do without."""
    print(
        f"The cache folder {folder} cannot be written ({reason}); the run goes on without it, and what the base says "
        "of the data is computed again the next time. SEMPA_CACHE_DIR names another folder.",
        file=sys.stderr,
    )


def collect(rows: int, batches: Iterator[list[int]], compute: Callable[[list[int]], Tensor]) -> Tensor:
    """Return float32 results of all rows, in the order of their numbers."""
    parts: list[Tensor | None] = [None] * rows
    for batch in batches:
        with torch.no_grad():
            for index, value in zip(batch, compute(batch).float().cpu(), strict=True):
                parts[index] = value
    return torch.stack([part for part in parts if part is not None])


_REFERENCE_TOKENS = 2048


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
        "attention": attention_implementation(model.config),
        "transformers": version("transformers"),
    }


def answers_identity(config: TrainConfig, identity: dict[str, Any], answers: int) -> dict[str, Any]:
    """Return what decides the log-probabilities of whole answers, ``answers`` of a row."""
    return {**identity, "answers": answers, "paraphrase": config.paraphrase, "max_length": config.max_length}


def reference_states(
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
        result = collect(len(rows), batches_within_tokens(lengths, _REFERENCE_TOKENS, "reference"), states)
        place = {sentence: index for index, sentence in enumerate(distinct)}
        return result[[place[premise] for premise in premises]]

    full = {**identity, "template": config.template, "max_seq_length": config.max_seq_length}
    name = "reference_states"
    return {name: cached_tensor(name, full, compute, write=PartialState().is_main_process)}


def reference_answers(
    config: TrainConfig, answers: AnswerRows, module: PromptEOL, identity: dict[str, Any]
) -> dict[str, Tensor]:
    """Return ``reference_log_probabilities`` of shape (triplets, answers)."""

    def compute() -> Tensor:
        def log_probabilities(indices: list[int]) -> Tensor:
            batch = {name: tensor.to(module.model.device) for name, tensor in answers(indices).items()}
            return answer_log_probabilities(module.model, batch).view(len(indices), -1)

        lengths = [len(str(prompt)) + max(len(str(answer)) for answer in ranked) for prompt, ranked in answers.rows]
        batches = batches_within_tokens(lengths, 4 * _REFERENCE_TOKENS, "reference")
        return collect(len(lengths), batches, log_probabilities)

    full = answers_identity(config, identity, answers.answers)
    return {REFERENCE: cached_tensor(REFERENCE, full, compute, write=PartialState().is_main_process)}
