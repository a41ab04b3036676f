"""Runs that go on from a trained adapter (``--from``)."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import finish_adapter, make_config, make_llama
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch.nn import functional

import sempa_st
from sempa_st.data.sts import dev_pairs
from sempa_st.errors import SempaError
from sempa_st.folder.layout import ModelFolder
from sempa_st.model.tokenizer import prefix_tokens, suffix_tokens
from sempa_st.training.build import build_trainer
from sempa_st.training.run import load_inputs, train
from sempa_st.training.run_folder import RunFolder

pytestmark = pytest.mark.names_dtype

SHORT = {"max_triplets": 8, "checkpoint_samples": 8, "dev_batch_size": 128, "learning_rate": 1e-3}
WEIGHTS = "adapter_model.safetensors"


def from_config(folder: Path, output: Path, **kwargs: Any) -> Any:
    """Return settings that leave base and adapter settings to the start."""
    settings = {"from_": str(folder), "max_seq_length": 512, **SHORT, **kwargs}
    return make_config(Path("gemma3-270m"), output, **settings)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """An adapter on some layers, of another rank and alpha than the defaults."""
    folder = tmp_path_factory.mktemp("start") / "first"
    return finish_adapter(folder, tiny_base, make_llama(), r=4, alpha=12, layers=[1, 2])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, start: Path) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("runs") / "second"
    return output, train(from_config(start, output, objective="dpo")).record


def test_the_first_loss_is_log_2_since_the_reference_is_the_start(run: tuple[Path, dict[str, Any]]) -> None:
    steps = run[1]["training"]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert abs(steps[1]["loss"] - math.log(2)) > 1e-5


def test_the_adapter_moves_from_where_it_was(run: tuple[Path, dict[str, Any]], start: Path, tiny_base: Path) -> None:
    before, after = load_file(start / WEIGHTS), load_file(run[0] / WEIGHTS)
    assert before.keys() == after.keys()
    moved = [float((after[name] - before[name]).norm() / before[name].norm()) for name in before]
    assert min(moved) > 0
    assert max(moved) < 0.5  # it is the old adapter, and not a new one
    fresh = make_llama().state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in load_file(tiny_base / "model.safetensors").items())


def test_the_record_keeps_what_it_started_from(run: tuple[Path, dict[str, Any]], start: Path, tiny_base: Path) -> None:
    record = json.loads((run[0] / "sempa_run.json").read_text())
    assert record["started_from"] == {"model": "first", "sha256": ModelFolder(start).digest}
    assert record["base"] == record["config"]["base"] == tiny_base.name
    names = ("lora_r", "lora_alpha", "lora_layers", "max_seq_length", "template", "activation")
    assert [record["config"][name] for name in names] == [4, 12, "1,2", 160, "prompteol", "always"]
    card = (run[0] / "README.md").read_text()
    assert "LoRA, r 4, alpha 12" in card
    assert "| started from | the adapter first (SHA-256" in card
    own = json.loads((run[0] / "adapter_config.json").read_text())
    assert (own["r"], own["layers_to_transform"]) == (4, [1, 2])
    assert own["base_model_name_or_path"] == str(tiny_base)


def test_the_score_before_training_is_that_of_the_start(run: tuple[Path, dict[str, Any]], start: Path) -> None:
    pairs = dev_pairs("sample", None)
    model = sempa_st.load(start, dtype="float32", device="cpu")
    vectors = [model.encode(list(side), convert_to_tensor=True) for side in (pairs.first, pairs.second)]
    expected = 100 * spearmanr(torch.nn.functional.cosine_similarity(*vectors), pairs.scores).statistic
    assert run[1]["dev"]["scores"][0]["spearman"] == pytest.approx(expected, abs=1e-2)


def test_a_run_goes_on_from_a_run(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """With other losses, which all start from equal candidates, and dropout of its own."""
    objective = "listwise:0.5,one-word-listwise:1"
    record = train(from_config(run[0], tmp_path / "third", objective=objective, lora_dropout=0.1)).record
    assert record["started_from"]["model"] == "second"
    assert json.loads((tmp_path / "third" / "adapter_config.json").read_text())["lora_dropout"] == 0.1
    # Dropout moves the policy off its reference, which has none, but not far.
    assert record["training"][0]["loss"] == pytest.approx(0.5 * math.log(2) + math.log(8), abs=0.2)


@pytest.mark.parametrize("kind", ["sentence", "template"])
def test_an_activated_adapter_stays_one(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    tokenizer = sempa_st.load(tiny_base, dtype="float32", device="cpu").tokenizer
    tokens = {"sentence": prefix_tokens, "template": suffix_tokens}[kind](tokenizer, "prompteol")
    first = finish_adapter(tmp_path / "a", tiny_base, make_llama(), format="custom", invocation=tokens)
    record = train(from_config(first, tmp_path / "b", objective="one-word-listwise")).record
    assert record["training"][0]["loss"] == pytest.approx(math.log(8), abs=1e-4)
    assert record["config"]["activation"] == kind
    folder = ModelFolder(tmp_path / "b")
    assert (folder.invocation, folder.format) == (tokens, "custom")
    before, after = (
        sempa_st.load(path, dtype="float32", device="cpu").encode("A cat") for path in (first, tmp_path / "b")
    )
    assert abs(before - after).max() > 1e-3


def test_the_kl_term_is_to_the_bare_base(start: Path, tmp_path: Path) -> None:
    """Its purpose is to stay close to the base, from which the start has moved away."""
    record = train(from_config(start, tmp_path / "m", objective="contrastive", kl=0.1)).record
    assert record["training"][0]["kl"] > 1e-3


def test_another_start_is_another_reference_and_another_run(start: Path, adapter_folder: Path, tmp_path: Path) -> None:
    found = []
    for folder in (start, adapter_folder):
        inputs = load_inputs(from_config(folder, tmp_path / "m", objective="one-word"), "cpu")
        trainer: Any = build_trainer(inputs, RunFolder(tmp_path / "m"))
        states = trainer.data_collator([{"index": 0}])["reference_states"][0]
        module = sempa_st.load(folder, dtype="float32", device="cpu")
        expected = module.encode(inputs.data.triplets[0].premise, convert_to_tensor=True)
        torch.testing.assert_close(functional.normalize(states, dim=0), expected, rtol=0, atol=1e-5)
        found.append(inputs.identity)
    assert found[0]["from_sha256"] == ModelFolder(start).digest != found[1]["from_sha256"]


def test_settings_that_contradict_the_adapter_are_refused(start: Path, tiny_base: Path, tmp_path: Path) -> None:
    for settings, message in [
        ({"lora_r": 16}, r"lora_r is 16, and the adapter of --from .* has 4\. Leave the setting out"),
        ({"lora_layers": "0-1"}, r"lora_layers is '0,1', and the adapter .* has '1,2'"),
        ({"activation": "sentence", "objective": "contrastive"}, r"activation is 'sentence', .* has 'always'"),
        ({"template": "pretended-cot"}, r"template is 'pretended-cot', .* has 'prompteol'"),
        ({"from_": str(tiny_base)}, r"--from .* is no adapter .* a whole model is given as --base"),
    ]:
        with pytest.raises(SempaError, match=message):
            train(from_config(start, tmp_path / "m", **settings))
    with pytest.raises(SempaError, match=r"which is read from"):
        train(from_config(start, start, overwrite=True))
    assert load_inputs(from_config(start, tmp_path / "m", lora_layers="1-2", lora_r=4), "cpu").start
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sempa-gemma3-270m", ""])
def test_an_adapter_as_base_is_refused_with_the_flag_to_use(
    start: Path, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]], name: str
) -> None:
    base = name or start
    code, _, err = run_cli("train", "--base", base, "--data", "sample", "--dev", "sample", "--output", tmp_path / "m")
    assert (code, err) == (2, f"sempa: --base {base} is an adapter. To go on from it: --from {base}.\n")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"peft_type": "x"}, "is of type x. Expected LORA."),
        ({"task_type": "x"}, "cannot be used on the base .* Invalid task type: 'x'"),
        ({"target_modules": ["x"]}, "cannot be used on the base .* pass another one with --base"),
        ({"layers_to_transform": [999]}, "cannot be used on the base .* pass another one with --base"),
    ],
)
def test_an_adapter_that_does_not_match_its_base_is_refused(
    start: Path, tmp_path: Path, setting: dict[str, Any], told: str
) -> None:
    odd = shutil.copytree(start, tmp_path / "odd")
    settings = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps({**settings, **setting}))
    with pytest.raises(SempaError, match=told):
        load_inputs(from_config(odd, tmp_path / "out"), "cpu")


@pytest.mark.parametrize("init", ["x", "corda"])
def test_an_adapter_that_peft_cannot_make_anew_is_refused(start: Path, tmp_path: Path, init: str) -> None:
    odd = shutil.copytree(start, tmp_path / "odd")
    settings = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps({**settings, "init_lora_weights": init}))
    with pytest.raises(
        SempaError, match=r"cannot be trained further: PEFT does not make .*Mend its adapter_config.json"
    ):
        train(from_config(odd, tmp_path / "out"))
