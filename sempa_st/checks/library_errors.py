"""Turn the exceptions of libraries on unreadable model folders into errors that tell the user what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sempa_st.checks.inspection import CONFIG, settings_if_any
from sempa_st.errors import SempaError, first_line, is_panic

_CONFIGS = (CONFIG, "tokenizer_config.json")
_NEEDS_REMOTE_CODE = re.compile(
    "trust_remote_code|does not recognize this architecture|Unrecognized (model|configuration|processing class)|"
    "Tokenizer class .* does not exist"
)
"""Messages of transformers for a model or tokenizer that it does not implement, or would run remote code for."""
_MAX_REASON = 1000
"""Characters shown of a library's message; some messages quote whole files."""


@contextmanager
def readable(folder: str | Path, what: str = "model", base: Path | None = None) -> Iterator[None]:
    """Turn any exception that a library raises while it reads a folder into a :class:`SempaError`.

    Out-of-memory errors pass through unchanged.

    Args:
        folder: Local folder that is read.
        what: Part of the folder that is read, for the message.
        base: Folder of the base model of an adapter, if it is read as well.

    Raises:
        SempaError: If the files are missing, incomplete or unsupported.
    """
    try:
        with _panics():
            yield
    except SempaError:
        raise
    except Exception as error:  # libraries raise many unrelated types for missing, incomplete or unsupported files
        import torch

        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        needs_code = isinstance(error, ValueError) and _NEEDS_REMOTE_CODE.search(str(error))
        if needs_code and any(_has_remote_code(Path(path)) for path in (folder, base) if path):
            # The library's own message suggests trust_remote_code, which this package does not offer.
            raise SempaError(
                f"The {what} in {folder} cannot be read ({type(error).__name__}): the folder, or its base, brings code "
                "of its own (auto_map), which is never run. Expected a model that transformers itself knows."
            ) from error
        if isinstance(error, ImportError):
            method = quantisation(folder)
            quantised = f"Its weights are quantised ({method}). " if method else ""
            raise SempaError(
                f"The {what} in {folder} needs a package that is not installed. {quantised}{first_line(error)} Install "
                "it, or use a copy with unquantised weights."
            ) from error
        reason = f"{type(error).__name__}: {error!s:.{_MAX_REASON}}"
        raise SempaError(
            f"The {what} in {folder} cannot be read ({reason}). Restore or download the folder again."
        ) from error


@contextmanager
def _panics() -> Iterator[None]:
    """Turn a panic of a library in Rust, such as tokenizers, into an exception, which it is not."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise RuntimeError(str(error)) from error


def quantisation(folder: str | Path) -> str | None:
    """Return the quantisation method of the weights in a folder, or None if they are not quantised."""
    settings = (settings_if_any(Path(folder), CONFIG) or {}).get("quantization_config")
    return str(settings.get("quant_method") or "unknown method") if isinstance(settings, dict) else None


def _has_remote_code(folder: Path) -> bool:
    return any((settings_if_any(folder, name) or {}).get("auto_map") for name in _CONFIGS)
