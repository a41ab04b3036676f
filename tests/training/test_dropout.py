"""The base's own dropout is off in training, and the adapter's acts."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.families import make_causal_lm
from helpers.tiny import make_config, make_llama, make_tokenizer, randomise
from peft.tuners.lora import LoraLayer
from torch import nn

from sempa_st.data.nli import load_nli
from sempa_st.data.sts import dev_pairs
from sempa_st.errors import SempaError
from sempa_st.model.base_model import Base, named_decoder
from sempa_st.model.templates import embedding_template
from sempa_st.model.tokenizer import install_template
from sempa_st.training.build import build_trainer
from sempa_st.training.dev_score import DevScorer
from sempa_st.training.dropout import check_repeatable, disable_dropout
from sempa_st.training.inputs import RunInputs
from sempa_st.training.run_folder import RunFolder
from sempa_st.utils.files import write_json

pytestmark = pytest.mark.names_dtype

RATE = 0.3
FAMILIES = [*ARCHITECTURES, "biogpt", "falcon", "gpt_bigcode", "seed_oss", "xglm"]
FUNCTIONAL = ["opt", "biogpt", "falcon", "gpt_bigcode", "llama", "seed_oss", "xglm"]
"""Families with dropout that is no module: a number of a module, or of the config."""


@functools.cache
def tokenizers() -> tuple[Any, Any]:
    """Return a tokenizer, and one with the embedding template."""
    plain, embedder = make_tokenizer(chat=None), make_tokenizer(chat=None)
    install_template(embedder, embedding_template("prompteol"))
    return plain, embedder


def with_dropout(family: str, **changes: Any) -> Any:
    """Make a tiny decoder whose every rate is above 0."""
    config = make_causal_lm(family, **changes).config
    rates = {name: RATE for name, value in vars(config).items() if "drop" in name and isinstance(value, int | float)}
    return named_decoder(make_causal_lm(family, **changes, **rates))


def make_trainer(folder: Path, model: Any, **settings: Any) -> Any:
    """Build the trainer of a run on a model in memory."""
    base = Base("tiny", folder / "base")
    write_json(base.folder / "config.json", model.config.to_dict())  # what tells bases apart in the cache
    config = make_config(base.folder, folder / "model", **{"max_triplets": 4, "max_seq_length": 60, **settings})
    data = load_nli("sample")
    plain, embedder = tokenizers()
    data = replace(data, triplets=list(data.triplets)[:4])
    scorer = DevScorer(dev_pairs("sample", None), embedder, template="prompteol", max_seq_length=60, batch_size=32)
    inputs = RunInputs(config, "cpu", base, data, plain, model, scorer, None)
    return build_trainer(inputs, RunFolder(folder / "model"))


def dropout_of(family: str) -> float:
    """Return a rate for the adapter; PEFT allows none on DeepSeek's experts, whose weights are no layers."""
    return 0.0 if family == "deepseek_v3" else 0.5


def first_loss(trainer: Any) -> float:
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    return float(trainer.compute_loss(trainer.model, batch).detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_dpo_loss_is_log_2(family: str, tmp_path: Path) -> None:
    """The adapter's dropout changes nothing yet."""
    loss = first_loss(make_trainer(tmp_path, with_dropout(family), lora_dropout=dropout_of(family)))
    assert loss == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("family", [*FUNCTIONAL, "gemma3_text", "gpt2", "mamba", "mixtral"])
def test_other_first_losses_are_those_of_equal_models(family: str, tmp_path: Path) -> None:
    """Log 2 for two candidates, log 8 for the eight of a batch of four, and no KL divergence."""
    objective = "listwise:1,one-word:1,one-word-listwise:1"
    settings = {"objective": objective, "kl": 1.0, "lora_dropout": dropout_of(family)}
    trainer = make_trainer(tmp_path, with_dropout(family), **settings)
    assert first_loss(trainer) == pytest.approx(2 * math.log(2) + math.log(8), abs=1e-3)


@pytest.mark.parametrize("family", FUNCTIONAL)
def test_these_rates_make_a_difference(family: str) -> None:
    """Without this, the test above would pass whatever is done about dropout."""
    ids = torch.arange(3, 40)[None]
    model = with_dropout(family)

    def differ() -> bool:
        with torch.no_grad():
            first, second = (model.train()(input_ids=ids, use_cache=False).logits for _ in range(2))
        return not torch.equal(first, second)

    assert differ()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert differ()
    expected = model.eval()(input_ids=ids).logits
    disable_dropout(model)
    assert not differ()
    torch.testing.assert_close(model.train()(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("settings", [{}, {"objective": "listwise"}, {"objective": "contrastive"}], ids=str)
def test_the_adapters_dropout_acts(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, make_llama(), lora_dropout=0.5, **settings)
    randomise(trainer.model)
    model = trainer.generator()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert layers
    assert {layer.lora_dropout["default"].p for layer in layers} == {0.5}
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, batch) != trainer.compute_loss(trainer.model, batch)
    trainer.model.eval()
    assert trainer.compute_loss(trainer.model, batch) == trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize("objective", ["dpo", "listwise", "contrastive"])
def test_dropout_that_peft_refuses_is_named(tmp_path: Path, objective: str) -> None:
    with pytest.raises(SempaError, match=r"--lora-dropout does not work with this base \(.*Expected 0"):
        make_trainer(tmp_path, make_causal_lm("deepseek_v3"), lora_dropout=0.1, objective=objective)


def test_other_noise_of_a_base_is_refused_where_there_is_a_reference(tmp_path: Path) -> None:
    noisy = make_causal_lm("mixtral", router_jitter_noise=0.1)
    for settings in ({}, {"objective": "one-word"}, {"objective": "contrastive", "kl": 1.0}):
        with pytest.raises(SempaError, match="MixtralForCausalLM draws random numbers in training besides dropout"):
            make_trainer(tmp_path, noisy, **settings)
    make_trainer(tmp_path, noisy, objective="contrastive")
    check_repeatable(make_causal_lm("mixtral"))
    assert not noisy.training


def test_a_base_whose_settings_give_nan_is_refused() -> None:
    with pytest.raises(SempaError, match=r"LlamaForCausalLM gives logits that are NaN .* the config\.json of the base"):
        check_repeatable(make_causal_lm("llama", rms_norm_eps=float("nan")))
