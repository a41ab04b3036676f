"""What a run writes down, whatever its figures, its rows and its disk were like."""

from __future__ import annotations

import errno
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import make_config
from safetensors.torch import save_file
from trl import DPOTrainer

from sempa_st.data.nli import NliData, Triplet, load_nli
from sempa_st.data.rows import read_rows
from sempa_st.errors import SempaError
from sempa_st.model.tokenizer import load_tokenizer
from sempa_st.training import reference
from sempa_st.training import run as training
from sempa_st.training.answers import answer_ids, drop_too_long
from sempa_st.training.build import build_trainer
from sempa_st.training.config import TrainConfig
from sempa_st.training.dev_score import DevScorer, DevScoreTrainer
from sempa_st.training.record import run_table
from sempa_st.training.run import load_inputs, train
from sempa_st.training.run_folder import RunFolder
from sempa_st.training.run_results import RunResult
from sempa_st.utils.assets import asset_path
from sempa_st.utils.files import finite, read_json, write_json

Cli = Callable[..., tuple[int, str, str]]
SOURCE = "rows.jsonl"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_that_json_has_no_word_for_is_null(tmp_path: Path, value: float) -> None:
    write_json(tmp_path / "a.json", {"a": [{"b": value}, (1.5, value)], "c": "inf"})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "a": [{"b": None}, [1.5, None]],
        "c": "inf",
    }
    (tmp_path / "b.json").write_text(json.dumps([value]))  # as transformers writes the state of a trainer
    assert finite(read_json(tmp_path / "b.json")) == [None]


def overflow(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Let the second gradient norm of each run be as a step that overflowed leaves it."""
    original = DevScoreTrainer.log

    def spoiled(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "grad_norm" in logs and self.state.global_step == 2:
            logs = {**logs, "grad_norm": value}
        original(self, logs, *args, **kwargs)

    monkeypatch.setattr(DevScoreTrainer, "log", spoiled)


@pytest.mark.parametrize(("objective", "value"), [("dpo", math.inf), ("contrastive", math.inf), ("one-word", math.nan)])
def test_a_step_that_overflowed_spoils_no_run(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str, value: float
) -> None:
    overflow(monkeypatch, value)
    config = make_config(tiny_base, tmp_path / "model", objective=objective, max_triplets=16)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="at the end"):
        patch.setattr(training, "_finish", lambda *args: (_ for _ in ()).throw(RuntimeError("at the end")))
        train(config)
    state = next((tmp_path / "model.training" / "checkpoints").glob("*/trainer_state.json"))
    assert str(value).lower()[:3] in state.read_text().lower()
    record = train(replace(config, resume=True)).record
    norms = [step["gradient_norm"] for step in record["training"]]
    assert norms[1] is None
    assert all(norm > 0 for norm in norms[:1] + norms[2:])
    text = (tmp_path / "model" / "sempa_run.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == record
    assert "<- kept" in run_table(record)
    assert RunResult(config, {}, tmp_path / "model").record == record


def test_a_table_averages_what_is_a_number(tiny_base: Path, tmp_path: Path) -> None:
    scores = [{"step": 0, "samples": 0, "spearman": 1.0}, {"step": 2, "samples": 8, "spearman": 2.0}]
    lines = [{"step": 1, "loss": None, "reward_accuracy": 0.5}, {"step": 2, "loss": 3.0, "reward_accuracy": None}]
    record = {"dev": {"scores": scores, "source": "x"}, "training": lines, "best_step": 2, "data": {"skipped": 0}}
    assert run_table(record).splitlines()[-1].split() == ["8", "3.00", "0.50", "2.00", "<-", "kept"]
    record["training"] = [{"step": 1, "loss": None}]
    assert run_table(record).splitlines()[-1].split() == ["8", "2.00", "<-", "kept"]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_dev_score_that_is_no_number_is_an_error(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    parts = load_inputs(make_config(tiny_base, tmp_path / "model"), "cpu")
    monkeypatch.setattr(type(parts.scorer.pairs), "spearman", lambda *args: value)
    with pytest.raises(SempaError, match=rf"dev score is not a number \({value}\)"):
        parts.scorer(parts.model)
    assert isinstance(parts.scorer, DevScorer)


@pytest.fixture
def with_long_rows(tmp_path: Path) -> str:
    """The shipped triplets, every third of them with a premise that fills any training sequence."""
    rows = read_rows(asset_path("nli_sample.jsonl"))[:24]
    for row in rows[::3]:
        row["sent0"] = "word " * 400
    path = tmp_path / SOURCE
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(params=["tiny_base", "tiny_gemma"])  # with a chat template and on plain text
def base(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("bases", "order"),
    [("tiny_base", ("dpo", "dpo:1,one-word:1")), ("tiny_gemma", ("dpo:1,one-word:1", "listwise", "dpo"))],
)
def test_rows_that_are_too_long_are_left_out_by_every_trainer(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    with_long_rows: str,
    bases: str,
    order: tuple[str, ...],
) -> None:
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(tmp_path / "cache"))
    base = request.getfixturevalue(bases)  # one with a chat template, one on plain text
    settings: dict[str, Any] = {"data": with_long_rows, "max_length": 300, "max_triplets": None}
    first_losses = []
    for number, objective in enumerate(order):
        record = train(make_config(base, tmp_path / str(number), objective=objective, **settings)).record
        assert (record["data"]["triplets"], record["data"]["too_long"], record["data"]["skipped"]) == (16, 8, 0)
        assert record["dev"]["scores"][-1]["samples"] == 16
        assert len(record["training"]) == 4
        assert "Skipped as too long: 8 triplet(s) whose prompt alone fills --max-length 300." in run_table(record)
        first_losses.append(record["training"][0]["loss"])
    # Policy and reference are the same before the first step, whoever has filled the cache.
    assert first_losses[order.index("dpo")] == pytest.approx(math.log(2), abs=1e-4)


def test_an_objective_without_requests_leaves_nothing_out(tiny_base: Path, tmp_path: Path, with_long_rows: str) -> None:
    config = make_config(tiny_base, tmp_path / "m", objective="one-word", data=with_long_rows, max_length=300)
    parts = load_inputs(config, "cpu")
    assert (len(parts.data.triplets), parts.data.too_long) == (24, 0)


def test_what_is_left_is_what_trl_would_train_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any length: the rows that TRL keeps, with no answer cut to nothing."""
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(tmp_path / "cache"))
    tokenizer = load_tokenizer(base)
    rows = [
        {"sent0": "a dog " * number, "sent1": "an animal", "hard_neg": "no dog at all " * number}
        for number in range(1, 25)
    ]
    path = tmp_path / SOURCE
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    every = load_nli(str(path))
    for row in (3, 20):
        request, answers = requests_of(every.triplets[row], tokenizer)
        max_length = len(answer_ids(tokenizer, request, answers[0])[0])
        config = make_config(base, tmp_path / "m", data=str(path), max_triplets=None, max_length=max_length)
        parts = load_inputs(config, "cpu")
        kept = drop_too_long(every, tokenizer, paraphrase=config.paraphrase, max_length=max_length)
        assert kept == parts.data
        assert kept.too_long == 24 - row
        trainer = build_trainer(parts, RunFolder(config.output))
        assert len(trainer.train_dataset) == len(kept.triplets)
        parts.data = every
        whole = DPOTrainer._prepare_dataset(
            trainer, _raw(every, tokenizer, config), trainer.processing_class, trainer.args, "train"
        )
        assert len(whole) == len(kept.triplets)
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(kept.triplets))])
        assert batch["completion_mask"].sum(dim=1).min() > 0


def _raw(data: NliData, tokenizer: Any, config: TrainConfig) -> Any:
    from datasets import Dataset

    from sempa_st.data.preferences import preference_rows

    return Dataset.from_list(preference_rows(data.triplets, tokenizer, paraphrase=config.paraphrase))


def test_one_answer_without_room_is_enough(tiny_base: Path) -> None:
    """Where tokens merge across the seam, the answers of a row begin at different places."""
    tokenizer = load_tokenizer(tiny_base)
    triplet = Triplet("A cat sleeps.", "An animal sleeps.", "No cat sleeps.", "It is warm.")
    request, answers = requests_of(triplet, tokenizer)
    start = len(answer_ids(tokenizer, request, answers[0])[0])
    data = NliData([triplet], SOURCE)
    assert drop_too_long(data, tokenizer, paraphrase="keep", max_length=start + 1) == data
    with pytest.raises(SempaError, match=rf"None of the 1 triplets of {SOURCE} .*max_length, {start} tokens"):
        drop_too_long(data, tokenizer, paraphrase="keep", max_length=start)


def requests_of(triplet: Triplet, tokenizer: Any) -> tuple[Any, list[Any]]:
    from sempa_st.data.preferences import ranked_answers

    return ranked_answers([triplet], tokenizer, paraphrase="keep")[0]


def test_data_of_which_nothing_fits_is_refused_before_anything_is_written(
    run_cli: Cli, tiny_base: Path, tmp_path: Path, with_long_rows: str
) -> None:
    code, _, err = run_cli(
        "train", "--base", tiny_base, "--data", with_long_rows, "--dev", "sample", "--max-length", 12, "--device",
        "cpu", "--output", tmp_path / "out" / "model",
    )  # fmt: skip
    assert code == 2
    assert "None of the 24 triplets" in err
    assert "--max-length" in err
    assert not (tmp_path / "out").exists()


def cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    return "(Not a directory|File exists)"


def is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(tmp_path / "cache"))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise reference.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(reference, "save_file", fail)
    return "No space left on device"


def is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    cache = tmp_path / "cache"
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(cache))
    mkdir = Path.mkdir

    def fail(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.is_relative_to(cache):
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", fail)
    return "Read-only file system"


@pytest.mark.parametrize(
    ("cache", "objectives"),
    [(cannot_be_made, ("dpo", "dpo:1,one-word:1")), (is_full, ("dpo",)), (is_read_only, ("dpo",))],
    ids=["cannot-be-made", "full", "read-only"],
)
def test_training_goes_on_without_a_cache(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cache: Callable[[Path, pytest.MonkeyPatch], str],
    objectives: tuple[str, ...],
) -> None:
    """With one line of warning a run."""
    reason = cache(tmp_path, monkeypatch)
    for number, objective in enumerate(objectives):
        train(make_config(tiny_base, tmp_path / str(number), objective=objective, max_triplets=8))
        lines = [line for line in capsys.readouterr().err.splitlines() if "cache folder" in line]
        assert len(lines) == 1
        assert re.search(reason, lines[0])
        assert (tmp_path / str(number) / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("model", ["gemma3-270m", "sempa-gemma3-270m"])
def test_what_needs_the_cache_says_so(
    run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    cannot_be_made(tmp_path, monkeypatch)
    (tmp_path / "a.txt").write_text("A cat sleeps\n")
    code, _, err = run_cli("encode", model, tmp_path / "a.txt", "--output", tmp_path / "a.npy")
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "SEMPA_CACHE_DIR" in err
    assert str(tmp_path / "file" / "cache") in err


def test_a_cached_file_of_other_tensors_is_computed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(tmp_path))
    asked: list[int] = []

    def compute() -> torch.Tensor:
        asked.append(1)
        return torch.tensor([1.0, 2.0])

    def get() -> torch.Tensor:
        return reference.cached_tensor("mine", {"a": 1}, compute, write=True)

    assert torch.equal(get(), get())
    assert len(asked) == 1
    (path,) = (tmp_path / "reference").glob("*.safetensors")
    save_file({"other": torch.zeros(2)}, path)
    assert torch.equal(get(), torch.tensor([1.0, 2.0]))
    assert torch.equal(get(), torch.tensor([1.0, 2.0]))
    assert len(asked) == 2
