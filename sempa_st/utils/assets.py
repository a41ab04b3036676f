"""Data files of the package: samples, trained adapters and the model card template."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

PACKAGE = Path(str(resources.files("sempa_st")))


def asset_path(name: str) -> Path:
    """Return the path of a file or folder in ``assets``, such as ``nli_sample.jsonl`` or ``models``."""
    return PACKAGE / "assets" / name
