from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.rows import LONE_SURROGATE, write_rows

from sempa_st.data.sts import dev_pairs, read_pairs
from sempa_st.errors import SempaError

pytestmark = pytest.mark.names_dtype


def test_half_a_character_makes_a_bad_pair(tmp_path: Path) -> None:
    row = {"sentence1": "a", "sentence2": "b", "score": 1}
    path = write_rows(tmp_path / "dev.jsonl", [row, {**row, "score": 2, "sentence2": LONE_SURROGATE}])
    with pytest.raises(SempaError, match=r"row 2: expected two sentences and a number, got .*\\ud800"):
        dev_pairs(str(path), None)


@pytest.mark.parametrize("score", [float("inf"), float("-inf"), float("nan"), 10**400, "1e999", None])
def test_grades_are_finite(tmp_path: Path, score: Any) -> None:
    row = {"sentence1": "a", "sentence2": "b", "score": 1}
    path = write_rows(tmp_path / "dev.jsonl", [row, {**row, "score": score}])
    with pytest.raises(SempaError, match=r"row 2: expected two sentences and a number"):
        read_pairs([path])
