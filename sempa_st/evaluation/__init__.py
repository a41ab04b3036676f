"""Evaluation on MTEB's STS tasks and on lm-evaluation-harness's generation tasks; needs the extra ``eval``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sempa_st.evaluation.sts import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sempa_st.evaluation import sts

    return getattr(sts, name)
