"""Preference training; needs the extra ``train``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sempa_st.errors import SempaError

if TYPE_CHECKING:
    from sempa_st.training.run import TrainResult, train

__all__ = ["TrainResult", "train"]


def __getattr__(name: str) -> Any:
    # On use: the command line reads the settings in this folder without the extra.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("trl") is None:
        raise SempaError("Training needs the trl package. Install it with: pip install 'sempa-st[train]'")
    from sempa_st.training import run

    return getattr(run, name)
