"""Semantic preference alignment (SemPA): sentence embeddings from a generative LLM that keeps generating."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sempa_st.errors import SempaError

if TYPE_CHECKING:
    from sempa_st.analysis.run import analyze
    from sempa_st.encoding import encode_file
    from sempa_st.evaluation.significance import compare
    from sempa_st.evaluation.sts import evaluate
    from sempa_st.loading import load
    from sempa_st.training import TrainResult, train
    from sempa_st.training.config import TrainConfig

__version__ = "0.1.0"
__all__ = [
    "SempaError",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "analyze",
    "compare",
    "encode_file",
    "evaluate",
    "load",
    "train",
]
_HOMES = {
    "load": "loading",
    "train": "training",
    "TrainConfig": "training.config",
    "TrainResult": "training",
    "evaluate": "evaluation.sts",
    "compare": "evaluation.significance",
    "encode_file": "encoding",
    "analyze": "analysis.run",
}


def __getattr__(name: str) -> Any:
    # Each imports torch; `import sempa_st` does not.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sempa_st.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
