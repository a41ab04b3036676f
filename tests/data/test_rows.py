from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.rows import BOM, LONE_SURROGATE, write_rows
from helpers.tiny import make_tokenizer

from sempa_st.data.nli import load_nli
from sempa_st.data.passages import read_passages
from sempa_st.data.rows import ROW_SUFFIXES, find_columns, read_rows
from sempa_st.encoding import read_sentences
from sempa_st.errors import SempaError
from sempa_st.evaluation.generation_data import read_splits
from sempa_st.utils.files import is_text, read_json
from sempa_st.utils.options import load_yaml

pytestmark = pytest.mark.names_dtype


@pytest.mark.parametrize("suffix", sorted(set(ROW_SUFFIXES) - {".parquet"}))
def test_a_byte_order_mark_is_no_part_of_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{"sent0": "First", "sent1": "Second", "hard_neg": "Third"}]
    path = write_rows(tmp_path / f"rows{suffix}", rows, bom=True)
    assert read_rows(path) == rows
    assert load_nli(str(path)).triplets[0].premise == "First"
    assert [text for _, text in read_sentences(path, column="sent0")] == ["First"]


def test_a_byte_order_mark_is_no_part_of_text(tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text(BOM + "First\nSecond\n", encoding="utf-8")
    assert [text for _, text in read_sentences(lines)] == ["First", "Second"]
    settings = tmp_path / "settings.yaml"
    settings.write_text(BOM + "beta: 0.1\n", encoding="utf-8")
    assert load_yaml(settings) == {"beta": 0.1}
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "wikitext2.test.txt").write_text(BOM + " = Cats = \n\nA cat.\n", encoding="utf-8")
    assert [row["page"].strip() for row in read_splits(tmp_path, "wikitext")["test"]] == ["= Cats = \n\nA cat."]
    (tmp_path / "settings.json").write_text(BOM + "{}", encoding="utf-8")
    assert read_json(tmp_path / "settings.json") == {}
    rows = []
    for mark in ("", BOM):
        passages = tmp_path / "passages.txt"
        passages.write_text(mark + "A man plays a guitar. " * 60, encoding="utf-8")
        rows.append(read_passages(str(passages), make_tokenizer()).token_ids)
    assert rows[0] == rows[1]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_deep_nesting_is_one_clear_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"deep{suffix}"
    path.write_text("[" * 100_000)
    with pytest.raises(SempaError, match=r"cannot be read as (json|JSON)"):
        read_rows(path)


@pytest.mark.parametrize("value", ["", " \n", None, 3, LONE_SURROGATE, "a" + LONE_SURROGATE])
def test_what_is_no_text(value: Any) -> None:
    assert not is_text(value)
    assert is_text("a 😀 \x00")


def test_find_columns_takes_the_first_layout_that_fits() -> None:
    rows = [{"a": 1, "b": 2, "c": 3}]
    assert find_columns(rows, [("x", "a"), ("b", "a"), ("c",)], "rows.csv") == ("b", "a")
    with pytest.raises(SempaError, match=r"^rows.csv has .* \(a, b, c\)\. Expected \(x, a\) or \(y\)\. Rename"):
        find_columns(rows, [("x", "a"), ("y",)], "rows.csv")
    with pytest.raises(SempaError, match=r"has the columns \(none\)\. Expected \(x\)"):
        find_columns([], [("x",)], "rows.csv")
