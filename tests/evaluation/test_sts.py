from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mteb
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers.tiny import save_sts
from mteb.mocks.mock_tasks import MockSTSTask
from scipy.stats import spearmanr

import sempa_st
from sempa_st.data.rows import read_rows
from sempa_st.data.sts import STS_TASKS, dev_pairs, local_files, read_pairs
from sempa_st.errors import SempaError
from sempa_st.evaluation.encode_cache import encode_cache
from sempa_st.evaluation.sts import expand_tasks, load_cells, score_cells
from sempa_st.utils.assets import asset_path
from sempa_st.utils.files import locked

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sts(tmp_path_factory.mktemp("data"))


def reference(model: Any, files: list[Path]) -> float:
    pairs = read_pairs(files)
    vectors = [model.encode(list(side), convert_to_tensor=True) for side in (pairs.first, pairs.second)]
    return 100 * float(spearmanr(torch.nn.functional.cosine_similarity(*vectors), pairs.scores).statistic)


@pytest.fixture(scope="module")
def model(adapter_folder: Path) -> Any:
    return sempa_st.load(adapter_folder, dtype="float32", device="cpu")


def test_scores_equal_scipys(model: Any, data_dir: Path, tmp_path: Path) -> None:
    cells = load_cells(list(STS_TASKS), protocols=["mteb", "senteval"], data_dir=str(data_dir))
    scores = score_cells(model, cells, output=tmp_path)
    assert len(scores) == 14
    for score in scores:
        files = local_files(data_dir, score.task, "test", score.protocol)
        assert score.spearman == pytest.approx(reference(model, files), abs=1e-3)
        assert score.pairs == len(read_pairs(files))
    sick = {score.protocol: score.pairs for score in scores if score.task == "SICK-R"}
    parts = {part: len(read_pairs([data_dir / "sts" / f"sickr.{part}.parquet"])) for part in ("train", "dev", "test")}
    assert sick == {"mteb": sum(parts.values()), "senteval": parts["test"]}
    assert len(set(sick.values())) == 2


def test_rows_that_protocols_share_are_encoded_once(
    model: Any, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    original = mteb.evaluate
    monkeypatch.setattr(mteb, "evaluate", lambda m, task, **rest: (runs.append(task), original(m, task, **rest))[1])
    cells = load_cells(["STS12", "SICK-R"], protocols=["mteb", "senteval"], data_dir=str(data_dir))
    scores = score_cells(model, cells, output=tmp_path)
    assert [task.metadata.name for task in runs] == ["STS12", "SICK-R", "SICK-R"]
    assert [score.protocol for score in scores] == ["mteb", "senteval"] * 2
    assert scores[0].spearman == scores[1].spearman


def test_the_command_writes_scores_for_people_and_programs(
    run_cli: Cli, model: Any, adapter_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    code, out, err = run_cli(
        "evaluate", adapter_folder, "--tasks", "STSBenchmark", "--split", "dev", "--data-dir", data_dir,
        "--output", tmp_path / "out", "--json", tmp_path / "s.json", "--dtype", "float32", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "s.json").read_text())
    expected = reference(model, [data_dir / "sts" / "stsb.dev.parquet"])
    assert result["model"] == adapter_folder.name
    assert str(tmp_path) not in (tmp_path / "out" / "scores.json").read_text()  # it may be published
    assert result["method"] == "prompteol"  # a folder without the record of a training
    assert result["results"] == [
        {
            "task": "STSBenchmark",
            "split": "dev",
            "protocol": "mteb",
            "pairs": len(read_pairs([data_dir / "sts" / "stsb.dev.parquet"])),
            "spearman": pytest.approx(expected, abs=1e-3),
        }
    ]
    assert f"{expected:.2f}" in out
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["results"] == result["results"]


def test_a_result_file_that_was_not_written_to_its_end_is_no_result(
    model: Any, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(self: Any, path: Path) -> None:
        path.write_text("{")
        raise KeyboardInterrupt

    run: dict[str, Any] = {"data_dir": str(data_dir), "output": tmp_path / "out"}
    sempa_st.evaluate(model, "STS12", **run)
    (settings,) = (tmp_path / "out").rglob("run_settings.jsonl")
    assert len(settings.read_text().splitlines()) == 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mteb.results.TaskResult.to_disk", half)
        sempa_st.evaluate(model, "STS13", **run)
    assert not list((tmp_path / "out").rglob("STS13.json"))
    sempa_st.evaluate(model, "STS13", **run)
    assert len(settings.read_text().splitlines()) == 2
    assert not list((tmp_path / "out").rglob(".*"))


def test_from_python_as_from_the_command_line(
    model: Any, adapter_folder: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMPA_DATA_DIR", str(data_dir))
    expected = reference(model, [data_dir / "sts" / "stsb.dev.parquet"])
    options = {"dtype": "float32", "device": "cpu"}
    scores = sempa_st.evaluate(str(adapter_folder), "STSBenchmark", split="dev", **options)
    assert scores == {"STSBenchmark": pytest.approx(expected, abs=1e-3)}


def test_mteb_never_serves_one_model_the_score_of_another(tiny_base: Path, model: Any, tmp_path: Path) -> None:
    """As a user would: MTEB's own call, one result cache for all."""
    cache = mteb.ResultCache(tmp_path)
    other = sempa_st.load(tiny_base, dtype="float32", device="cpu")
    rows = read_rows(asset_path("sts_sample.jsonl"))
    scores = []
    for embedder in (model, other):
        task = mteb.get_task("STSBenchmark")
        task.dataset, task.data_loaded = DatasetDict({"test": Dataset.from_list(rows)}), True
        result = mteb.evaluate(embedder, task, cache=cache, co2_tracker=False)
        scores.append(result.task_results[0].get_score())
    assert scores[0] != scores[1]


def test_mteb_takes_the_model_as_it_is(model: Any, tmp_path: Path) -> None:
    result = mteb.evaluate(model, MockSTSTask(), cache=mteb.ResultCache(tmp_path), co2_tracker=False)
    assert -1 <= result.task_results[0].get_score() <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "STS99"], "MTEB has no task 'STS99'"),
        (["--tasks", "Banking77Classification"], "data of Banking77Classification cannot be loaded from the Hub"),
        (["--tasks", "Banking77Classification", "--split", "dev"], "--split dev is for the tasks"),
        (["--tasks", "MTEB(eng, v99)"], "MTEB has no benchmark 'MTEB(eng, v99)'"),
        (["--tasks", "STS12", "--split", "dev"], "no dev split of STS12 in|has no dev split"),
        (["--tasks", "SICK-R", "--split", "dev"], "SICK-R has no dev split|no dev split"),
        (["--tasks", "STS12", "--protocol", "x"], "Unknown protocol 'x'"),
        (["--tasks", "STS17"], "data of STS17 cannot be loaded from the Hub"),
        (["--tasks", ","], "No task in"),
    ],
)
def test_bad_requests(
    run_cli: Cli, adapter_folder: Path, data_dir: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    code, _, err = run_cli("evaluate", adapter_folder, "--data-dir", data_dir, "--output", tmp_path / "o", *flags)
    assert code == 2
    assert any(part in err for part in message.split("|")), err
    assert "Traceback" not in err


def test_offline_without_files_is_one_clear_error(run_cli: Cli, adapter_folder: Path, tmp_path: Path) -> None:
    code, _, err = run_cli("evaluate", adapter_folder, "--tasks", "STS12", "--output", tmp_path / "o")
    assert code == 2
    assert "cannot be loaded from the Hub" in err
    assert "--data-dir" in err


def test_one_evaluation_at_a_time_writes_to_a_folder(
    run_cli: Cli, adapter_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "o"
    with locked(tmp_path / ".o.lock", "", ""):
        code, _, err = run_cli(
            "evaluate", adapter_folder, "--tasks", "STS12", "--data-dir", data_dir, "--output", output
        )
    assert code == 2
    assert "Another evaluation writes to" in err
    assert list(tmp_path.iterdir()) == []


def test_pairs_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"sentence1": "a", "sentence2": "b", "grade": 1}\n')
    with pytest.raises(
        SempaError, match=r"columns \(sentence1, sentence2, grade\). Expected \(sentence1, sentence2, sc"
    ):
        read_pairs([file])
    file.write_text(
        '{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": "a", "sentence2": "b", "score": "x"}\n'
    )
    with pytest.raises(SempaError, match="row 2: expected two sentences and a number"):
        read_pairs([file])
    with pytest.raises(SempaError, match="--dev sample"):
        dev_pairs("stsb", None)


def test_task_lists() -> None:
    assert expand_tasks("sts") == list(STS_TASKS)
    assert expand_tasks("STS12, sts") == list(STS_TASKS)


def test_a_sentence_is_encoded_once_and_gets_its_own_vector(model: Any) -> None:
    """Also under a prompt, which changes it; and calls for something else are passed on."""
    expected = model.encode(["A cat", "Two dogs", "Snow"])
    prompted = model.encode(["A cat"], prompt="Topic: ")
    with encode_cache(model) as tally:
        first = model.encode(["A cat", "Two dogs", "A cat"])
        second = model.encode(["Snow", "Two dogs"], batch_size=1)
        third = model.encode(["A cat"], prompt="Topic: ")
        assert (tally.asked, tally.encoded) == (6, 4)
        assert tally.seconds > 0
        assert torch.is_tensor(model.encode(["A cat"], convert_to_tensor=True))
        assert model.encode("A cat").shape == expected[0].shape
    assert tally.asked == 6
    for found, wanted in ((first, expected[[0, 1, 0]]), (second, expected[[2, 1]]), (third, prompted)):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=1e-5)
    assert "encode" not in vars(model)
