"""A run that diverges ends at once, names the step, the rows and the cause, and keeps what was good before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny import make_config, make_llama, make_tokenizer
from torch import nn
from transformers import Trainer

from sempa_st.errors import SempaError
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.model.tokenizer import install_template
from sempa_st.training.divergence import DivergedError, GradientCheck, diverged_loss, likely_cause
from sempa_st.training.reference import cached_tensor
from sempa_st.training.run import train
from sempa_st.utils.files import cache_folder

pytestmark = pytest.mark.names_dtype
OBJECTIVES = ["dpo", "contrastive", "one-word-listwise", "retrieval"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_loss_that_is_no_number_ends_the_run(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    config = make_config(tiny_base, tmp_path / "model", objective=objective)
    original = Trainer.training_step

    def spoiled(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(self, *args, **kwargs)
        return loss * torch.nan if self.state.global_step == 3 else loss

    with monkeypatch.context() as patch, pytest.raises(DivergedError, match=r"^The loss of step 4 is nan\. Each row"):
        patch.setattr(Trainer, "training_step", spoiled)
        train(config)
    err = capsys.readouterr().err
    assert "change a setting, and give --overwrite" in err and "--resume" not in err
    train(replace(config, overwrite=True))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_gradient_that_is_no_number_never_reaches_the_weights(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    config = make_config(tiny_base, tmp_path / "model", objective=objective)
    models: list[Any] = []
    original = Trainer.training_step

    def spoiled(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(self, *args, **kwargs)
        models[:] = [self.model]
        if self.state.global_step == 3:
            next(p for p in self.model.parameters() if p.grad is not None).grad[0] = torch.inf
        return loss

    monkeypatch.setattr(Trainer, "training_step", spoiled)
    with pytest.raises(DivergedError, match=r"^The gradient of step 4 is infinite or NaN\. Training has diverged"):
        train(config)
    assert all(parameter.isfinite().all() for parameter in models[0].parameters())


def test_the_scaler_of_float16_may_skip_steps_while_it_looks_for_a_factor() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.full((2, 2), torch.inf)
    trainer = SimpleNamespace(generator=lambda: layer, accelerator=SimpleNamespace(scaler=object()))
    state: Any = SimpleNamespace(global_step=6)
    none: Any = None
    check = GradientCheck(trainer)
    for _ in range(20):
        check.on_pre_optimizer_step(none, state, none)
    with pytest.raises(DivergedError, match="step 7"):
        check.on_pre_optimizer_step(none, state, none)
    check = GradientCheck(trainer)
    for step in range(60):
        layer.weight.grad = torch.full((2, 2), torch.inf if step % 20 else 1.0)
        check.on_pre_optimizer_step(none, state, none)


def test_the_rows_at_fault_are_named() -> None:
    tokenizer, model = make_tokenizer(), make_llama()
    install_template(tokenizer, EMBEDDING_TEMPLATES["prompteol"])
    module = PromptEOL(model, tokenizer, template="prompteol", max_seq_length=64)
    sentences = ["A cat sleeps.", "Snow falls in Oslo.", "Why?"]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    only = next(
        token for token in tokenizer("Snow falls in Oslo.")["input_ids"] if (batch["input_ids"] == token).sum() == 1
    )
    model.model.embed_tokens.weight.data[only] = torch.nan
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=0), generator=lambda: model)
    loss = torch.tensor(torch.nan)
    message = str(
        diverged_loss(
            loss, trainer, module, {"x_input_ids": batch["input_ids"], "x_attention_mask": batch["attention_mask"]}
        )
    )
    assert "It comes from 'Snow falls in Oslo.'." in message
    assert "in the tensor model.embed_tokens.weight" in message
    assert "cat" not in message


def test_the_cause_follows_the_weights_and_their_type() -> None:
    layer = nn.Linear(2, 2)
    assert "lower the learning rate" in likely_cause(layer)
    assert "overflow in float16" in likely_cause(layer.half())
    layer.weight.data[0, 0] = torch.nan
    assert "in the tensor weight" in likely_cause(layer)


def test_a_reference_that_is_no_number_is_not_remembered() -> None:
    bad, good = torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])
    identity = {"test": "a reference that is no number"}
    before = set((cache_folder() / "reference").glob("*.safetensors"))
    for _ in range(2):
        with pytest.raises(SempaError, match=r"infinite or NaN values \(x\)"):
            cached_tensor("x", identity, lambda: bad, write=True)
    assert before == set((cache_folder() / "reference").glob("*.safetensors"))
    assert cached_tensor("x", identity, lambda: good, write=True).equal(good)
    assert cached_tensor("x", identity, lambda: pytest.fail("computed again"), write=True).equal(good)
