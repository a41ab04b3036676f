"""Weights as they came from the disk: none missing, none left over, none that is no number, or an error says which."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sempa_st.checks.library_errors import readable
from sempa_st.errors import SempaError

_TOLD = 3
"""Tensors that an error names."""
_PER_BYTE = 4
"""Weights of a model for a byte of its files, at most: two of four bits, and a head or a decoder may be missing."""
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_POOLER = re.compile(r"(^|\.)pooler\.")
"""A head on an encoder that no reading of its states runs; a checkpoint of another head lacks it."""
_BUFFER = re.compile(
    r"(^|\.)(attn\.(attention\.)?(masked_)?bias|attention\.(masked_)?bias|causal_mask|(rotary_emb\.)?inv_freq|position_ids)$"
)
"""Masks and positions that old versions of transformers saved with the weights, and that models now compute."""


def loaded_with_info(kind: Any, folder: str | Path, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """Return a model and what :func:`check_whole` needs to know of it.

    Args:
        kind: Auto class of transformers.
        folder: Local folder with safetensors.
        **arguments: More arguments of ``from_pretrained``.

    Raises:
        SempaError: If its files cannot be read, or ``config.json`` asks for memory that they do not fill.
    """
    with readable(folder):
        if arguments.get("device_map") != "meta":
            arguments["config"] = _fitting_config(kind, Path(folder))
        model, info = kind.from_pretrained(
            str(folder),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **arguments,
        )
    return model, info


def _fitting_config(kind: Any, folder: Path) -> Any:
    """Return the settings of a model whose weights are not much more than its files hold.

    transformers takes the memory for all weights before it looks at the sizes in the files.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    with torch.device("meta"):
        wanted = sum(
            parameter.numel() for parameter in kind.from_config(deepcopy(config), trust_remote_code=False).parameters()
        )
    # In bytes, since quantised weights lie there packed, of four bits at least.
    held = _PER_BYTE * sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if wanted > held:
        raise SempaError(
            f"The model in {folder} cannot be read: its config.json describes one that has "
            f"{wanted:,} weights, and the .safetensors files have room for {held:,} at most. Restore or download the "
            "folder again."
        )
    return config


class MissingHead(nn.Module):
    """Stands where a checkpoint has no LM head: what needs one is told so, and nobody gets random logits.

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
    """Return the error for a model without an LM head that is to do more than embed."""
    return SempaError(
        f"The weights in {folder} hold the layers of a decoder and no LM head, as sentence-transformers saves them, so "
        "this model embeds and does not generate. Take the folder that it was made from; sempa copy FOLDER DIR makes "
        "whole copies."
    )


def check_whole(model: Any, info: Mapping[str, Any], folder: str | Path, *, head: bool = True) -> None:
    """Refuse a checkpoint that does not hold just what the model has: transformers fills it up with random weights.

    Args:
        model: Model as loaded.
        info: What ``from_pretrained(..., output_loading_info=True)`` returned beside it, with sizes ignored.
        folder: Folder of the checkpoint.
        head: Whether an LM head must be there; where it need not, a missing one becomes a :class:`MissingHead`.

    Raises:
        SempaError: If a tensor is missing, of another size, or left over; the message names the first few.
    """
    sizes = {_name(entry) for entry in info["mismatched_keys"]}
    missing = {name for name in info["missing_keys"] if not _POOLER.search(name)} - sizes
    if model.config.is_encoder_decoder:  # an encoder is read alone
        missing = {name for name in missing if name.startswith(("encoder.", "shared."))}
    without = _of_head(model) & missing
    if without and not missing - without and not sizes:
        if head:
            raise missing_head(folder)
        model.set_output_embeddings(MissingHead(folder))
        missing = set()
    left_over = _of_layers(model, info["unexpected_keys"])
    faults = {"missing": missing, "of another size": sizes, "left over": left_over}
    told = [f"{len(names)} {fault} ({_first(names)})" for fault, names in faults.items() if names]
    if told:
        raise SempaError(
            f"The weights in {folder} are not those of the model that its config.json describes "
            f"({type(model).__name__}); tensors: {'; '.join(told)}. Restore or download the folder again."
        )


def _name(entry: Any) -> str:
    return entry if isinstance(entry, str) else str(entry[0])


def _first(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:_TOLD]) + (", ..." if len(ordered) > _TOLD else "")


def _of_head(model: Any) -> set[str]:
    head = model.get_output_embeddings()
    found = [name for name, module in model.named_modules() if module is head and head is not None]
    return {f"{name}.{own}" for name in found for own in ("weight", "bias")}


def _of_layers(model: Any, unexpected: Iterable[str]) -> set[str]:
    """Return those tensors that belong to the layers; other heads and towers may lie in a checkpoint beside them."""
    layers: nn.Module = model.base_model
    own = {name for name, _ in layers.named_children()} | {model.base_model_prefix}
    ignored = (_POOLER, _BUFFER)
    return {
        name
        for name in unexpected
        if name.partition(".")[0] in own and not any(pattern.search(name) for pattern in ignored)
    }


def check_finite_weights(model: nn.Module, folder: str | Path) -> None:
    """Raise :class:`SempaError` if a weight is infinite or no number; the message names its tensor."""
    for name, tensor in model.named_parameters():
        # The sum tells at the price of reading; only an odd one is looked at in full.
        if tensor.dtype not in _FLOATS or tensor.sum(dtype=torch.float32).isfinite():
            continue
        if bad := int((~tensor.isfinite()).sum()):
            raise SempaError(
                f"The weights in {folder} hold {bad} value(s) that are infinite or no number, in the tensor {name} "
                f"(read as {str(tensor.dtype).removeprefix('torch.')}). Restore or download the folder again; if it is "
                "float16 that cannot hold them, choose --dtype float32 or bfloat16."
            )
