"""Run the reference model over the data, once before training, and cache the results on disk."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sempa_st.data.nli import NliData
from sempa_st.errors import SempaError
from sempa_st.forward.batching import batches_within_tokens
from sempa_st.model.chat_formats import chat_template_sha256
from sempa_st.model.patching import attention_implementation
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.token_rows import pad_rows
from sempa_st.training.batches import AnswerInputs
from sempa_st.training.config import TrainConfig
from sempa_st.training.forward import answer_log_probabilities
from sempa_st.utils.files import atomic_file, cache_folder, json_digest
from sempa_st.utils.leftovers import clear_leftovers, unwritable_reason

REFERENCE = "reference_log_probabilities"
"""Name of the log-probabilities of whole answers, best first, of shape (triplets, num_answers)."""
_LOGITS = 2
"""Which way log-probabilities are computed; another one makes earlier results another model's."""
_MAX_TOKENS = 2048
"""Number of tokens in a batch of the reference model, padding included."""
_MAX_CHARACTERS = 4 * _MAX_TOKENS


def cached_tensor(name: str, identity: dict[str, Any], compute: Callable[[], Tensor], *, write: bool) -> Tensor:
    """Return ``compute()``, or its cached result for the same ``identity``.

    The cache is optional: if it cannot be read or written, the result is computed.

    Args:
        name: Name of the tensor in the cache file.
        identity: Everything that determines the result, such as base, data, template and dtype, as JSON values.
        compute: Runs the reference model; called only if nothing is cached.
        write: Whether this process writes the result to the cache.
    """
    path = cache_folder() / "reference" / f"{json_digest(identity)[:32]}.safetensors"
    with suppress(SafetensorError, OSError, KeyError):  # missing, truncated, not readable, or not our file
        if (cached := load_file(path)[name]).isfinite().all():
            return cached
    tensor = compute()
    if not tensor.isfinite().all():
        raise SempaError(
            f"The reference model gives infinite or NaN values ({name}). Many models overflow in float16: choose "
            "--dtype bfloat16 or float32. With those, its files are damaged."
        )
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
    """Warn once that the cache cannot be written."""
    print(
        f"The cache folder {folder} cannot be written ({reason}). The run continues without it, and the next one runs "
        "the base model over the data again. Set SEMPA_CACHE_DIR to use another folder.",
        file=sys.stderr,
    )


def collect(batches: Iterator[list[int]], compute: Callable[[list[int]], Tensor]) -> Tensor:
    """Return the float32 results of all examples, ordered by index.

    Args:
        batches: Indices of the examples in each batch.
        compute: Returns one result for each index of a batch.
    """
    results: dict[int, Tensor] = {}
    for batch in batches:
        with torch.no_grad():
            results |= zip(batch, compute(batch).float().cpu(), strict=True)
    return torch.stack([results[index] for index in sorted(results)])


def reference_identity(data: NliData, model: PreTrainedModel, dtype: torch.dtype, digest: str) -> dict[str, Any]:
    """Return what determines every result of the reference model on the data.

    Args:
        data: Triplets.
        model: The reference model.
        dtype: Dtype of its computation.
        digest: Digest of the reference model, its adapter included.
    """
    return {
        "base": digest,
        "data": data.fingerprint(),
        "dtype": str(dtype),
        "attention": attention_implementation(model.config),
        "transformers": version("transformers"),
        "logits": _LOGITS,
    }


def answers_identity(
    config: TrainConfig, identity: dict[str, Any], tokenizer: PreTrainedTokenizerBase, num_answers: int
) -> dict[str, Any]:
    """Return what determines the log-probabilities of ``num_answers`` whole answers to each prompt.

    Args:
        config: Training settings.
        identity: What determines every result; see :func:`reference_identity`.
        tokenizer: The base model's tokenizer, with the chat template of the run's chat format.
        num_answers: Number of answers to each prompt.
    """
    return {
        **identity,
        "answers": num_answers,
        "paraphrase": config.paraphrase,
        "chat_template": chat_template_sha256(tokenizer),
        "max_length": config.max_length,
    }


def reference_states(
    config: TrainConfig, data: NliData, module: PromptEOL, identity: dict[str, Any]
) -> dict[str, Tensor]:
    """Return ``reference_states`` of the premises, of shape (triplets, hidden)."""

    def compute() -> Tensor:
        premises = [triplet.premise for triplet in data.triplets]
        distinct = list(dict.fromkeys(premises))
        token_ids = module.token_rows(distinct)

        def states(batch: list[int]) -> Tensor:
            padded = pad_rows(module.tokenizer, [token_ids[index] for index in batch])
            features = module({name: tensor.to(module.model.device) for name, tensor in padded.items()})
            return features["sentence_embedding"]

        lengths = [len(sequence) for sequence in token_ids]
        result = collect(batches_within_tokens(lengths, _MAX_TOKENS, "reference"), states)
        index_of = {sentence: index for index, sentence in enumerate(distinct)}
        return result[[index_of[premise] for premise in premises]]

    full = {**identity, "template": config.template, "max_seq_length": config.max_seq_length}
    name = "reference_states"
    return {name: cached_tensor(name, full, compute, write=PartialState().is_main_process)}


def reference_answers(
    config: TrainConfig, answers: AnswerInputs, module: PromptEOL, identity: dict[str, Any]
) -> dict[str, Tensor]:
    """Return ``reference_log_probabilities`` of the answers, of shape (triplets, num_answers)."""

    def compute() -> Tensor:
        def log_probabilities(indices: list[int]) -> Tensor:
            batch = {name: tensor.to(module.model.device) for name, tensor in answers(indices).items()}
            return answer_log_probabilities(module.causal_lm, batch).view(len(indices), -1)

        lengths = [len(str(prompt)) + max(len(str(answer)) for answer in ranked) for prompt, ranked in answers.examples]
        batches = batches_within_tokens(lengths, _MAX_CHARACTERS, "reference")
        return collect(batches, log_probabilities)

    full = answers_identity(config, identity, answers.tokenizer, answers.num_answers)
    return {REFERENCE: cached_tensor(REFERENCE, full, compute, write=PartialState().is_main_process)}
