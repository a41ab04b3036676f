"""Semantic preference alignment (SemPA): sentence embeddings from a generative LLM that keeps generating."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sempa_st.errors import SempaError

if TYPE_CHECKING:
    from sempa_st.loading import load

__version__ = "0.1.0"
__all__ = ["SempaError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Loading imports torch; `import sempa_st` does not.
    if name == "load":
        from sempa_st.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
