"""Layers with a fused update against PEFT's own, which computes the same in steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.tiny import make_llama
from peft import LoraConfig, get_peft_model
from torch import nn

from sempa_st.forward.fused_lora import fuse_updates, linear_with_update
from sempa_st.model.peft_models import alora_on_last

pytestmark = pytest.mark.names_dtype

LAYERS = 7 * 3
IDS = torch.arange(3, 27).view(2, 12)


def adapted(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Return a tiny model with an adapter that changes what it computes."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings)
    model = get_peft_model(make_llama().to(dtype), config, autocast_adapter_dtype=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def run(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits and the gradients of all trained weights, in float64."""
    logits = model(input_ids=IDS).logits
    (logits.double() * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.requires_grad}
    return logits.detach().double(), gradients


def test_outputs_and_gradients_are_those_of_peft() -> None:
    model = adapted()
    fused = copy.deepcopy(model)
    assert fuse_updates(fused) == LAYERS
    (expected, gradients), (found, own) = run(model), run(fused)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_in_bfloat16_it_is_as_close_to_float32_as_peft() -> None:
    exact, _ = run(adapted())
    model = adapted(torch.bfloat16)
    fused = copy.deepcopy(model)
    fuse_updates(fused)
    errors = []
    for candidate in (model, fused):
        with torch.autocast("cpu", torch.bfloat16):
            logits, gradients = run(candidate)
        assert all(p.dtype == torch.float32 for n, p in candidate.named_parameters() if "lora_" in n)
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
        errors.append(float((logits - exact).norm() / exact.norm()))
    assert errors[1] < 1.2 * errors[0]


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    shapes = [(2, 3, 5), (4, 5), (4,), (2, 5), (4, 2)]
    inputs, weight, bias, first, second = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    for tensor in (inputs, first, second):
        tensor.requires_grad_()
    torch.autograd.gradcheck(
        lambda x, a, b: linear_with_update(x, weight, bias, a, b, 2.0), (inputs, first, second), atol=1e-6
    )
    expected = inputs @ weight.T + bias + 2.0 * inputs @ first.T @ second.T
    torch.testing.assert_close(linear_with_update(inputs, weight, bias, first, second, 2.0), expected)


def test_the_output_may_be_changed_in_place() -> None:
    """As the experts of Llama 4 do."""
    torch.manual_seed(0)
    inputs, weight, first, second = (torch.randn(shape) for shape in [(2, 3, 5), (4, 5), (2, 5), (4, 2)])
    first.requires_grad_()
    output = linear_with_update(inputs, weight, None, first, second, 2.0)
    output.mul_(3)
    output.sum().backward()
    expected = first.detach().clone().requires_grad_()
    (3 * (inputs @ weight.T + 2.0 * inputs @ expected.T @ second.T)).sum().backward()
    torch.testing.assert_close(first.grad, expected.grad)


def test_a_disabled_or_merged_adapter_is_that_of_peft() -> None:
    model = adapted()
    fused = copy.deepcopy(model)
    fuse_updates(fused)
    with torch.no_grad(), model.disable_adapter(), fused.disable_adapter():
        torch.testing.assert_close(fused(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=0)
    model.merge_adapter()
    fused.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(fused(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_layers_stay_as_peft_has_them(settings: dict[str, Any]) -> None:
    assert fuse_updates(adapted(**settings)) == 0


def test_an_activated_adapter_is_fused_where_it_acts_on_every_token() -> None:
    """It is a plain one there, and elsewhere that of PEFT, down to the bit."""
    model, plain = adapted(task_type="CAUSAL_LM", alora_invocation_tokens=[7]), adapted(task_type="CAUSAL_LM")
    fused = copy.deepcopy(model)
    assert fuse_updates(fused) == LAYERS
    with torch.no_grad():
        with alora_on_last(fused, None):
            found = fused.get_base_model()(input_ids=IDS).logits
        torch.testing.assert_close(found, plain(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
        after, before = fused(input_ids=IDS).logits, model(input_ids=IDS).logits
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert not torch.allclose(after, found, atol=1e-3)


def test_a_layer_that_is_changed_later_is_that_of_peft() -> None:
    model = adapted()
    fused = copy.deepcopy(model)
    fuse_updates(fused)
    for candidate in (model, fused):
        torch.manual_seed(1)
        candidate.add_adapter("second", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        candidate.set_adapter("second")
        for name, parameter in candidate.named_parameters():
            parameter.requires_grad_("base_layer" in name or ".second." in name)
    (expected, gradients), (found, own) = run(model), run(fused)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(torch.equal(own[name], gradient) for name, gradient in gradients.items())


def test_layers_of_two_adapters_stay_as_peft_has_them() -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=4, target_modules="all-linear"))
    assert fuse_updates(model) == 0


def test_what_is_saved_is_the_same() -> None:
    model = adapted()
    names = list(model.state_dict())
    fuse_updates(model)
    assert list(model.state_dict()) == names


def test_under_autocast_it_is_that_of_peft() -> None:
    model = adapted()
    fused = copy.deepcopy(model)
    fuse_updates(fused)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("grad", [False, True])
def test_no_rows_give_no_rows(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        output = linear_with_update(torch.zeros(0, 8), torch.ones(4, 8), None, torch.ones(2, 8), torch.ones(4, 2), 1.0)
    assert output.shape == (0, 4)
