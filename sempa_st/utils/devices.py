"""Choose the device and the floating-point type, and return freed memory to the system."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from sempa_st.errors import SempaError, check_known

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
AUTO_DTYPE_VARIABLE = "SEMPA_AUTO_DTYPE"
"""Environment variable that sets what ``auto`` means on a CPU."""


def pick_device(device: str | None = None) -> str:
    """Return ``device``, or the best available one (CUDA, then Apple's MPS, then the CPU).

    Raises:
        SempaError: If ``device`` is not available.
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
    """Convert one of :data:`DTYPES` to a torch dtype.

    ``auto`` resolves to:

    - bfloat16 on an accelerator, or float16 if the accelerator does not support bfloat16;
    - bfloat16 on a CPU with hardware support for it (AMX or AVX512-BF16);
    - float32 on any other CPU, where bfloat16 is emulated and several times slower.

    The environment variable ``SEMPA_AUTO_DTYPE`` overrides ``auto`` on a CPU.

    Raises:
        SempaError: If ``dtype``, or the environment variable, is not one of :data:`DTYPES`.
    """
    import torch

    if dtype == "auto" and device.startswith("cpu"):
        dtype = os.environ.get(AUTO_DTYPE_VARIABLE) or dtype
    check_known(dtype, DTYPES, "dtype")
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.startswith("cpu"):
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    if device.startswith("cuda") and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def cpu_has_bfloat16() -> bool:
    """Return whether this CPU has matrix instructions for bfloat16."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def trim_malloc() -> None:
    """Return freed memory to the operating system (glibc only; elsewhere do nothing).

    glibc otherwise keeps it until the process ends. Loading a large tokenizer frees more memory than the tokenizer
    itself occupies.
    """
    import ctypes

    if sys.platform.startswith("linux") and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
