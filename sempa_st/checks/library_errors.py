"""What a library raises on a folder that it cannot read, turned into an error that a person can act on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sempa_st.checks.inspection import CONFIG, settings_if_any
from sempa_st.errors import SempaError

_ASKS_FOR_CODE = re.compile(
    "trust_remote_code|does not recognize this architecture|Unrecognized (model|configuration|processing class)|"
    "Tokenizer class .* does not exist"
)
"""How transformers says that it does not know a model or tokenizer, or would run the folder's code for it."""
_LONGEST_REASON = 1000
"""Characters of a library's message that are shown: some quote whole files."""


@contextmanager
def readable(folder: str | Path, what: str = "model", base: Path | None = None) -> Iterator[None]:
    """Turn whatever a library raises on a folder into a :class:`SempaError`, but for a lack of memory.

    Args:
        folder: Local folder that is read.
        what: What of it is read, for the message.
        base: Folder of the base that lies under an adapter, if it is read too.
    """
    try:
        yield
    except SempaError:
        raise
    except Exception as error:  # of many types for one cause: the files are not there, not whole, or not fit
        import torch

        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        asks = isinstance(error, ValueError) and _ASKS_FOR_CODE.search(str(error))
        if asks and any(_brings_code(Path(path)) for path in (folder, base) if path):
            # The library's own message asks for a flag that this package does not have.
            raise SempaError(
                f"The {what} in {folder} cannot be read ({type(error).__name__}): the folder, or its base, brings code "
                "of its own (auto_map), which is never run. Expected a model that transformers itself knows."
            ) from error
        if isinstance(error, ImportError):
            method = quantisation(folder)
            needs = f"Its weights are quantised ({method}). " if method else ""
            raise SempaError(
                f"The {what} in {folder} needs a package that is not installed. {needs}{_first_line(error)} Install "
                "it, or take a copy with full weights."
            ) from error
        reason = f"{type(error).__name__}: {error!s:.{_LONGEST_REASON}}"
        raise SempaError(
            f"The {what} in {folder} cannot be read ({reason}). Restore or download the folder again."
        ) from error


def quantisation(folder: str | Path) -> str | None:
    """Return the method by which the weights in a folder are quantised, if they are."""
    settings = (settings_if_any(Path(folder), CONFIG) or {}).get("quantization_config")
    return str(settings.get("quant_method") or "unknown method") if isinstance(settings, dict) else None


def _brings_code(folder: Path) -> bool:
    return any((settings_if_any(folder, name) or {}).get("auto_map") for name in (CONFIG, "tokenizer_config.json"))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
