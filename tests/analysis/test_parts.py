"""The parts on tiny models: what the report gets is what the functions measure."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy.stats import spearmanr

import sempa_st
from sempa_st.analysis.curve import run_curve
from sempa_st.analysis.curve_part import draw_curves, spaced
from sempa_st.analysis.data import AnalysisData
from sempa_st.analysis.frontier import FrontierPoint, draw_frontier
from sempa_st.analysis.plotting import COLOURS
from sempa_st.errors import SempaError
from sempa_st.utils.files import read_json, write_json

pytestmark = pytest.mark.names_dtype

Cli = Callable[..., tuple[int, str, str]]
QUICK: dict[str, Any] = {"sentences": 40, "dtype": "float32", "device": "cpu"}


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as text:
        return list(csv.DictReader(text))


def record_with(triplets: int, score: float, **config: Any) -> dict[str, Any]:
    rows = [
        {"step": 0, "samples": 0, "spearman": 60.0},
        {"step": 1, "samples": triplets, "spearman": score},
        {"step": 2, "samples": 2 * triplets, "spearman": score - 1},
    ]
    return {"dev": {"source": "stsb", "pairs": 9, "scores": rows}, "best_step": 1, "config": config}


def test_strata_and_layers_of_a_model_its_base_and_a_method(
    run_cli: Cli, tiny_base: Path, adapter_folder: Path, analysis_data: Path, tmp_path: Path
) -> None:
    command = ("analyze", adapter_folder, f"mean:{tiny_base}", "--only", "layers,strata", "--data-dir", analysis_data)
    flags = ("--sentences", 40, "--dtype", "float32", "--device", "cpu", "--output", tmp_path)
    code, printed, err = run_cli(*command, *flags)
    assert code == 0, err
    assert "Wrote layers, strata of 2 model(s)" in printed
    values = read_json(tmp_path / "results.json")["parts"]
    pairs = AnalysisData(analysis_data).sample_dev(40, 0)
    assert len(pairs) == values["strata"]["pairs"] == 20
    model = sempa_st.load(adapter_folder, dtype="float32", device="cpu")
    first, second = (model.encode(list(side), normalize_embeddings=True) for side in (pairs.first, pairs.second))
    expected = 100 * spearmanr((first * second).sum(1), pairs.scores).statistic
    assert list(values["layers"]) == ["tiny-sempa", "tiny-sempa, adapter off"]
    assert values["layers"]["tiny-sempa"]["scores"][-1] == pytest.approx(expected, abs=0.3)  # ranks of near ties
    rows = rows_of(tmp_path / "parts" / "layers" / "layers.csv")
    assert [row["layer"] for row in rows] == ["1", "2", "3"]
    assert "Left out" in (tmp_path / "parts" / "layers" / "result.json").read_text()
    rows = rows_of(tmp_path / "parts" / "strata" / "strata.csv")
    assert {row["model"] for row in rows} == {"tiny-sempa", "mean:tiny-llama"}
    for name in ("tiny-sempa", "mean:tiny-llama"):
        for kind in {row["property"] for row in rows}:
            assert sum(int(row["pairs"]) for row in rows if (row["model"], row["property"]) == (name, kind)) == 20
    worst = [float(row["error"]) for row in rows_of(tmp_path / "parts" / "strata" / "worst.csv")][:20]
    assert [abs(error) for error in worst] == sorted((abs(error) for error in worst), reverse=True)
    for part in ("strata", "layers"):
        assert (tmp_path / "parts" / part / f"{part}.png").read_bytes().startswith(b"\x89PNG")


def test_a_base_among_the_models_is_not_run_twice(tiny_base: Path, adapter_folder: Path, tmp_path: Path) -> None:
    result = sempa_st.analyze([str(tiny_base), str(adapter_folder)], tmp_path, only=["layers"], **QUICK)
    assert list(result["parts"]["layers"]) == ["tiny-llama", "tiny-sempa"]


def test_curve_and_frontier_from_records(run_cli: Cli, tiny_base: Path, tmp_path: Path) -> None:
    for triplets, score in ((100, 65.0), (400, 70.0)):
        (tmp_path / f"run{triplets}").mkdir()
        write_json(tmp_path / f"run{triplets}" / "sempa_run.json", record_with(triplets, score))
    words = {"task": "wikitext", "metric": "word perplexity", "n": 8, "shots": 0, "percent": False}
    models = [
        {"model": name, "method": method, "scores": [{**words, "score": score}]}
        for name, method, score in (("base", "prompteol", 50.0), ("runs/run400", "sempa", 55.0), ("x", "sempa", 60.0))
    ]
    write_json(tmp_path / "generation.json", {"models": models, "run": {}})
    command = ("analyze", tiny_base, "--only", "curve,frontier", "--dtype", "float32", "--output", tmp_path / "out")
    paths = [tmp_path / name for name in ("run100", "run400", "generation.json")]
    code, printed, err = run_cli(*command, "--json", "--records", *paths)
    assert code == 0, err
    parts = json.loads(printed)["parts"]
    assert [(run["run"], run["kept at"], run["dev"]) for run in parts["curve"]["runs"]] == [
        ("run100", 100, 65.0),
        ("run400", 400, 70.0),
    ]
    points = parts["frontier"]["points"]
    assert [(point["name"], point["sts"], point["rise"]) for point in points] == [
        ("base", 60.0, 0.0),
        ("run400", 70.0, pytest.approx(10.0)),
    ]
    assert len(rows_of(tmp_path / "out" / "parts" / "curve" / "curve.csv")) == 4
    for part in ("curve", "frontier"):
        assert (tmp_path / "out" / "parts" / part / f"{part}.png").is_file()
    # A record that changes is read again.
    write_json(tmp_path / "run400" / "sempa_run.json", record_with(400, 72.0))
    code, printed, _ = run_cli(*command, "--json", "--records", *paths)
    assert json.loads(printed)["parts"]["curve"]["runs"][1]["dev"] == 72.0
    write_json(tmp_path / "run400" / "sempa_run.json", {"dev": {"scores": []}, "config": {}})
    code, _, err = run_cli(*command, "--records", *paths)
    assert code == 2
    assert "The run record of run400 has no dev scores" in err


def test_without_records_the_report_says_so(tiny_base: Path, tmp_path: Path) -> None:
    result = sempa_st.analyze(str(tiny_base), tmp_path, only=["curve", "frontier"], **QUICK)
    assert result["parts"] == {"curve": {}, "frontier": {}}
    page = (tmp_path / "report.html").read_text()
    assert "No run record" in page
    assert "No generation scores" in page
    with pytest.raises(SempaError, match=r"no\.json does not exist"):
        sempa_st.analyze(str(tiny_base), tmp_path, only=["curve"], records=[tmp_path / "no.json"], **QUICK)


def test_the_picture_of_the_curve() -> None:
    curves = [run_curve(str(size), record_with(size, score)) for size, score in ((100, 65.0), (1000, 70.0))]
    axes = Figure().subplots()
    draw_curves(axes, curves)
    lines = [list(zip(*line.get_data(), strict=True)) for line in axes.lines]
    assert [(100, 65.0), (200, 64.0)] in lines
    assert [(100, 65.0), (1000, 70.0)] in lines  # the two differ in the number of triplets alone
    assert [(1000, 70.0)] in lines
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["100", "200", "1,000", "2,000"]


def test_a_model_has_one_colour_in_every_picture() -> None:
    """Of three models, the first has no run record and no generation score."""
    models = ["mean:base", "base", "trained"]
    axes = Figure().subplots()
    draw_curves(axes, [run_curve(name, record_with(100, 65.0)) for name in ("trained", "other")], models)
    colours = {line.get_label(): line.get_color() for line in axes.lines}
    axes = Figure().subplots()
    draw_frontier(axes, [FrontierPoint(name, 70.0, 50.0, 1.0, None, False) for name in models[1:]], "dev", models)
    points = {found.get_label(): to_hex(found.get_facecolor()[0]).upper() for found in axes.collections}
    assert colours["trained"] == points["trained"] == COLOURS[2]
    assert points["base"] == COLOURS[1]
    assert colours["other"] == COLOURS[3]


def test_ticks_keep_their_distance() -> None:
    ticks = spaced(range(10, 10_000, 7))
    assert ticks[-1] == 9999 - (9999 - 10) % 7
    gaps = [math.log(after / before) for before, after in itertools.pairwise(ticks)]
    assert min(gaps) >= math.log(ticks[-1] / 10) / 10 - 1e-9
    assert spaced([5]) == [5]
