"""Text as other programs write it: with a byte order mark, labels as floats, and half characters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny import make_tokenizer

from sempa_st.data.nli import load_nli
from sempa_st.data.passages import read_passages
from sempa_st.data.rows import ROW_SUFFIXES, read_rows
from sempa_st.data.sts import dev_pairs, read_pairs
from sempa_st.encoding import read_sentences
from sempa_st.errors import SempaError
from sempa_st.evaluation.generation_data import read_splits
from sempa_st.utils.files import is_text, read_json
from sempa_st.utils.options import load_yaml

pytestmark = pytest.mark.names_dtype

BOM = "\ufeff"
HALF = "\ud800"
LABELLED = {"A person plays.": 0, "He plays a guitar.": 1, "Nobody plays.": 2, "Left out": -1}


def write_rows(path: Path, rows: list[dict[str, Any]], *, bom: bool = False) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if path.suffix == ".json":
        text = json.dumps(rows)
    elif path.suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        text = "".join(",".join("" if cell is None else str(cell) for cell in line) + "\n" for line in lines)
    path.write_text(bom * BOM + text, encoding="utf-8")
    return path


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


@pytest.mark.parametrize("suffix", ROW_SUFFIXES)
@pytest.mark.parametrize(
    "written",
    [
        lambda number: float(number),
        lambda number: f"{number}.0",
        lambda number: f" {number}.0 ",
        lambda number: str(number),
        lambda number: None if number < 0 else float(number),
    ],
)
def test_labels_as_other_programs_write_them(tmp_path: Path, suffix: str, written: Callable[[int], Any]) -> None:
    rows = [{"premise": "A man plays.", "hypothesis": text, "label": written(n)} for text, n in LABELLED.items()]
    data = load_nli(str(write_rows(tmp_path / f"pairs{suffix}", rows)))
    assert [(t.entailed, t.neutral, t.contradicted) for t in data.triplets] == [tuple(LABELLED)[:3]]


@pytest.mark.parametrize("label", [0.5, 3, "3.0", "yes", True, [0], 10**400, float("inf"), "-2"])
def test_other_labels_are_refused_with_their_row(tmp_path: Path, label: Any) -> None:
    rows = [{"premise": "a", "hypothesis": text, "label": n} for text, n in LABELLED.items()]
    path = write_rows(tmp_path / "pairs.jsonl", [*rows, {"premise": "a", "hypothesis": "b", "label": label}])
    with pytest.raises(SempaError, match=r"labels other than entailment.*in row\(s\) 5\.|line 5 is not JSON"):
        load_nli(str(path))


def test_pairs_without_any_label_say_so(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", [{"premise": "a", "hypothesis": "b", "label": None}])
    with pytest.raises(SempaError, match="pairs without a label give none"):
        load_nli(str(path))


@pytest.mark.parametrize("half", [HALF, "A cat \udfff.", "ends in \ud83d"])
@pytest.mark.parametrize("place", ["sent0", "sent1", "hard_neg", "neutral"])
def test_half_a_character_makes_a_bad_row_of_training_data(tmp_path: Path, half: str, place: str) -> None:
    row = {"sent0": "a", "sent1": "b", "hard_neg": "c", "neutral": "d"}
    path = str(write_rows(tmp_path / "rows.jsonl", [row, {**row, place: half}, row]))
    with pytest.raises(SempaError, match=r"1 bad row.*half a character.*in row\(s\) 2\."):
        load_nli(path)
    data = load_nli(path, skip_bad_rows=True)
    assert (len(data.triplets), data.skipped) == (2, 1)


def test_half_a_character_makes_a_bad_pair(tmp_path: Path) -> None:
    row = {"sentence1": "a", "sentence2": "b", "score": 1}
    path = write_rows(tmp_path / "dev.jsonl", [row, {**row, "score": 2, "sentence2": HALF}])
    with pytest.raises(SempaError, match=r"row 2: expected two sentences and a number, got .*\\ud800"):
        dev_pairs(str(path), None)


@pytest.mark.parametrize("score", [float("inf"), float("-inf"), float("nan"), 10**400, "1e999", None])
def test_grades_are_finite(tmp_path: Path, score: Any) -> None:
    row = {"sentence1": "a", "sentence2": "b", "score": 1}
    path = write_rows(tmp_path / "dev.jsonl", [row, {**row, "score": score}])
    with pytest.raises(SempaError, match=r"row 2: expected two sentences and a number"):
        read_pairs([path])


def test_encode_names_the_row_or_skips_it(
    tmp_path: Path, adapter_folder: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"s": "A cat."}, {"s": HALF}, {"s": "A dog\x00 barks."}])
    command = ("encode", adapter_folder, path, "--output", tmp_path / "out.npy", "--dtype", "float32")
    code, _, err = run_cli(*command)
    assert (code, "half a character" in err, "in row(s) 2." in err) == (2, True, True), err
    code, _, err = run_cli(*command, "--skip-bad-rows")
    assert code == 0, err
    assert np.load(tmp_path / "out.npy").shape == (2, 32)
    assert np.isfinite(np.load(tmp_path / "out.npy")).all()


@pytest.mark.parametrize("value", ["", " \n", None, 3, HALF, "a" + HALF])
def test_what_is_no_text(value: Any) -> None:
    assert not is_text(value)
    assert is_text("a 😀 \x00")


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_deep_nesting_is_one_clear_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"deep{suffix}"
    path.write_text("[" * 100_000)
    with pytest.raises(SempaError, match=r"cannot be read as (json|JSON)"):
        read_rows(path)
