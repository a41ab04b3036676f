from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sempa_st


@pytest.fixture(scope="package")
def model(adapter_folder: Path) -> Any:
    return sempa_st.load(adapter_folder, dtype="float32", device="cpu")
