"""Preference training; needs the extra ``train``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sempa_st.utils.extras import require

if TYPE_CHECKING:
    from sempa_st.training.estimate import estimate_memory
    from sempa_st.training.run import TrainResult, train

__all__ = ["TrainResult", "estimate_memory", "train"]


def __getattr__(name: str) -> Any:
    # On use: the command line reads the settings in this folder without the extra.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("trl", "datasets", extra="train", purpose="Training")
    from sempa_st.training import estimate, run

    return getattr(estimate if name == "estimate_memory" else run, name)
