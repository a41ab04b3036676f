"""What a run leaves: the model folder with the base's own chat template, and the models of all checkpoints."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import CHAT_TEMPLATE, make_config
from safetensors.torch import load_file
from scipy.stats import spearmanr
from transformers import AutoTokenizer

import sempa_st
from sempa_st.checks.record_schema import RunRecord
from sempa_st.data.sts import dev_pairs
from sempa_st.errors import SempaError
from sempa_st.model.tokenizer import own_chat_template
from sempa_st.training.build import build_trainer
from sempa_st.training.config import TrainConfig
from sempa_st.training.dpo import PreferenceTrainer
from sempa_st.training.run import load_inputs, train
from sempa_st.training.run_folder import RunFolder
from sempa_st.utils.assets import asset_path
from sempa_st.utils.files import read_json

pytestmark = pytest.mark.names_dtype

START = {"llama2": "<bos>[INST] <<SYS>>\nYou are", "none": "<bos>Keep the", "auto": "<bos>[system] You are"}
"""How a prompt begins on the tiny Llama."""


@pytest.mark.parametrize(("chat_format", "own"), [("llama2", True), ("file", True), ("llama2", False)])
def test_the_folder_has_the_bases_own_chat_template(
    tiny_base: Path, tiny_gemma: Path, tmp_path: Path, chat_format: str, own: bool
) -> None:
    file = tmp_path / "format.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    given = str(file) if chat_format == "file" else chat_format
    config = make_config(
        tiny_base if own else tiny_gemma, tmp_path / "model", chat_format=given, max_triplets=4, checkpoint_samples=4
    )
    record = train(config).record
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert own_chat_template(tokenizer) == (CHAT_TEMPLATE if own else None)
    assert record["config"]["chat_format"] == ("format.jinja" if chat_format == "file" else chat_format)
    text = {"llama2": asset_path("chat_formats/llama2.jinja"), "file": file}.get(chat_format)
    digest = hashlib.sha256(text.read_bytes()).hexdigest() if text else None
    assert record["data"]["chat_template_sha256"] == digest
    RunRecord.model_validate(read_json(tmp_path / "model" / "sempa_run.json"))


@pytest.mark.parametrize(
    ("chat_format", "objective"), [*((name, "dpo") for name in START), ("llama2", "listwise"), ("none", "listwise")]
)
def test_prompts_are_in_the_chat_format(tiny_base: Path, tmp_path: Path, chat_format: str, objective: str) -> None:
    """The reference is cached by format: each run finds its own results."""
    config = make_config(tiny_base, tmp_path / "m", max_triplets=4, objective=objective, chat_format=chat_format)
    trainer = build_trainer(load_inputs(config, "cpu"), RunFolder(tmp_path / "m"))
    batch = next(iter(trainer.get_train_dataloader()))
    ids = batch["input_ids" if objective == "dpo" else "answer_input_ids"]
    texts = AutoTokenizer.from_pretrained(tiny_base).batch_decode(ids)
    assert all(text.replace("<pad>", "").startswith(START[chat_format]) for text in texts)
    trainer.model.eval()
    assert float(trainer.compute_loss(trainer.model, batch).detach()) == pytest.approx(0.6931, abs=1e-3)


def test_the_optimiser_has_the_settings(tiny_base: Path, tmp_path: Path) -> None:
    config = make_config(tiny_base, tmp_path / "m", max_triplets=4, adam_beta2=0.95, adam_beta1=0.8, weight_decay=0.1)
    for objective in ("dpo", "listwise", "contrastive"):
        inputs = load_inputs(replace(config, objective=objective), "cpu")
        optimizer = build_trainer(inputs, RunFolder(tmp_path / "m")).create_optimizer()
        assert type(optimizer) is torch.optim.AdamW
        assert {group["betas"] for group in optimizer.param_groups if group["params"]} == {(0.8, 0.95)}
        assert {group["weight_decay"] for group in optimizer.param_groups if group["params"]} == {0.1}


def keeping(base: Path, output: Path, **settings: Any) -> TrainConfig:
    return make_config(base, output, keep_checkpoints=True, **settings)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("kept") / "model"
    return output, train(keeping(tiny_base, output)).record


def models(output: Path) -> dict[int, Path]:
    """Return the kept models by the number of triplets seen."""
    folder = output.with_name(output.name + ".training") / "models"
    return {int(path.name.removeprefix("samples-")): path for path in sorted(folder.iterdir())}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(first: Path, second: Path) -> bool:
    tensors, others = weights(first), weights(second)
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_each_kept_model_opens_with_its_dev_score(kept: tuple[Path, dict[str, Any]]) -> None:
    output, record = kept
    scores = {score["samples"]: score for score in record["dev"]["scores"]}
    assert list(scores) == [0, 8, 16, 24]
    assert sorted(models(output)) == [8, 16, 24]
    assert [path.name for path in output.with_name("model.training").iterdir()] == ["models"]
    pairs = dev_pairs("sample", None)
    for samples, path in models(output).items():
        model = sempa_st.load(path, dtype="float32", device="cpu")
        vectors = [model.encode(list(side), convert_to_tensor=True) for side in (pairs.first, pairs.second)]
        cosine = torch.nn.functional.cosine_similarity(*vectors)
        expected = 100 * spearmanr(cosine, pairs.scores).statistic
        assert scores[samples]["spearman"] == pytest.approx(expected, abs=1e-2)
        own = read_json(path / "sempa_run.json")
        assert own["best_step"] == scores[samples]["step"] == own["dev"]["scores"][-1]["step"]
        assert f"# samples-{samples}" in (path / "README.md").read_text()
        assert same(path, output) == (own["best_step"] == record["best_step"])


class InterruptError(Exception):
    pass


def test_a_resumed_run_keeps_the_same_models(
    kept: tuple[Path, dict[str, Any]], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = PreferenceTrainer.training_step, 0

    def fail_later(self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise InterruptError
        return original(self, *args, **kwargs)

    config = keeping(tiny_base, tmp_path / "model")
    with monkeypatch.context() as patch, pytest.raises(InterruptError):
        patch.setattr(PreferenceTrainer, "training_step", fail_later)
        train(config)
    early = models(tmp_path / "model")
    assert sorted(early) == [8, 16]
    # As if the run had been cut off while it saved its second checkpoint: that model is written again.
    (early[16] / "adapter_model.safetensors").unlink()
    shutil.rmtree(tmp_path / "model.training" / "checkpoints" / "checkpoint-4")
    train(replace(config, resume=True))
    resumed, unbroken = models(tmp_path / "model"), models(kept[0])
    assert sorted(resumed) == sorted(unbroken)
    assert all(same(path, unbroken[samples]) for samples, path in resumed.items())


def test_kept_models_are_deleted_with_overwrite_only(
    kept: tuple[Path, dict[str, Any]], tiny_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(kept[0].with_name("model.training"), tmp_path / "model.training")
    config = make_config(tiny_base, tmp_path / "model", max_triplets=4, checkpoint_samples=4)
    with pytest.raises(SempaError, match=r"models holds the models that --keep-checkpoints kept.*--overwrite"):
        train(config)
    assert sorted(models(tmp_path / "model")) == [8, 16, 24]
    (tmp_path / "model.training" / "models" / "mine.txt").write_text("x")
    with pytest.raises(SempaError, match=r"not a run's: models/mine\.txt"):
        train(replace(config, overwrite=True))
    (tmp_path / "model.training" / "models" / "mine.txt").unlink()
    train(replace(config, overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
