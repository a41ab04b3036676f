"""Check loaded weights: no tensor may be missing, unexpected or of the wrong size, and all values must be finite."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sempa_st.checks.library_errors import readable
from sempa_st.errors import SempaError, list_first

_MAX_WEIGHTS_PER_BYTE = 4
"""Two for 4-bit weights, doubled since the LM head, or the decoder of an encoder-decoder, may be missing."""
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_POOLER = re.compile(r"(^|\.)pooler\.")
"""The pooling head of an encoder, which is not used here; checkpoints with another head lack it."""
_BUFFER = re.compile(
    r"(^|\.)(attn\.(attention\.)?(masked_)?bias|attention\.(masked_)?bias|causal_mask|(rotary_emb\.)?inv_freq|position_ids)$"
)
"""Masks and positions that old versions of transformers saved with the weights, and that models now compute."""


def loaded_with_info(kind: Any, folder: str | Path, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """Load a model and return it with its loading info, for :func:`check_whole`.

    Args:
        kind: Auto class of transformers.
        folder: Local folder with safetensors.
        **arguments: Further arguments of ``from_pretrained``.

    Raises:
        SempaError: If the files cannot be read, or ``config.json`` describes a much larger model than they contain.
    """
    with readable(folder):
        if arguments.get("device_map") != "meta":
            arguments["config"] = _config_matching_files(kind, Path(folder))
        model, info = kind.from_pretrained(
            str(folder),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **arguments,
        )
    return model, info


def _config_matching_files(kind: Any, folder: Path) -> Any:
    """Return the config of a model, after a check that its weights can come from the files in the folder.

    transformers allocates memory for all weights before it reads the sizes in the files.
    """
    config = read_config(folder)
    with torch.device("meta"):
        expected = sum(
            parameter.numel() for parameter in kind.from_config(deepcopy(config), trust_remote_code=False).parameters()
        )
    # Counted in bytes, since the tensors of quantised weights are packed.
    limit = _MAX_WEIGHTS_PER_BYTE * sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if expected > limit:
        raise SempaError(
            f"The model in {folder} cannot be read: its config.json describes one that has {expected:,} weights, and "
            f"the .safetensors files have room for {limit:,} at most. Restore or download the folder again."
        )
    return config


def read_config(folder: Path) -> Any:
    """Return the transformers config of the model in ``folder``.

    Raises:
        SempaError: If it is invalid, or has settings of a text decoder inside that its model type does not read.
    """
    from transformers import AutoConfig, PreTrainedConfig

    with readable(folder):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        inner = config.get_text_config()
    if not isinstance(inner, PreTrainedConfig):
        raise SempaError(
            f"The model in {folder} cannot be read: its config.json has settings of a text model inside "
            f"({inner!r:.80}), and the type {config.model_type} has none there. Restore or download the folder again."
        )
    return config


class MissingHead(nn.Module):
    """Placeholder for an LM head that the checkpoint lacks; it raises an error instead of returning random logits.

    Args:
        folder: Folder of the checkpoint.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = str(folder)

    def forward(self, states: Tensor) -> Tensor:
        """Raise :class:`SempaError`."""
        raise missing_head(self.folder)


def missing_head(folder: str | Path) -> SempaError:
    """Return the error for a model without an LM head that is used for more than embedding."""
    return SempaError(
        f"The weights in {folder} hold the layers of a decoder and no LM head, as sentence-transformers saves them, so "
        "this model can embed but not generate. Use the folder that it was made from; sempa copy FOLDER DIR makes "
        "complete copies."
    )


def check_whole(model: Any, info: Mapping[str, Any], folder: str | Path, *, head: bool = True) -> None:
    """Check that a checkpoint contains exactly the model's weights: transformers initialises missing ones randomly.

    Args:
        model: Loaded model.
        info: Loading info from :func:`loaded_with_info`.
        folder: Folder of the checkpoint.
        head: Whether an LM head is required. If not, a missing one is replaced by a :class:`MissingHead`.

    Raises:
        SempaError: If a tensor is missing, of another size, or left over; the message names the first few.
    """
    sizes = {entry if isinstance(entry, str) else str(entry[0]) for entry in info["mismatched_keys"]}
    missing = {name for name in info["missing_keys"] if not _POOLER.search(name)} - sizes
    if model.config.is_encoder_decoder:  # only the encoder is used
        missing = {name for name in missing if name.startswith(("encoder.", "shared."))}
    head_missing = _head_tensors(model) & missing
    if head_missing and not missing - head_missing and not sizes:
        if head:
            raise missing_head(folder)
        model.set_output_embeddings(MissingHead(folder))
        missing = set()
    left_over = _layer_tensors(model, info["unexpected_keys"])
    faults = {"missing": missing, "of another size": sizes, "left over": left_over}
    shown = [f"{len(names)} {fault} ({list_first(sorted(names), 3)})" for fault, names in faults.items() if names]
    if shown:
        raise SempaError(
            f"The weights in {folder} are not those of the model that its config.json describes "
            f"({type(model).__name__}); tensors: {'; '.join(shown)}. Restore or download the folder again."
        )


def _head_tensors(model: Any) -> set[str]:
    """Return the names of the LM head's tensors."""
    head = model.get_output_embeddings()
    modules = [name for name, module in model.named_modules() if module is head and head is not None]
    return {f"{name}.{tensor}" for name in modules for tensor in ("weight", "bias")}


def _layer_tensors(model: Any, unexpected: Iterable[str]) -> set[str]:
    """Return the unexpected tensors that belong to the base model; other heads and towers are ignored."""
    base: nn.Module = model.base_model
    prefixes = {name for name, _ in base.named_children()} | {model.base_model_prefix}
    ignored = (_POOLER, _BUFFER)
    return {
        name
        for name in unexpected
        if name.partition(".")[0] in prefixes and not any(pattern.search(name) for pattern in ignored)
    }


@dataclass(frozen=True)
class BadWeight:
    """A tensor with infinite or NaN values.

    Attributes:
        name: Name in the model.
        count: Number of such values.
        dtype: Type of the tensor.
    """

    name: str
    count: int
    dtype: torch.dtype


def bad_weights(model: nn.Module) -> Iterator[BadWeight]:
    """Yield the parameters of a model that hold infinite or NaN values."""
    for name, tensor in model.named_parameters():
        # The sum is a cheap test: it is finite for all usual tensors.
        if tensor.dtype not in _FLOATS or tensor.sum(dtype=torch.float32).isfinite():
            continue
        if count := int((~tensor.isfinite()).sum()):
            yield BadWeight(name, count, tensor.dtype)


def check_finite_weights(model: nn.Module, folder: str | Path) -> None:
    """Raise :class:`SempaError` if a weight is infinite or NaN; the message names its tensor."""
    for found in bad_weights(model):
        raise SempaError(
            f"The weights in {folder} contain {found.count} value(s) that are infinite or NaN, in the tensor "
            f"{found.name} (read as {str(found.dtype).removeprefix('torch.')}). Restore or download the folder again; "
            "if the values overflow in float16, choose --dtype float32 or bfloat16."
        )
