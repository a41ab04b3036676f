"""Choice of device and floating-point type, and memory."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from sempa_st.errors import SempaError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

DTYPES = ("auto", "float32", "bfloat16", "float16")
AUTO_DTYPE_VARIABLE = "SEMPA_AUTO_DTYPE"
"""Environment variable with the type that ``auto`` means on a CPU, whatever the processor has."""


def pick_device(device: str | None = None) -> str:
    """Return ``device``, or the best one there is (CUDA, then Apple's MPS, then the CPU).

    Raises:
        SempaError: If ``device`` is not to be had here.
    """
    import torch

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise SempaError(
                f"The device {device!r} cannot be used: {error}. Leave out --device, or give cpu."
            ) from error
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """Turn one of :data:`DTYPES` into a torch type.

    ``auto`` is bfloat16 on an accelerator and on a CPU that multiplies bfloat16 in hardware (AMX or AVX512-BF16), and
    float32 on any other CPU, where bfloat16 is emulated and several times slower; an accelerator without it gets
    float16. The environment variable ``SEMPA_AUTO_DTYPE`` decides for all CPUs.

    Raises:
        SempaError: If ``dtype``, or the environment variable, is none of :data:`DTYPES`.
    """
    import torch

    if dtype == "auto" and device.startswith("cpu"):
        dtype = os.environ.get(AUTO_DTYPE_VARIABLE) or dtype
    if dtype not in DTYPES:
        raise SempaError(f"Unknown dtype {dtype!r}. Expected one of: {', '.join(DTYPES)}.")
    if dtype != "auto":
        chosen = getattr(torch, dtype)
        assert isinstance(chosen, torch.dtype)
        return chosen
    if device.startswith("cpu"):
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    if device.startswith("cuda") and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def avoid_broken_sdpa(model: nn.Module, device: str) -> None:
    """Let decoders run eagerly where a device's faster attention would be wrong.

    CUDA's memory-efficient kernel gives wrong states under a mask for some numbers of keys (32 n + 1) where one
    key/value head is broadcast to all query heads, as in the small Gemma models (pytorch/pytorch issue 191937).

    Args:
        model: Anything with models of transformers in it.
        device: Where it will run.
    """
    from transformers import PreTrainedModel

    if not device.startswith("cuda"):
        return
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation == "sdpa" and _has_one_head(part):
            part.set_attn_implementation("eager")


def _has_one_head(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    return getattr(config, "num_key_value_heads", None) == 1 or bool(getattr(config, "multi_query", False))


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has matrix instructions for bfloat16."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def trim_malloc() -> None:
    """Return what was freed to the system, where the C library can (glibc); it would be kept for the process's end.

    Reading a large tokenizer leaves more of it behind than the tokenizer itself takes.
    """
    import ctypes

    if sys.platform.startswith("linux") and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
