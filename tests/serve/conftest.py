"""Fixtures of the server's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.server import activated_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    return activated_adapter(tmp_path_factory.mktemp("models") / "tiny-activated", tiny_base)
