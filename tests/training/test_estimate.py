"""The estimate on the meta device against what PyTorch's profiler counts in a real step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.rows import write_rows
from helpers.tiny import finish_adapter, make_config, make_llama, make_tokenizer, save_base
from torch.profiler import ProfilerActivity, profile

from sempa_st.data.nli import load_nli
from sempa_st.training.build import build_trainer
from sempa_st.training.estimate import MemoryEstimate, estimate_memory
from sempa_st.training.run import load_inputs
from sempa_st.training.run_folder import RunFolder

pytestmark = pytest.mark.names_dtype


def longest_triplets(path: Path, count: int) -> Path:
    """Write the shipped triplets with the most text, so that the only batch is the largest one."""
    triplets = sorted(
        load_nli("sample").triplets,
        key=lambda triplet: len(triplet.premise) + len(triplet.entailed) + len(triplet.contradicted),
    )
    rows = [{"sent0": t.premise, "sent1": t.entailed, "hard_neg": t.contradicted} for t in triplets[-count:]]
    return write_rows(path, rows)


def counted_peak(trainer: Any, path: Path) -> int:
    """Return the most bytes that the allocator held during a step above what it held before, as the profiler tells."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, batch)  # what only the first step allocates, gradients included
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.training_step(trainer.model, batch)
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    sizes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    held, peak = 0, 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "dpo"},
        {"objective": "contrastive"},
        {"objective": "contrastive", "kl": 1.0},
        {"objective": "contrastive", "kl": 1.0, "kl_text": "template"},
        {"objective": "contrastive", "tuning": "full"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_the_estimate_is_what_a_step_takes(tiny_base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    data = longest_triplets(tmp_path / "nli.jsonl", 8)
    config = make_config(
        tiny_base, tmp_path / "model", data=str(data), max_triplets=None, batch_size=8, max_length=300, **settings
    )
    estimate = estimate_memory(config)
    trainer = build_trainer(load_inputs(config, "cpu"), RunFolder(tmp_path / "model"))
    parameters = list(trainer.generator().parameters())
    trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    assert estimate.gradients == trained
    assert estimate.optimiser == 2 * trained
    buffers = sum(buffer.nbytes for buffer in trainer.generator().buffers())
    assert estimate.weights == sum(parameter.nbytes for parameter in parameters) + buffers
    assert estimate.activations == pytest.approx(counted_peak(trainer, tmp_path / "trace.json"), rel=0.15)


def test_the_start_of_a_run_decides_its_adapter(tiny_base: Path, tmp_path: Path) -> None:
    settings = {"objective": "contrastive", "batch_size": 8}
    start = finish_adapter(tmp_path / "start", tiny_base, make_llama(), r=2)
    again = estimate_memory(
        make_config(tiny_base, tmp_path / "model", **settings, from_=str(start), max_seq_length=160)
    )
    expected = make_config(tiny_base, tmp_path / "model", **settings, lora_r=2, max_seq_length=160)
    assert again == estimate_memory(expected)


def test_pairs_under_names_of_their_own_take_less(tiny_base: Path, tmp_path: Path) -> None:
    triplets = load_nli("sample").triplets
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"question": t.premise, "answer": t.entailed} for t in triplets])
    settings = {"objective": "contrastive", "batch_size": 8}
    config = make_config(
        tiny_base, tmp_path / "model", **settings, data=str(pairs), columns="anchor=question,positive=answer"
    )
    with_negatives = estimate_memory(make_config(tiny_base, tmp_path / "model", **settings))
    assert estimate_memory(config).activations < 0.8 * with_negatives.activations


def test_weights_in_4_bits_are_counted_as_bitsandbytes_stores_them(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = save_base(tmp_path / "base", make_llama(hidden=256), make_tokenizer())
    settings = {"objective": "contrastive", "batch_size": 8, "dtype": "float32"}
    config = make_config(base, tmp_path / "model", **settings, load_in_4bit=True)
    model = load_inputs(config, "cpu").model
    stored = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            stored += state.absmax.nbytes + state.state2.absmax.nbytes
    whole = estimate_memory(make_config(base, tmp_path / "model", **settings)).weights
    plain = sum(parameter.nbytes for parameter in make_llama(hidden=256).parameters())
    assert whole - estimate_memory(config).weights == pytest.approx(plain - stored, rel=0.01)


def test_checkpointed_activations_take_less(tiny_base: Path, tmp_path: Path) -> None:
    config = make_config(tiny_base, tmp_path / "model", objective="contrastive")
    kept = estimate_memory(config).activations
    config.gradient_checkpointing = True
    assert estimate_memory(config).activations < 0.7 * kept


def test_the_peak_is_that_of_a_step_or_of_the_reference() -> None:
    assert MemoryEstimate(weights=100, gradients=1, optimiser=2, activations=40, reference=30).peak == 143
    assert MemoryEstimate(weights=100, gradients=1, optimiser=2, activations=10, reference=30).peak == 130


def test_the_command_prints_it_and_writes_nothing(tiny_base: Path, tmp_path: Path, run_cli: Any) -> None:
    output = tmp_path / "model"
    code, out, err = run_cli(
        "train", "--base", tiny_base, "--data", "sample", "--output", output, "--dtype", "float32", "--device", "cpu",
        "--estimate",
    )  # fmt: skip
    assert code == 0, err
    for part in ("weights", "gradients", "optimiser", "activations", "reference", "peak", "GiB"):
        assert part in out
    assert list(tmp_path.iterdir()) == []
