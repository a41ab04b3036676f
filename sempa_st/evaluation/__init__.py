"""Evaluation on MTEB's tasks; needs the extra ``eval``."""

from __future__ import annotations

from importlib.util import find_spec

from sempa_st.errors import SempaError

if find_spec("mteb") is None:
    raise SempaError("Evaluation needs the mteb package. Install it with: pip install 'sempa-st[eval]'")
