"""Evaluation on MTEB's tasks and by lm-evaluation-harness; needs the extra ``eval``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sempa_st.errors import SempaError

if TYPE_CHECKING:
    from sempa_st.evaluation.sts import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("mteb") is None:
        raise SempaError("Evaluation needs the mteb package. Install it with: pip install 'sempa-st[eval]'")
    from sempa_st.evaluation import sts

    return getattr(sts, name)
