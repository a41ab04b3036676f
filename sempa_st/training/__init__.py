"""Preference training; needs the extra ``train``."""

from __future__ import annotations

from importlib.util import find_spec

from sempa_st.errors import SempaError

if find_spec("trl") is None:
    raise SempaError("Training needs the trl package. Install it with: pip install 'sempa-st[train]'")
