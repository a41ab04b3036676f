from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl.trainer.utils
from helpers.families import make_causal_lm
from helpers.tiny import make_config, make_llama, make_tokenizer, randomise, save_base
from safetensors.torch import load_file
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from trl import DPOTrainer

import sempa_st
from sempa_st.data.sts import dev_pairs
from sempa_st.errors import SempaError
from sempa_st.folder.resolve import describe_method, find_model
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.model.tokenizer import install_template, load_tokenizer
from sempa_st.training.build import build_trainer
from sempa_st.training.dev_score import DevScorer
from sempa_st.training.dpo import PreferenceTrainer
from sempa_st.training.run import load_inputs, train
from sempa_st.training.run_folder import RunFolder

pytestmark = pytest.mark.names_dtype


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("trained") / "tiny-sempa"
    return output, train(make_config(tiny_base, output, epochs=3)).record


def test_loss_falls_and_reward_accuracy_rises(trained: tuple[Path, dict[str, Any]]) -> None:
    steps = trained[1]["training"]
    assert len(steps) == 18
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference start equal
    first, last = steps[:6], steps[-6:]
    for key, sign in (("loss", -1), ("reward_accuracy", 1), ("reward_margin", 1)):
        assert sign * (sum(s[key] for s in last) - sum(s[key] for s in first)) > 0, key


def test_the_folder_holds_the_best_checkpoint(trained: tuple[Path, dict[str, Any]]) -> None:
    output, record = trained
    scores = record["dev"]["scores"]
    assert [score["samples"] for score in scores] == [0, 8, 16, 24, 32, 40, 48, 56, 64, 72]
    best = max(scores[1:], key=lambda score: score["spearman"])
    assert record["best_step"] == best["step"]
    pairs = dev_pairs("sample", None)
    model = sempa_st.load(output, dtype="float32", device="cpu")
    vectors = [model.encode(list(side), convert_to_tensor=True) for side in (pairs.first, pairs.second)]
    cosine = torch.nn.functional.cosine_similarity(*vectors)
    assert 100 * spearmanr(cosine, pairs.scores).statistic == pytest.approx(best["spearman"], abs=1e-2)


def test_the_adapter_moved_and_the_base_did_not(trained: tuple[Path, dict[str, Any]], tiny_base: Path) -> None:
    tensors = load_file(trained[0] / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for tensor in tensors.values())
    before = sempa_st.load(tiny_base, dtype="float32", device="cpu").encode("A cat sleeps")
    after = sempa_st.load(trained[0], dtype="float32", device="cpu").encode("A cat sleeps")
    assert abs(before - after).max() > 1e-3
    fresh = make_llama().state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in load_file(tiny_base / "model.safetensors").items())


def test_the_run_record_tells_how_to_repeat_it(trained: tuple[Path, dict[str, Any]], tiny_base: Path) -> None:
    record = json.loads((trained[0] / "sempa_run.json").read_text())
    assert record["base"] == tiny_base.name
    assert record["config"]["seed"] == 42
    assert record["data"]["source"] == "sample"
    assert record["data"]["triplets"] == 24
    assert len(record["data"]["sha256"]) == 64
    assert {"torch", "trl", "peft", "transformers"} <= record["versions"].keys()
    assert record["command"]
    assert not trained[0].with_name("tiny-sempa.training").exists()


def test_plain_readers_open_the_folder(trained: tuple[Path, dict[str, Any]]) -> None:
    native = SentenceTransformer(str(trained[0]), device="cpu").encode(["A cat", "A dog"])
    ours = sempa_st.load(trained[0], dtype="float32", device="cpu").encode(["A cat", "A dog"])
    assert native == pytest.approx(ours, abs=1e-4)
    card = (trained[0] / "README.md").read_text()
    assert "library_name: sentence-transformers" in card
    assert 'SentenceTransformer("tiny-sempa")' in card


def test_patience_ends_a_run_whose_dev_score_has_stopped_rising(
    trained: tuple[Path, dict[str, Any]], tiny_base: Path, tmp_path: Path
) -> None:
    whole = trained[1]["dev"]["scores"]
    values = [score["spearman"] for score in whole]
    stop = next(n for n in range(2, len(values)) if values[n] <= max(values[1:n]))
    assert stop < len(values) - 1, "the whole run rises all the time, so this test shows nothing"
    record = train(make_config(tiny_base, tmp_path / "model", epochs=3, patience=1)).record
    assert record["dev"]["scores"] == whole[: stop + 1]
    assert record["best_step"] == max(whole[1 : stop + 1], key=lambda score: score["spearman"])["step"]


class InterruptError(Exception):
    pass


@pytest.mark.parametrize("stop_after", [3, 7])
def test_resume_ends_where_an_unbroken_run_ends(
    trained: tuple[Path, dict[str, Any]],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stop_after: int,
) -> None:
    config = make_config(tiny_base, tmp_path / "model", epochs=3)
    original = PreferenceTrainer.training_step
    calls = 0

    def fail_later(self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > stop_after:
            raise InterruptError
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(InterruptError):
        patch.setattr(PreferenceTrainer, "training_step", fail_later)
        train(config)
    assert "with --resume to continue" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    with pytest.raises(SempaError, match=r"an unfinished run in.*--resume"):
        train(config)
    with pytest.raises(SempaError, match=r"started with learning_rate = 0.005, now it is 0.1"):
        train(replace(config, resume=True, learning_rate=0.1))

    record = train(replace(config, resume=True)).record
    assert [step["loss"] for step in record["training"]] == [step["loss"] for step in trained[1]["training"]]
    assert record["dev"]["scores"] == trained[1]["dev"]["scores"]
    unbroken = load_file(trained[0] / "adapter_model.safetensors")
    resumed = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_a_failure_before_the_first_checkpoint_leaves_nothing(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise InterruptError

    monkeypatch.setattr(PreferenceTrainer, "training_step", fail)
    with pytest.raises(InterruptError):
        train(make_config(tiny_base, tmp_path / "model"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("triplets", [2, 4, 96])
def test_every_run_ends_with_an_adapter_that_loads(tiny_base: Path, tmp_path: Path, triplets: int) -> None:
    """However short: a first warm-up step of rate 0 must not be all there is."""
    config = make_config(tiny_base, tmp_path / "model", max_triplets=triplets, checkpoint_samples=4)
    record = train(replace(config, dev_batch_size=128)).record
    assert record["best_step"] >= 1
    sempa_st.load(tmp_path / "model", dtype="float32", device="cpu")


def test_a_run_never_replaces_its_base(tiny_base: Path) -> None:
    with pytest.raises(SempaError, match="which is read from"):
        train(make_config(tiny_base, tiny_base, overwrite=True))


def test_two_processes_train_one_model(tiny_base: Path, tmp_path: Path) -> None:
    """As on several GPUs, over the CPU: one folder, and one error for all when there is one."""
    arguments = (
        f"-m torch.distributed.run --standalone --nproc_per_node 2 -m sempa_st train --base {tiny_base} --data sample "
        f"--dev sample --max-triplets 16 --batch-size 2 --gradient-accumulation 2 --device cpu --dtype float32 "
        f"--output {tmp_path / 'model'}"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, *arguments.split()]
    result = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Wrote") == 1
    record = json.loads((tmp_path / "model" / "sempa_run.json").read_text())
    assert [score["samples"] for score in record["dev"]["scores"]] == [0, 16]
    assert len(record["training"]) == 2  # 16 triplets in steps of 2 x 2 x 2
    again = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300)
    assert again.returncode != 0
    assert again.stderr.count("is not empty") == 1


def test_there_must_be_something_to_resume(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(SempaError, match="no unfinished run"):
        train(make_config(tiny_base, tmp_path / "model", resume=True))


def test_a_base_without_chat_template_trains_on_plain_text(
    tiny_gemma: Path, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = run_cli(
        "train", "--base", tiny_gemma, "--data", "sample", "--output", tmp_path / "model", "--max-triplets", 8,
        "--batch-size", 4, "--gradient-accumulation", 1, "--dev", "sample", "--format", "custom", "--device", "cpu",
        "--dtype", "float32",
    )  # fmt: skip
    assert code == 0, err
    assert "<- kept" in out
    assert "'loss'" not in out + err  # the trainer's own lines of figures; ours are the bar and the table
    assert describe_method(find_model(str(tmp_path / "model"))) == "sempa"
    assert (tmp_path / "model" / "prompt_eol.py").is_file()


def sequence_log_probability(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, completion: torch.Tensor
) -> torch.Tensor:
    """Sum of the completion's token log-probabilities, from full logits."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    picked = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (picked * completion[:, 1:]).sum(1)


def test_the_loss_is_trls_and_a_manual_one(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tiny_base, tmp_path / "m")
    trainer = build_trainer(load_inputs(config, "cpu"), RunFolder(tmp_path / "m"))
    randomise(trainer.model)
    trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))

    scored = []
    original = trl.trainer.utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        trl.trainer.utils._ChunkedLogProbFunction,
        "apply",
        lambda hidden, *rest: (scored.append(hidden.shape[0]), original(hidden, *rest))[1],
    )
    with torch.no_grad():
        ours = trainer.compute_loss(trainer.model, batch)
        completion_tokens = int(batch["completion_mask"].sum())
        assert scored == [completion_tokens]  # what TRL scores on a GPU; the reference was run before
        trls = DPOTrainer.compute_loss(trainer, trainer.model, batch)
        arguments = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
        policy = sequence_log_probability(trainer.model, *arguments)
        with trainer.model.disable_adapter():
            reference = sequence_log_probability(trainer.model, *arguments)
    chosen, rejected = (policy - reference).chunk(2)
    manual = -torch.nn.functional.logsigmoid(config.beta * (chosen - rejected)).mean()
    assert ours == pytest.approx(float(trls), abs=1e-6)
    assert ours == pytest.approx(float(manual), abs=1e-5)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_reference_is_run_once_for_all_runs(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tuning: str
) -> None:
    """Its columns are a manual pass of the base over the rows; a second run on the same data reads them."""
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(tmp_path / "cache"))
    config = make_config(tiny_base, tmp_path / "m", tuning=tuning)
    trainer = build_trainer(load_inputs(config, "cpu"), RunFolder(tmp_path / "m"))
    rows = list(trainer.train_dataset)
    assert len(rows) == 24
    base = make_llama()
    for row in rows:
        for name in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{name}_ids"]])
            completion = torch.zeros_like(ids)
            completion[:, len(row["prompt_ids"]) :] = 1
            with torch.no_grad():
                expected = sequence_log_probability(base, ids, torch.ones_like(ids), completion)
            assert row[f"ref_{name}_logps"] == pytest.approx(float(expected), abs=1e-4)

    def fail(*args: Any) -> Any:
        raise AssertionError("the reference was run again")

    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", fail)
    again = build_trainer(load_inputs(config, "cpu"), RunFolder(tmp_path / "m"))
    assert list(again.train_dataset) == rows
    with pytest.raises(AssertionError, match="run again"):
        build_trainer(load_inputs(replace(config, paraphrase="generate"), "cpu"), RunFolder(tmp_path / "m"))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_prompts_are_run_once_for_trls_gradients(tiny_base: Path, tmp_path: Path, tuning: str) -> None:
    config = make_config(tiny_base, tmp_path / "m", tuning=tuning)
    trainer = build_trainer(load_inputs(config, "cpu"), RunFolder(tmp_path / "m"))
    model: Any = trainer.model
    if tuning == "lora":
        randomise(model)
    batch = next(iter(trainer.get_train_dataloader()))
    tokens: list[int] = []
    decoder = trainer.generator().get_base_model().base_model if tuning == "lora" else model.base_model
    decoder.embed_tokens.register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
    gradients, seen = [], []
    for compute_loss in (PreferenceTrainer.compute_loss, DPOTrainer.compute_loss):
        compute_loss(trainer, model, batch).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
        seen.append(sum(tokens))
        tokens.clear()
    assert seen[1] == batch["input_ids"].numel()
    prompts = int((batch["completion_mask"].argmax(dim=1)).min()) * len(batch["input_ids"]) // 2
    assert seen[0] <= seen[1] - prompts
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_the_dev_score_is_scipys_on_the_embeddings(tiny_base: Path) -> None:
    pairs = dev_pairs("sample", None)
    tokenizer = load_tokenizer(tiny_base)
    install_template(tokenizer, EMBEDDING_TEMPLATES["prompteol"])
    scorer = DevScorer(pairs, tokenizer, template="prompteol", max_seq_length=200, batch_size=16)
    model = sempa_st.load(tiny_base, dtype="float32", device="cpu")
    vectors = [model.encode(list(side), convert_to_tensor=True) for side in (pairs.first, pairs.second)]
    expected = spearmanr(torch.nn.functional.cosine_similarity(*vectors), pairs.scores).statistic
    assert scorer(make_llama()) == pytest.approx(100 * expected, abs=1e-3)


@pytest.mark.parametrize("objective", ["dpo", "listwise", "contrastive"])
def test_lengths_are_cut_to_the_positions_of_the_base(objective: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_causal_lm("opt", max_position_embeddings=96), make_tokenizer(chat=None))
    config = make_config(base, tmp_path / "out", objective=objective, kl=0.1 if objective == "listwise" else 0.0)
    record = train(replace(config, max_seq_length=512, max_length=1024)).record
    assert record["config"]["max_length"] == 1024
    settings = json.loads((tmp_path / "out" / "sentence_bert_config.json").read_text())
    assert settings["max_seq_length"] == 96
    long = ["A cat sleeps in the snow. " * 60]
    plain = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(long)
    ours = sempa_st.load(tmp_path / "out", device="cpu", dtype="float32").encode(long)
    np.testing.assert_allclose(plain, ours, rtol=0, atol=1e-3)
