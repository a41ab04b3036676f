from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from filelock import FileLock
from optuna.storages.journal import JournalFileBackend, JournalStorage
from safetensors.torch import load_file

import sempa_st
from sempa_st.cli.sweep import make_configs, read_grid
from sempa_st.errors import SempaError
from sempa_st.training.config import TrainConfig
from sempa_st.training.dpo import PreferenceTrainer
from sempa_st.training.record import settings_digest
from sempa_st.training.run import TrainResult, train
from sempa_st.training.run_folder import RunFolder
from sempa_st.training.run_results import RunResult, assign_folders, results_table
from sempa_st.training.sweep import run_sweep
from sempa_st.utils.files import write_json

pytestmark = pytest.mark.names_dtype

Cli = Callable[..., tuple[int, str, str]]
FIXED: dict[str, Any] = {"data": "sample", "output": "o", "dev": "sample", "device": "cpu"}


def points_of(*sets: str, **fixed: Any) -> tuple[list[TrainConfig], list[str]]:
    return make_configs({**FIXED, **fixed}, read_grid(None, sets))


def runs_of(*sets: str, **fixed: Any) -> list[RunResult]:
    return assign_folders(*points_of(*sets, **fixed), Path("runs"), {})


def names_of(*sets: str, **fixed: Any) -> list[str]:
    return [run.folder.name for run in runs_of(*sets, **fixed)]


def grid_file(tmp_path: Path, text: str) -> str:
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    return str(file)


def test_a_mapping_is_a_product_and_a_list_of_them_a_union(tmp_path: Path) -> None:
    product = read_grid(grid_file(tmp_path, "learning-rate: [1e-4, 2e-4]\nlora_r: [4, 8]\n"), [])
    assert product == [{"learning_rate": rate, "lora_r": rank} for rate in (1e-4, 2e-4) for rank in (4, 8)]
    union = read_grid(grid_file(tmp_path, "- {beta: 0.1, max_triplets: null}\n- {beta: [0.2, 0.3]}\n"), ["seed=1,2"])
    assert [point["seed"] for point in union] == [1, 2] * 3
    assert [point["beta"] for point in union] == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert [point.get("max_triplets", 7) for point in union] == [None, None, 7, 7, 7, 7]
    words = read_grid(None, ["gradient_checkpointing=true,False", "max_triplets=null, 8", "data=a.csv"])
    assert [tuple(point.values()) for point in words] == [
        (True, None, "a.csv"), (True, 8, "a.csv"), (False, None, "a.csv"), (False, 8, "a.csv"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "sets", "message"),
    [
        ("betta: [1]", [], r"grid\.yaml has the unknown key 'betta'.*Known keys: base, data"),
        ("beta: [0.1, high]", [], r"grid\.yaml: beta is 'high'. Expected a value of type float"),
        ("beta: []", [], "no value for beta"),
        ("beta:", [], "beta is None"),
        ("beta: [[0.1]]", [], r"beta is \[0.1\]"),
        ("resume: [true]", [], "varies resume.*the sweep sets it"),
        ("output: [a, b]", [], "varies output"),
        ("dev: [stsb, sample]", [], "varies dev.*cannot be compared"),
        ("device: [cpu, cuda]", [], "varies device.*does not tell two runs apart"),
        ("lora_r: [4]\nlora-r: [8]", [], "gives lora_r twice"),
        ("[]", [], "does not hold options"),
        ("- 1", [], "does not hold options"),
        ("a: [", [], "is not YAML"),
        ("beta: [0.1]", ["beta=0.2"], r"beta is both in .*grid\.yaml and in --set"),
        ("beta: [0.1]", ["seed=1", "seed=2"], "--set seed=2 gives seed twice"),
        ("beta: [0.1]", ["seed"], "--set seed has no '='"),
        ("beta: [0.1]", ["seed="], "--set seed= has no value for seed"),
        ("beta: [0.1]", ["seed=1.5"], "seed is '1.5'. Expected a value of type int"),
    ],
)
def test_bad_grids_name_the_key(tmp_path: Path, grid: str, sets: list[str], message: str) -> None:
    with pytest.raises(SempaError, match=message):
        read_grid(grid_file(tmp_path, grid), sets)


def test_a_grid_is_needed() -> None:
    with pytest.raises(SempaError, match=r"no grid\. Pass --grid"):
        read_grid(None, [])
    with pytest.raises(SempaError, match=r"nowhere\.yaml cannot be read"):
        read_grid("nowhere.yaml", [])


def test_every_point_is_checked_and_named() -> None:
    with pytest.raises(SempaError, match=r"Point 2 of the grid \(beta=-1.0\): beta is -1.0"):
        points_of("beta=0.1,-1")
    with pytest.raises(SempaError, match=r"Point 1 .*--data is missing"):
        make_configs({"output": "o"}, [{"beta": 0.1}])
    with pytest.raises(SempaError, match=r"Point 2 .* has the same settings as point 1"):
        points_of("beta=0.1,0.10")
    with pytest.raises(SempaError, match=r"Point 2 .* has the same settings as point 1"):
        make_configs(FIXED, [{"seed": 1}, {"seed": 1, "beta": 0.1}])  # 0.1 is beta's default
    assert names_of("learning_rate=2e-4,1e-5", "lora_r=8", data="x") == ["learning_rate=0.0002", "learning_rate=1e-05"]
    assert names_of("lora_r=8") == ["lora_r=8"]
    assert names_of("data=/a b/c.csv,d.csv")[0] == "data=-a-b-c.csv"
    long = runs_of(f"data={'x' * 200},d.csv")
    assert long[0].folder.name == long[0].digest
    assert long[0].digest != long[1].digest


def test_names_that_fall_together_are_told_apart() -> None:
    runs = runs_of("data=a/b,a-b,a b")
    assert [run.folder.name for run in runs] == ["data=a-b", *(f"data=a-b-{run.digest}" for run in runs[1:])]


def test_the_digest_is_of_what_decides_the_result() -> None:
    config = runs_of("seed=1")[0]
    moved = runs_of("seed=1", output="elsewhere", device="cuda", data_dir="d", log_steps=5, overwrite=True)[0]
    assert config.digest == moved.digest
    assert settings_digest({"data": "sample", "dev": "sample", "seed": 1, "data_sha256": "x"}) == config.digest
    assert runs_of("seed=2")[0].digest != config.digest


class FakeTrain:
    """Stands in for a training run: the folder of a real one, with a record that says something else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.score: Callable[[TrainConfig], float] = lambda config: 50.0 + config.lora_r
        self.calls: list[TrainConfig] = []

    def __call__(self, config: TrainConfig) -> TrainResult:
        self.calls.append(config)
        record = json.loads((self.folder / "sempa_run.json").read_text())
        record["config"] = vars(config)
        record["settings_digest"] = settings_digest(vars(config))
        record["dev"]["scores"] = [
            {"step": 0, "samples": 0, "spearman": 50.0},
            {"step": 2, "samples": 8, "spearman": self.score(config)},
        ]
        record |= {"best_step": 2, "seconds": 3.4}
        shutil.copytree(self.folder, config.output, dirs_exist_ok=True)
        write_json(Path(config.output) / "sempa_run.json", record)
        return TrainResult(Path(config.output), record)

    def ranks(self) -> list[int]:
        """Return the ranks that were trained since the last time this was asked for, in order."""
        ranks = [config.lora_r for config in self.calls]
        self.calls.clear()
        return ranks


def small(base: Path) -> dict[str, Any]:
    return {
        "base": str(base), "max_triplets": 8, "batch_size": 4, "gradient_accumulation": 1, "checkpoint_samples": 4,
        "dtype": "float32", "dev_batch_size": 128, "learning_rate": 5e-3,
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A run outside any sweep."""
    folder = tmp_path_factory.mktemp("alone") / "model"
    train(TrainConfig(**{**FIXED, **small(tiny_base), "output": str(folder)}))
    return folder


@pytest.fixture
def fake(alone: Path) -> FakeTrain:
    return FakeTrain(alone)


def models(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("runs/*/adapter_model.safetensors"))


def test_runs_go_in_order_and_the_best_model_is_kept(
    fake: FakeTrain, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = points_of("lora_r=4,16,8", base=str(tiny_base))
    results = run_sweep(*points, tmp_path / "s", train=fake)
    assert fake.ranks() == [4, 16, 8]
    assert [(run["name"], run["dev_score"], run["step"]) for run in results["runs"]] == [
        ("lora_r=16", 66.0, 2), ("lora_r=8", 58.0, 2), ("lora_r=4", 54.0, 2),
    ]  # fmt: skip
    assert results["best"] == "lora_r=16"
    assert "does not beat" not in results_table(results)
    assert json.loads((tmp_path / "s" / "results.json").read_text()) == results
    assert "| 16 | 8 | 50.00 | 66.00 | 2 | 3 | <- best |" in " ".join(
        (tmp_path / "s" / "results.md").read_text().split()
    )
    assert models(tmp_path / "s") == ["lora_r=16"]
    assert (tmp_path / "s" / "runs" / "lora_r=4" / "sempa_run.json").is_file()
    assert json.loads((tmp_path / "s" / "best" / "sempa_run.json").read_text())["config"]["lora_r"] == 16
    assert 'SentenceTransformer("best")' in (tmp_path / "s" / "best" / "README.md").read_text()
    err = capsys.readouterr().err
    assert "[2/3] lora_r=16\n" in err
    assert err.count("not run yet") == 2 + 1  # after the first run two are left, after the second one

    assert run_sweep(*points, tmp_path / "s", train=fake) == results
    assert fake.ranks() == []
    assert "[3/3] lora_r=8: already trained, dev 58.00" in capsys.readouterr().err


def test_a_best_run_below_the_base_is_called_that(fake: FakeTrain, tiny_base: Path, tmp_path: Path) -> None:
    fake.score = lambda config: 49.0
    results = run_sweep(*points_of("lora_r=8,4", base=str(tiny_base)), tmp_path / "s", train=fake)
    assert results["best"] == "lora_r=8"  # of two equals the earlier one
    assert "does not beat the dev score of its base, 50.00" in results_table(results)


def test_all_models_are_kept_on_request(fake: FakeTrain, tiny_base: Path, tmp_path: Path) -> None:
    run_sweep(*points_of("lora_r=4,8", base=str(tiny_base)), tmp_path / "s", keep_models=True, train=fake)
    assert models(tmp_path / "s") == ["lora_r=4", "lora_r=8"]


def test_a_changed_grid_keeps_what_has_the_same_settings(fake: FakeTrain, tiny_base: Path, tmp_path: Path) -> None:
    def again(*sets: str, **fixed: Any) -> dict[str, Any]:
        return run_sweep(*points_of(*sets, base=str(tiny_base), **fixed), tmp_path / "s", train=fake)

    again("lora_r=4,8")
    assert [run["name"] for run in again("lora_r=8,6,4", "seed=42,1")["runs"]][:2] == ["lora_r=8", "lora_r=8,seed=1"]
    assert sorted((config.lora_r, config.seed) for config in fake.calls[2:]) == [(4, 1), (6, 1), (6, 42), (8, 1)]
    fake.calls.clear()
    # Other settings under a name that is taken: a run of its own.
    names = [run["name"] for run in again("lora_r=8,4", beta=0.3)["runs"]]
    assert fake.ranks() == [8, 4]
    assert [name.rpartition("-")[0] for name in names] == ["lora_r=8", "lora_r=4"]
    # The best of what is left lost its model to a better one, and gets it back.
    assert again("lora_r=6,4")["best"] == "lora_r=6,seed=42"
    assert fake.ranks() == [6]
    assert json.loads((tmp_path / "s" / "best" / "sempa_run.json").read_text())["config"]["lora_r"] == 6


def test_a_failed_run_is_recorded_and_tried_again_on_request(
    fake: FakeTrain, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(config: TrainConfig) -> float:
        if config.lora_r == 8:
            raise SempaError("The dev score is not a number.")
        return 60.0

    fake.score = diverge
    points = points_of("lora_r=8,4", base=str(tiny_base))
    results = run_sweep(*points, tmp_path / "s", train=fake)
    assert results["best"] == "lora_r=4"
    assert results["runs"][1] == {
        "name": "lora_r=8", "settings": {"lora_r": 8}, "state": "failed", "error": "The dev score is not a number.",
    }  # fmt: skip
    assert "failed: The dev score is not a number." in (tmp_path / "s" / "results.md").read_text()
    assert fake.ranks() == [8, 4]
    assert run_sweep(*points, tmp_path / "s", train=fake) == results
    assert fake.ranks() == []
    assert "[1/2] lora_r=8: failed before; pass --retry-failed" in capsys.readouterr().err
    fake.score = lambda config: 61.0
    assert run_sweep(*points, tmp_path / "s", retry_failed=True, train=fake)["best"] == "lora_r=8"
    assert fake.ranks() == [8]
    assert not list((tmp_path / "s" / "runs").glob("*.failed.json"))


def test_a_sweep_of_which_nothing_ends_well_is_an_error(fake: FakeTrain, tiny_base: Path, tmp_path: Path) -> None:
    def diverge(config: TrainConfig) -> float:
        raise SempaError("Diverged.")

    fake.score = diverge
    with pytest.raises(SempaError, match=r"None of the 2 runs succeeded.*Diverged.*--retry-failed"):
        run_sweep(*points_of("lora_r=8,4", base=str(tiny_base)), tmp_path / "s", train=fake)
    assert not (tmp_path / "s" / "best").exists()


def test_what_would_make_every_run_fail_is_refused_first(
    fake: FakeTrain, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "s"

    def refused(message: str, **fixed: Any) -> None:
        points = points_of("lora_r=4,8", **{"base": str(tiny_base), **fixed})
        with pytest.raises(SempaError, match=message):
            run_sweep(*points, target, train=fake)

    refused("Unknown data 'nonsense'", data="nonsense")
    refused("Unknown model 'x'", base="x")
    refused("device 'gpu'", device="gpu")
    refused(r"missing\.csv does not exist", dev="missing.csv")
    assert not target.exists()
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        refused("runs in one process")
    target.mkdir()
    (target / "mine").write_text("x")
    refused("not empty")
    (target / "mine").unlink()
    data = tmp_path / "nli.csv"
    data.write_text("sent0,sent1,hard_neg\na,b,c\n")
    run_sweep(*points_of("lora_r=4", base=str(tiny_base), data=str(data)), target, train=fake)
    data.write_text("sent0,sent1,hard_neg\na,b,d\n")
    refused(r"nli\.csv has changed since the sweep", data=str(data))
    with FileLock(target / ".lock"):
        refused("Another sweep is running")
    assert fake.ranks() == [4]


class InterruptError(Exception):
    pass


def journal_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """Return the trials of the only study in a sweep's journal, as a reader that knows nothing of us finds them."""
    storage = JournalStorage(JournalFileBackend(str(folder / "journal.jsonl")))
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


def test_a_grid_visits_exactly_the_product(fake: FakeTrain, tiny_base: Path, tmp_path: Path) -> None:
    points = points_of("lora_r=4,16", "beta=0.2,0.1,0.3", "stop_words=true,false", base=str(tiny_base))
    run_sweep(*points, tmp_path / "s", train=fake)
    product = list(itertools.product((4, 16), (0.2, 0.1, 0.3), (True, False)))
    assert [(config.lora_r, config.beta, config.stop_words) for config in fake.calls] == product
    trials = journal_of(tmp_path / "s")
    assert [tuple(trial.params[name] for name in ("lora_r", "beta", "stop_words")) for trial in trials] == product
    assert [trial.value for trial in trials] == [50.0 + rank for rank, _, _ in product]
    assert {trial.user_attrs["config"]["seed"] for trial in trials} == {42}


def interrupted_after(fake: FakeTrain, runs: int) -> Callable[[TrainConfig], tuple[dict[str, Any], bool]]:
    def train(config: TrainConfig) -> tuple[dict[str, Any], bool]:
        if len(fake.calls) == runs:
            raise InterruptError
        return fake(config)

    return train


def test_an_interrupted_grid_runs_what_is_left(fake: FakeTrain, tiny_base: Path, tmp_path: Path) -> None:
    points = points_of("lora_r=4,16,8", base=str(tiny_base))
    with pytest.raises(InterruptError):
        run_sweep(*points, tmp_path / "s", train=interrupted_after(fake, 1))
    assert [trial.state.name for trial in journal_of(tmp_path / "s")] == ["COMPLETE", "RUNNING"]
    assert fake.ranks() == [4]
    run_sweep(*points, tmp_path / "s", train=fake)
    assert fake.ranks() == [16, 8]
    assert [(trial.params, trial.value) for trial in journal_of(tmp_path / "s")] == [
        ({"lora_r": 4}, 54.0), ({"lora_r": 16}, 66.0), ({"lora_r": 8}, 58.0),
    ]  # fmt: skip


def picks(fake: FakeTrain) -> list[tuple[int, float]]:
    """Return rank and beta of what was trained since the last time this was asked for, in order."""
    found = [(config.lora_r, config.beta) for config in fake.calls]
    fake.calls.clear()
    return found


def test_a_search_is_the_same_again_and_after_an_interruption(
    fake: FakeTrain, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ("lora_r=2,4,6,8,10", "beta=0.1,0.2,0.3,0.4")
    points = points_of(*grid, base=str(tiny_base))
    results = run_sweep(*points, tmp_path / "a", search=14, train=fake)
    first = picks(fake)
    assert len(set(first)) == len(first) == len(results["runs"]) == 14
    assert f"[14/14] lora_r={first[-1][0]}, beta={first[-1][1]}\n" in capsys.readouterr().err
    assert run_sweep(*points, tmp_path / "b", search=14, train=fake) == results
    assert picks(fake) == first

    before: list[tuple[int, float]] = []
    for more in (3, 9):  # stopped among the first ten, which TPE draws at random, and after them
        with pytest.raises(InterruptError):
            run_sweep(*points, tmp_path / "c", search=14, train=interrupted_after(fake, more))
        before += picks(fake)
    assert run_sweep(*points, tmp_path / "c", search=14, train=fake) == results
    assert before + picks(fake) == first


def test_a_search_goes_on_to_more_and_to_all(fake: FakeTrain, tiny_base: Path, tmp_path: Path) -> None:
    fake.score = lambda config: 50.0 + config.lora_r + config.beta  # no two alike
    points = points_of("lora_r=2,4,6", "beta=0.1,0.2", base=str(tiny_base))
    run_sweep(*points, tmp_path / "s", search=2, train=fake)
    first = picks(fake)
    results = run_sweep(*points, tmp_path / "s", search=99, train=fake)
    assert sorted(first + picks(fake)) == list(itertools.product((2, 4, 6), (0.1, 0.2)))
    assert run_sweep(*points, tmp_path / "s", train=fake)["best"] == results["best"]  # the grid knows all of them
    assert fake.calls == []
    reseeded = points_of("lora_r=2,4,6", "beta=0.1,0.2", base=str(tiny_base), seed=7)
    run_sweep(*reseeded, tmp_path / "t", search=2, train=fake)
    assert picks(fake) != first


def test_a_search_passes_over_what_fails_and_over_what_no_mapping_holds(
    fake: FakeTrain, tiny_base: Path, tmp_path: Path
) -> None:
    def diverge(config: TrainConfig) -> float:
        if config.beta == 0.2:
            raise SempaError("The dev score is not a number.")
        return 60.0

    fake.score = diverge
    grid = [{"lora_r": 4, "beta": 0.1}, {"lora_r": 8, "beta": 0.2}, {"lora_r": 6, "beta": 0.3}]
    points = make_configs({**FIXED, "base": str(tiny_base)}, grid)
    results = run_sweep(*points, tmp_path / "s", search=3, train=fake)
    assert sorted(picks(fake)) == [(4, 0.1), (6, 0.3), (8, 0.2)]
    assert [run["state"] for run in results["runs"]] == ["finished", "finished", "failed"]
    assert sorted(trial.state.name for trial in journal_of(tmp_path / "s")) == ["COMPLETE", "COMPLETE", "FAIL"]
    assert run_sweep(*points, tmp_path / "s", search=3, train=fake) == results
    assert fake.calls == []


@pytest.fixture
def begun(fake: FakeTrain, tiny_base: Path, tmp_path: Path) -> tuple[Path, Callable[[], dict[str, Any]]]:
    """The journal of a sweep of which one run is done and one was interrupted, and how to go on with it."""
    points = points_of("lora_r=4,16", base=str(tiny_base))
    with pytest.raises(InterruptError):
        run_sweep(*points, tmp_path / "s", train=interrupted_after(fake, 1))
    fake.calls.clear()
    return tmp_path / "s" / "journal.jsonl", lambda: run_sweep(*points, tmp_path / "s", train=fake)


def test_a_line_that_was_being_written_loses_no_sweep(
    begun: tuple[Path, Callable[[], dict[str, Any]]], fake: FakeTrain
) -> None:
    journal, go_on = begun
    lines = journal.read_bytes().splitlines(keepends=True)
    cuts = [b"".join(lines[:count]) + lines[count][: len(lines[count]) // 2] for count in range(len(lines))]
    for content in [*cuts, b"".join(lines)[:-1], b"".join(lines) + b"\0\0"]:
        journal.write_bytes(content)
        journal.with_name("journal.jsonl.lock").touch()  # and so is the lock of who wrote it
        assert go_on()["best"] == "lora_r=16"
        assert all(trial.state.name == "COMPLETE" for trial in journal_of(journal.parent))
    assert fake.ranks() == [16]


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [*lines, b"no JSON\n"],
        lambda lines: [b"no JSON\n", *lines],
        lambda lines: [lines[0][:9] + b"\n", *lines[1:]],
        lambda lines: [*lines, b"[" * 10_000 + b"\n"],
        lambda lines: [*lines, b"[1]\n"],
        lambda lines: [*lines, b'{"op_code": 99, "worker_id": "x"}\n'],
        lambda lines: [*lines, b"\x80\x04\x95 a pickle\n"],
        lambda lines: [line.replace(b'"name":"lora_r=4"', b'"name":"../../mine"') for line in lines],
        lambda lines: [line.replace(b'"name":"lora_r=4"', b'"name":".."') for line in lines],
        lambda lines: [line.replace(b'"digest"', b'"digits"') for line in lines],
        lambda lines: [line.replace(b"Categorical", b"os.") for line in lines],
    ],
)
def test_a_damaged_journal_is_one_clear_error(
    begun: tuple[Path, Callable[[], dict[str, Any]]],
    fake: FakeTrain,
    damage: Callable[[list[bytes]], list[bytes]],
) -> None:
    journal, go_on = begun
    lines = journal.read_bytes().splitlines(keepends=True)
    damaged = b"".join(damage(lines))
    assert damaged != b"".join(lines)
    journal.write_bytes(damaged)
    with pytest.raises(SempaError, match=r"journal\.jsonl, the journal of the sweep, is damaged.*another --output"):
        go_on()
    assert journal.read_bytes() == damaged
    assert fake.calls == []


def test_an_interrupted_run_is_gone_on_with(
    alone: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = points_of("learning_rate=1e-3,5e-3", **small(tiny_base))
    original, calls = PreferenceTrainer.training_step, 0

    def fail_later(self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise InterruptError
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PreferenceTrainer, "training_step", fail_later)
    with pytest.raises(InterruptError):
        run_sweep(*points, tmp_path / "s", train=train)
    assert "Run the same command again" in capsys.readouterr().err
    broken = tmp_path / "s" / "runs" / "learning_rate=0.005"
    assert RunFolder(broken).last_checkpoint()
    assert (tmp_path / "s" / "best" / "adapter_model.safetensors").is_file()

    calls = 10
    configs, varied = points
    results = run_sweep(configs[::-1], varied, tmp_path / "s")  # in another order: the settings decide
    assert calls == 11
    assert {run["state"] for run in results["runs"]} == {"finished"}
    # After another run in the same process, with an interruption: what the same settings give on their own.
    scores = [json.loads((folder / "sempa_run.json").read_text())["dev"]["scores"] for folder in (broken, alone)]
    assert scores[0] == scores[1]


def test_the_command_line_from_grid_to_model(run_cli: Cli, tiny_base: Path, tmp_path: Path) -> None:
    config = tmp_path / "base.yaml"
    config.write_text("".join(f"{name}: {value}\n" for name, value in small(tiny_base).items()))
    output = tmp_path / "s"
    command = ["sweep", "--config", config, "--grid", grid_file(tmp_path, "learning_rate: [1e-3, 5e-3]"), "--data",
               "sample", "--dev", "sample", "--device", "cpu", "--output", output]  # fmt: skip
    code, out, err = run_cli(*command, "--set", "lora_r=2")
    assert code == 0, err
    assert "<- best" in out
    assert f'sempa_st.load("{output / "best"}")' in out
    assert "[1/2] learning_rate=0.001" in err
    code, out, err = run_cli(*command, "--set", "lora_r=2", "--json")
    assert code == 0, err
    results = json.loads(out)
    assert results == json.loads((output / "results.json").read_text())
    scores = [run["dev_score"] for run in results["runs"]]
    assert scores == sorted(scores, reverse=True)
    record = json.loads((output / "best" / "sempa_run.json").read_text())
    assert f"learning_rate={record['config']['learning_rate']}" == results["best"]
    kept = load_file(output / "runs" / results["best"] / "adapter_model.safetensors")
    assert kept.keys() == load_file(output / "best" / "adapter_model.safetensors").keys()
    sempa_st.load(output / "best", dtype="float32", device="cpu").encode("A cat sleeps")

    code, out, err = run_cli(*command, "--set", "lora_r=2", "--search", 1, "--json")
    assert code == 0, err
    assert len(json.loads(out)["runs"]) == 1
    assert "already trained" in err
    assert "A new study" not in err
    assert optuna.logging.get_verbosity() == optuna.logging.WARNING
    code, _, err = run_cli(*command, "--search", 0)
    assert code == 2
    assert "--search is 0. Expected the number of runs" in err

    config.write_text(config.read_text() + "resume: true\n")
    code, _, err = run_cli(*command)
    assert code == 2
    assert "sets resume, which a sweep sets itself" in err


def test_runs_of_whole_models_end_as_those_of_adapters_do(
    fake: FakeTrain, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.folder = shutil.copytree(fake.folder, tmp_path / "whole")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (fake.folder / name).unlink()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_base / name, fake.folder)
    fake.score = lambda config: 50.0 + config.seed
    run_sweep(*points_of("seed=1,2", tuning="full", base=str(tiny_base)), tmp_path / "s", train=fake)
    assert [config.seed for config in fake.calls] == [1, 2]
    assert (tmp_path / "s" / "best" / "model.safetensors").is_file()
    assert [path.parent.name for path in tmp_path.glob("s/runs/*/model.safetensors")] == ["seed=2"]
