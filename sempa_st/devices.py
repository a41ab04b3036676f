"""Choice of device and floating-point type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sempa_st.errors import SempaError

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


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
    float16.

    Raises:
        SempaError: If ``dtype`` is none of :data:`DTYPES`.
    """
    import torch

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


def attention_arguments(config: dict[str, Any], device: str) -> dict[str, str]:
    """Return what to load a decoder with so that its attention is right on a device.

    CUDA's memory-efficient kernel gives wrong states under a mask for some numbers of keys (32 n + 1) where one
    key/value head is broadcast to all query heads, as in the small Gemma models (pytorch/pytorch issue 191937). These
    run eagerly.

    Args:
        config: Contents of the decoder's config.json.
        device: Where it will run.
    """
    text = config.get("text_config", config)
    one_head = text.get("num_key_value_heads") == 1 and text.get("num_attention_heads", 1) > 1
    return {"attn_implementation": "eager"} if one_head and device.startswith("cuda") else {}


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has matrix instructions for bfloat16."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
