"""Gemma's licence: the notice and the terms of use that go with every model derived from it."""

from __future__ import annotations

import shutil
from pathlib import Path

_GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n\n"
    "What is in this folder is, or is derived from, {base}, and may have been modified by fine-tuning.\n"
    "Use is restricted as the Gemma Prohibited Use Policy says: ai.google.dev/gemma/prohibited_use_policy\n"
)
TERMS_FILE = "GEMMA_TERMS.html"


def write_notice(folder: Path, origin: str, terms: Path) -> None:
    """Write Gemma's notice into ``folder``, and copy its terms of use if the file exists.

    Args:
        folder: Folder with a model derived from Gemma.
        origin: Model that it is derived from.
        terms: File with Gemma's terms of use.
    """
    (folder / "NOTICE").write_text(_GEMMA_NOTICE.format(base=origin), encoding="utf-8")
    if terms.is_file() and terms.parent != folder:
        shutil.copy(terms, folder)
