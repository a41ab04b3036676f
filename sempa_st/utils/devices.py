"""Choice of device and floating-point type, and memory."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from sempa_st.errors import SempaError

if TYPE_CHECKING:
    import torch

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
