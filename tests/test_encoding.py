from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.rows import LONE_SURROGATE, write_rows

pytestmark = pytest.mark.names_dtype


def test_encode_names_the_row_or_skips_it(
    tmp_path: Path, adapter_folder: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"s": "A cat."}, {"s": LONE_SURROGATE}, {"s": "A dog\x00 barks."}])
    command = ("encode", adapter_folder, path, "--output", tmp_path / "out.npy", "--dtype", "float32")
    code, _, err = run_cli(*command)
    assert (code, "lone surrogate" in err, "in row(s) 2." in err) == (2, True, True), err
    code, _, err = run_cli(*command, "--skip-bad-rows")
    assert code == 0, err
    assert np.load(tmp_path / "out.npy").shape == (2, 32)
    assert np.isfinite(np.load(tmp_path / "out.npy")).all()
