"""Whole runs of every objective on a tiny Llama."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import make_config, make_llama
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

import sempa_st
import sempa_st.training.reference
from sempa_st.data.nli import load_nli
from sempa_st.data.rows import read_rows
from sempa_st.folder.layout import ModelFolder
from sempa_st.model.tokenizer import prefix_tokens, suffix_tokens
from sempa_st.training.alignment import AlignmentTrainer
from sempa_st.training.build import build_trainer
from sempa_st.training.config import TrainConfig
from sempa_st.training.contrastive import ContrastiveTrainer
from sempa_st.training.run import load_inputs, train
from sempa_st.training.run_folder import RunFolder
from sempa_st.utils.assets import asset_path

pytestmark = pytest.mark.names_dtype

MIXED = {"objective": "dpo:0.3,one-word-listwise:1.0", "kl": 0.1, "lora_dropout": 0.05}
RUNS: dict[str, dict[str, Any]] = {
    "one-word": {"objective": "one-word"},
    "one-word-listwise": {"objective": "one-word-listwise"},
    "activated": {"objective": "one-word-listwise", "activation": "template"},
    "listwise": {"objective": "listwise"},
    "contrastive": {"objective": "contrastive"},
    "mixed": MIXED,
    "retrieval": {"objective": "retrieval", "learning_rate": 1e-2},
    "tied under the template": {"objective": "one-word-listwise", "kl": 0.1, "kl_text": "template"},
    "all at once": {
        "objective": "listwise:0.5,one-word,one-word-listwise,contrastive:0.1",
        "neutral": "second",
        "word_tokens": "all",
        "word_weights": "idf",
    },
}
ENDS = (prefix_tokens, suffix_tokens)
START = {
    "one-word": math.log(2),
    "one-word-listwise": math.log(8),
    "activated": math.log(8),
    "tied under the template": math.log(8),
    "mixed": 0.3 * math.log(2) + math.log(8),
}
"""First loss, where policy and reference are the same: all candidates are equally likely."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 triplets, every second one with a neutral sentence, and 20 graded pairs to judge on."""
    folder = tmp_path_factory.mktemp("data")
    rows = read_rows(asset_path("nli_sample.jsonl"))[:24]
    for index in range(0, len(rows), 2):
        rows[index]["neutral"] = f"{rows[index + 1]['sent1'][:-1]}, perhaps."
    (folder / "nli.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dev = asset_path("sts_sample.jsonl").read_text().splitlines(keepends=True)[:20]
    (folder / "dev.jsonl").write_text("".join(dev))
    return folder


def config_of(name: str, base: Path, data: Path, output: Path, **kwargs: Any) -> TrainConfig:
    settings = {
        "data": str(data / "nli.jsonl"),
        "dev": str(data / "dev.jsonl"),
        "epochs": 3,
        "checkpoint_samples": 24,
        **RUNS[name],
    }
    return make_config(base, output, **{**settings, **kwargs})


Runs = Callable[[str], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, data: Path) -> Runs:
    """Train by name, each once; returns the folder and the record."""

    @cache
    def trained(name: str) -> tuple[Path, dict[str, Any]]:
        output = tmp_path_factory.mktemp("runs") / "model"
        return output, train(config_of(name, tiny_base, data, output)).record

    return trained


@pytest.mark.parametrize("name", RUNS)
def test_the_objective_is_learnt(run: Runs, name: str) -> None:
    steps = run(name)[1]["training"]
    assert len(steps) == 18
    first, last = steps[:6], steps[-6:]
    if name == "listwise":  # log 6 for each row of the batch that has a neutral sentence, log 2 for the others
        longer = 4 * (steps[0]["loss"] - math.log(2)) / math.log(3)
        assert longer == pytest.approx(round(longer), abs=1e-2)
    elif name in START:
        assert steps[0]["loss"] == pytest.approx(START[name], abs=1e-3)
    assert sum(step["loss"] for step in last) < 0.9 * sum(step["loss"] for step in first)
    if name == "contrastive":  # sentence-transformers' loss has no rewards
        assert "reward_accuracy" not in steps[0]
    else:
        for figure in ("reward_accuracy", "reward_margin"):
            assert sum(step[figure] for step in last) > sum(step[figure] for step in first)
        assert sum(step["reward_accuracy"] for step in last) > 6 * 0.8
    assert ("kl" in steps[-1]) == ("kl" in RUNS[name])
    if "kl" in RUNS[name]:
        assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert steps[-1]["kl"] > 1e-3


@pytest.mark.parametrize("name", RUNS)
def test_the_adapter_moved_and_the_base_did_not(run: Runs, name: str, tiny_base: Path) -> None:
    output, _ = run(name)
    tensors = load_file(output / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in tensors.values())
    vectors = [
        sempa_st.load(path, dtype="float32", device="cpu").encode("A cat sleeps") for path in (tiny_base, output)
    ]
    assert abs(vectors[0] - vectors[1]).max() > 1e-3
    fresh = make_llama().state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in load_file(tiny_base / "model.safetensors").items())


def test_the_kl_term_under_the_template_is_torchs_divergence_on_the_sentences_tokens(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    config = config_of("tied under the template", tiny_base, data, tmp_path / "model", kl_positions=10_000)
    trainer = build_trainer(load_inputs(config, "cpu"), RunFolder(tmp_path / "model"))
    assert isinstance(trainer, AlignmentTrainer)
    tuned = trainer.generator()
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = []
    for triplet in load_nli(config.data).triplets[:4]:
        for sentence in (triplet.premise, triplet.entailed, triplet.contradicted):
            (tokens,) = trainer._module.token_rows([sentence])
            before, after = (len(tokenizer_tokens(trainer._module.tokenizer, "prompteol")) for tokenizer_tokens in ENDS)
            with torch.no_grad():
                policy = tuned(torch.tensor([tokens])).logits[0, before - 1 : len(tokens) - after]
                with tuned.disable_adapter():
                    reference = tuned(torch.tensor([tokens])).logits[0, before - 1 : len(tokens) - after]
            logs = [torch.log_softmax(logits, dim=-1) for logits in (policy, reference)]
            expected += torch.nn.functional.kl_div(*logs, log_target=True, reduction="none").sum(-1).tolist()
    batch = trainer.data_collator([{"index": index} for index in range(4)])
    assert trainer._kl(batch).item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert sum(expected) / len(expected) > 1e-3


@pytest.mark.parametrize("name", RUNS)
def test_the_record_names_the_objective(run: Runs, name: str) -> None:
    output, record = run(name)
    assert ModelFolder(output).record == record
    assert record["objective"] == RUNS[name]["objective"]
    assert [score["samples"] for score in record["dev"]["scores"]] == [0, 24, 48, 72]
    assert RUNS[name]["objective"] in (output / "README.md").read_text()
    assert not output.with_name("model.training").exists()


@pytest.mark.parametrize("name", ["mixed", "all at once"])
def test_half_precision_trains_too(run: Runs, name: str, tiny_base: Path, data: Path, tmp_path: Path) -> None:
    record = train(config_of(name, tiny_base, data, tmp_path / "model", dtype="bfloat16", epochs=0.5)).record
    losses = [step["loss"] for step in record["training"]]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(run(name)[1]["training"][0]["loss"], rel=0.02)
    assert all(math.isfinite(loss) for loss in losses)


class InterruptError(Exception):
    pass


@pytest.mark.parametrize(("name", "trainer"), [("mixed", AlignmentTrainer), ("contrastive", ContrastiveTrainer)])
def test_resume_ends_where_an_unbroken_run_ends(
    run: Runs, name: str, trainer: Any, tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random draws included: of dropout, and of the positions of ordinary text."""
    unbroken, expected = run(name)
    config = config_of(name, tiny_base, data, tmp_path / "model")
    original = trainer.training_step
    calls = 0

    def fail_later(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 9:
            raise InterruptError
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(InterruptError):
        patch.setattr(trainer, "training_step", fail_later)
        train(config)
    record = train(replace(config, resume=True)).record
    assert [step["loss"] for step in record["training"]] == [step["loss"] for step in expected["training"]]
    assert record["dev"]["scores"] == expected["dev"]["scores"]
    tensors = [load_file(path / "adapter_model.safetensors") for path in (unbroken, tmp_path / "model")]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])


def test_two_processes_take_the_steps_of_one(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    """Two processes with one batch each see what one process sees in two batches: the gradients must be averaged."""
    shared = {"max_triplets": 16, "batch_size": 2, "epochs": 1, "checkpoint_samples": 16, "learning_rate": 1e-3}
    config = config_of("one-word-listwise", tiny_base, data, tmp_path / "one", gradient_accumulation=2, **shared)
    record = train(config).record
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in shared.items())
    arguments = (
        f"-m torch.distributed.run --standalone --nproc_per_node 2 -m sempa_st train --objective one-word-listwise "
        f"--base {tiny_base} --data {config.data} --dev {config.dev} --gradient-accumulation 1 --device cpu "
        f"--dtype float32 --max-seq-length 200 --output {tmp_path / 'two'} {flags}"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, *arguments.split()]
    result = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(record["training"]) == 4
    both = json.loads((tmp_path / "two" / "sempa_run.json").read_text())
    losses = [[step["loss"] for step in found["training"]] for found in (record, both)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert max(float(tensor.abs().max()) for name, tensor in one.items() if "lora_B" in name) > 1e-3
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("objective", "kinds"), [("one-word", 1), ("dpo,one-word-listwise", 2)])
def test_the_reference_is_run_once(
    tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str, kinds: int
) -> None:
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(tmp_path / "cache"))
    runs = 0
    original = sempa_st.training.reference.collect

    def counted(*args: Any) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return original(*args)

    monkeypatch.setattr(sempa_st.training.reference, "collect", counted)

    def batch(**kwargs: Any) -> tuple[int, dict[str, torch.Tensor]]:
        """Build a trainer; return how often the reference was run for it, and what it says of four triplets."""
        before = runs
        config = config_of("one-word", tiny_base, data, tmp_path / "m", **{"objective": objective, **kwargs})
        trainer: Any = build_trainer(load_inputs(config, "cpu"), RunFolder(tmp_path / "m"))
        found = trainer.data_collator([{"index": index} for index in range(4)])
        return runs - before, {name: tensor for name, tensor in found.items() if name.startswith("reference_")}

    count, expected = batch()
    assert count == len(expected) == kinds
    for other in ({}, {"seed": 1}, {"beta": 0.3, "word_beta": 2.0, "word_forms": "lower", "lora_r": 2}):
        count, found = batch(**other)
        assert count == 0
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert batch(max_triplets=20)[0] == kinds
    assert batch(template="pretended-cot")[0] == 1  # answers to paraphrase requests never see the template
    for path in (tmp_path / "cache" / "reference").iterdir():
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if kinds == 1 else b"")
    count, found = batch()
    assert count == kinds
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert batch()[0] == 0


@pytest.mark.parametrize("name", ["one-word-listwise", "contrastive", "dpo"])
def test_full_tuning_writes_a_whole_model(tmp_path: Path, tiny_base: Path, data: Path, name: str) -> None:
    settings = {"objective": name, "tuning": "full", "learning_rate": 1e-3, "epochs": 1}
    train(config_of("one-word-listwise", tiny_base, data, tmp_path / "m", **settings))
    assert not (tmp_path / "m" / "adapter_config.json").exists()
    before = load_file(tiny_base / "model.safetensors")
    after = load_file(tmp_path / "m" / "model.safetensors")
    assert sum(not torch.equal(before[key], tensor) for key, tensor in after.items()) > len(after) / 2
    ours = sempa_st.load(tmp_path / "m", dtype="float32", device="cpu").encode("A cat sleeps")
    plain = SentenceTransformer(str(tmp_path / "m"), device="cpu").encode("A cat sleeps")
    assert ours == pytest.approx(plain, abs=1e-5)
