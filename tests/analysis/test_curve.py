from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import make_config

from sempa_st.analysis.curve import run_curve, run_curves, size_curves
from sempa_st.analysis.records import Records, read_records
from sempa_st.data.sts import STS_TASKS
from sempa_st.errors import SempaError
from sempa_st.training.run import train


def record_of(samples: list[int], scores: list[float], *, best: int = 1, **config: Any) -> dict[str, Any]:
    points = [(0, 0, 50.0), *((step, *point) for step, point in enumerate(zip(samples, scores, strict=True), 1))]
    return {
        "dev": {
            "source": "stsb",
            "pairs": 1500,
            "scores": [{"step": step, "samples": seen, "spearman": score} for step, seen, score in points],
        },
        "best_step": best,
        "config": {"learning_rate": 1e-4, "max_triplets": samples[-1], **config},
    }


def test_the_curve_of_a_run_is_what_training_measured(tiny_base: Path, tmp_path: Path) -> None:
    record = train(
        make_config(tiny_base, tmp_path / "run", objective="contrastive", max_triplets=8, checkpoint_samples=4)
    ).record
    (curve,) = run_curves(read_records([tmp_path / "run"]))
    assert (curve.name, curve.dev) == ("run", ("sample", record["dev"]["pairs"]))
    assert list(curve.samples) == [4, 8]
    assert [curve.base, *curve.scores] == [row["spearman"] for row in record["dev"]["scores"]]
    assert curve.scores[curve.kept] == max(curve.scores)
    assert size_curves([curve]) == []


def test_runs_that_differ_in_the_data_alone_make_one_curve() -> None:
    records = Records(
        runs={
            "large": record_of([500, 1000], [60.0, 70.0], best=2),
            "small": record_of([250], [55.0], checkpoint_samples=250),
            "fast": record_of([250], [58.0], learning_rate=2e-4),
            "again": record_of([250], [58.5], learning_rate=2e-4),
        }
    )
    curves = run_curves(records)
    assert [[curve.name for curve in group] for group in size_curves(curves)] == [["small", "large"]]
    assert [curve.scores[curve.kept] for curve in curves] == [70.0, 55.0, 58.0, 58.5]


def test_the_seven_sets_are_averaged_where_all_are_known(tmp_path: Path) -> None:
    run = record_of([10], [60.0])
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sempa_run.json").write_text(json.dumps(run))
    scores = {task: 70.0 + number for number, task in enumerate(STS_TASKS)}
    rows = [{"task": task, "split": "test", "protocol": "mteb", "spearman": score} for task, score in scores.items()]
    evaluated = {"model": "runs/one", "results": rows}
    both = {"mteb": scores, "senteval": dict.fromkeys(scores, 80.0)}
    systems = [
        {"system": "two", "model": "runs/two", "identity": {"method": None}, "scores": both},
        {"system": "mean", "model": "runs/three", "identity": {"method": "mean"}, "scores": both},
    ]
    partial = {"model": "three", "results": rows[:6]}
    (tmp_path / "scores.json").write_text(json.dumps({"parts": [evaluated, partial]}))
    (tmp_path / "table.json").write_text(json.dumps({"systems": systems}))
    paths = [tmp_path / name for name in ("one", "two", "three/sempa_run.json", "scores.json", "table.json")]
    assert [(curve.name, curve.average) for curve in run_curves(read_records(paths))] == [
        ("one", pytest.approx(73.0)),
        ("two", pytest.approx(80.0)),
        ("three", None),
    ]


def test_scores_on_different_pairs_are_not_put_into_one_curve() -> None:
    other = record_of([10], [60.0])
    other["dev"]["pairs"] = 132
    with pytest.raises(SempaError, match=r"dev pairs of b is \('stsb', 132\), and that of a is \('stsb', 1500\)"):
        run_curves(Records(runs={"a": record_of([10], [60.0]), "b": other}))


def without_dev(record: dict[str, Any]) -> None:
    del record["dev"]


def without_base(record: dict[str, Any]) -> None:
    del record["dev"]["scores"][0]


def without_checkpoint(record: dict[str, Any]) -> None:
    del record["dev"]["scores"][1:]


def with_null(record: dict[str, Any]) -> None:
    record["dev"]["scores"][1]["spearman"] = None


def with_nan(record: dict[str, Any]) -> None:
    record["dev"]["scores"][1]["spearman"] = math.nan


@pytest.mark.parametrize("damage", [without_dev, without_base, without_checkpoint, with_null, with_nan])
def test_a_record_without_dev_scores_is_refused(damage: Any) -> None:
    record = copy.deepcopy(record_of([10], [60.0]))
    damage(record)
    with pytest.raises(SempaError, match=r"The run record of mine has (no|a) dev score"):
        run_curve("mine", record)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is no result of this package"),
        ('{"speed": 3}', "is no result of this package"),
        ("{", "cannot be read as JSON"),
        ('{"model": "m", "results": [{"task": "STS12"}]}', "incomplete one"),
        ('{"model": "m", "results": [{"task": "a", "split": "b", "protocol": "c", "spearman": NaN}]}', "is nan"),
        ('{"models": [{"model": "m", "method": "sempa", "scores": [{"score": null}]}], "run": {}}', "incomplete one"),
    ],
)
def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(SempaError, match=rf"mine\.json .*{message}"):
        read_records([file])


def test_no_record_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SempaError, match="no run record"):
        run_curves(Records())
    with pytest.raises(SempaError, match="does not exist"):
        read_records([tmp_path / "missing"])
    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
        (tmp_path / parent / "run" / "sempa_run.json").write_text(json.dumps(record_of([10], [60.0])))
    with pytest.raises(SempaError, match="second run record of 'run'"):
        read_records([tmp_path / "a" / "run", tmp_path / "b" / "run"])


def result(spearman: float, **more: Any) -> dict[str, Any]:
    row = {"task": "STS12", "split": "test", "protocol": "mteb", "spearman": spearman}
    return {"model": "runs/best", "results": [row], **more}


def test_a_method_is_another_system(tmp_path: Path) -> None:
    for name, method in (("a", "sempa"), ("b", "mean")):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(60.0 if name == "a" else 33.0, method=method)))
    records = read_records([tmp_path / "a.json", tmp_path / "b.json"])
    cell = ("STS12", "test", "mteb")
    assert records.sts == {"best": {cell: 60.0}, "mean:best": {cell: 33.0}}


@pytest.mark.parametrize("kind", ["sts", "generation"])
def test_two_models_of_one_name_are_refused(tmp_path: Path, kind: str) -> None:
    for score in (21.0, 99.0):
        own = {"task": "mmlu", "metric": "accuracy", "score": score}
        generation = {"models": [{"model": "best", "method": "sempa", "scores": [own]}], "run": {}}
        (tmp_path / f"{score}.json").write_text(json.dumps(result(score) if kind == "sts" else generation))
    assert read_records([tmp_path / "21.0.json", tmp_path / "21.0.json"])
    with pytest.raises(SempaError, match=r"99\.0\.json has another .* of 'best' on .*rename one of the models"):
        read_records([tmp_path / "21.0.json", tmp_path / "99.0.json"])
