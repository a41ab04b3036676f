"""``sempa table``: the scores of ``sempa evaluate``, finished ones kept, in three files beside the paper's."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import save_sts

import sempa_st
from sempa_st.data.sts import STS_TASKS
from sempa_st.evaluation import table
from sempa_st.evaluation.sts import load_cells, score_cells
from sempa_st.evaluation.table import COLUMNS, System, published, score_systems
from sempa_st.utils.files import locked

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sts(tmp_path_factory.mktemp("data"))


def test_the_table_holds_what_evaluate_finds(
    run_cli: Cli, tiny_base: Path, adapter_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    code, out, err = run_cli(
        "table", "--base", tiny_base, "--methods", "mean", "prompteol:layer=-2", "--models", adapter_folder,
        "--data-dir", data_dir, "--output", tmp_path / "table", "--dtype", "float32", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    with (tmp_path / "table" / "table.csv").open() as handle:
        rows = {row["system"]: row for row in csv.DictReader(handle)}
    cells = load_cells(list(STS_TASKS), protocols=["senteval", "mteb"], data_dir=str(data_dir))
    for name, model, method in (
        ("mean", tiny_base, "mean"),
        ("prompteol:layer=-2", tiny_base, "prompteol:layer=-2"),
        (adapter_folder.name, adapter_folder, None),
    ):
        loaded = sempa_st.load(model, method=method, dtype="float32", device="cpu")
        scores = score_cells(loaded, cells, output=tmp_path / "alone")
        found = {(score.protocol, score.task): score.spearman for score in scores}
        row = rows[name]
        assert float(row["STS-B"]) == pytest.approx(found["senteval", "STSBenchmark"], abs=1e-3)
        assert float(row["SICK-R"]) == pytest.approx(found["senteval", "SICK-R"], abs=1e-3)
        assert float(row["SICK-R (MTEB)"]) == pytest.approx(found["mteb", "SICK-R"], abs=1e-3)
        for column, protocol in (("average", "senteval"), ("average (MTEB)", "mteb")):
            mean = sum(found[protocol, task] for task in STS_TASKS) / 7
            assert float(row[column]) == pytest.approx(mean, abs=1e-3)
        assert float(row["sentences/s"]) > 0
    assert float(rows["mean"]["tokens a sentence"]) < float(rows["prompteol:layer=-2"]["tokens a sentence"])
    assert float(rows["LLaMA3-8B SemPA (paper)"]["average"]) == pytest.approx(78.10, abs=0.01)
    assert set(COLUMNS) == set(rows["mean"])
    markdown = (tmp_path / "table" / "table.md").read_text().splitlines()
    assert len(markdown) == 2 + 3 + len(published())
    assert [cell.strip() for cell in markdown[0].strip("|").split("|")] == list(COLUMNS)
    shown = [cell.strip() for cell in markdown[2].strip("|").split("|")]
    assert shown == ["mean", *(f"{float(rows['mean'][column]):.2f}" for column in COLUMNS[1:])]
    assert "LLaMA2-7B Echo (paper)" in out
    for file in (tmp_path / "table").rglob("*.json"):  # they may be published
        assert str(tiny_base.parent) not in file.read_text()
        assert str(adapter_folder.parent) not in file.read_text()


def test_what_is_finished_is_not_run_again(
    tiny_base: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []
    original = table.score_cells

    def broken(model: Any, cells: Any, *, report: Any, **rest: Any) -> Any:
        def stop(score: Any, tally: Any) -> None:
            report(score, tally)
            runs.append(score.task)
            if len(runs) == 3:
                raise KeyboardInterrupt

        return original(model, cells, report=stop, **rest)

    monkeypatch.setattr(table, "score_cells", broken)
    systems = [System(str(tiny_base), "mean")]
    settings: dict[str, Any] = {"data_dir": str(data_dir), "dtype": "float32", "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        score_systems(systems, tmp_path, **settings)
    (held,) = score_systems(systems, tmp_path, **settings)
    assert len(runs) == 13  # each cell once; the protocols share the one at which the first run ended
    whole = json.loads((tmp_path / "systems" / "mean.json").read_text())
    assert whole["scores"] == held["scores"]
    score_systems(systems, tmp_path, **settings)
    assert len(runs) == 13
    score_systems(systems, tmp_path, **{**settings, "dtype": "bfloat16"})  # another system by the same name
    assert len(runs) == 27


def test_one_table_at_a_time_is_made_in_a_folder(run_cli: Cli, tiny_base: Path, data_dir: Path, tmp_path: Path) -> None:
    command = ("table", "--base", tiny_base, "--methods", "mean", "--data-dir", data_dir, "--output", tmp_path / "t")
    with locked(tmp_path / ".t.lock", "", ""):
        code, _, err = run_cli(*command, "--dtype", "float32", "--device", "cpu")
    assert code == 2
    assert "Another table is being made" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sbert"], "Unknown method 'sbert'. Expected one of: mean"),
        (["--methods", "promptbert"], "Expected one of: mean, last-token"),
        (["--methods"], "nothing to score"),
        (["--methods", "mean", "mean"], "Two systems have the name 'mean'"),
        (["--methods", "mean", "--models", "nowhere/at-all"], "nowhere/at-all"),
    ],
)
def test_bad_input_is_refused_at_once(
    run_cli: Cli, tiny_base: Path, data_dir: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, _, err = run_cli(
        "table", "--base", tiny_base, *arguments, "--data-dir", data_dir, "--output", tmp_path / "table"
    )
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "table").exists()


def test_systems_whose_names_look_alike_have_files_of_their_own(
    tiny_base: Path, adapter_folder: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[Any] = []
    original = table.score_cells
    monkeypatch.setattr(table, "score_cells", lambda *args, **rest: (scored.append(args), original(*args, **rest))[1])
    systems = [System(str(shutil.copytree(adapter_folder, tmp_path / name))) for name in ("a b", "a_b", "é", "ö")]
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    for expected in (4, 4):
        score_systems(systems, tmp_path / "t", data_dir=str(data_dir), **settings)
        assert len(scored) == expected
    other = shutil.copytree(data_dir, tmp_path / "data")
    shutil.copy(other / "sts" / "sts13.test.parquet", other / "sts" / "sts12.test.parquet")
    score_systems(systems[:1], tmp_path / "t", data_dir=str(other), **settings)
    assert len(scored) == 5  # other data, other scores
