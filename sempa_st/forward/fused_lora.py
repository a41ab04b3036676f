"""LoRA layers that compute a linear layer and its update together, for a CPU.

PEFT adds the update in steps of their own: it converts the input to the adapter's float32, multiplies twice, scales,
adds, and converts back. Each step reads and writes a tensor as large as the layer's output, which takes longer on a CPU
than the products. Here the second product adds to the layer's output, and only the small factors are converted.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sempa_st.model.patching import alora_acts_on_every_token, compute_by


def fuse_updates(model: nn.Module) -> int:
    """Let the LoRA layers of a model compute their updates by :func:`linear_with_update`, and return their number.

    Layers that are quantised, have several adapters, dropout, or a variant of LoRA such as DoRA stay as PEFT has them.
    A changed layer computes by PEFT again while its adapter is disabled, merged or not the only active one, while its
    own weights are trained, and, if the adapter is an activated one (aLoRA), unless that acts on every token
    (:func:`~sempa_st.model.peft_models.alora_on_last`).
    """
    layers: list[Any] = [module for module in model.modules() if type(module) is lora.Linear and _is_plain(module)]
    for layer in layers:
        compute_by(layer, partial(_forward, layer, list(layer.lora_A)))
    return len(layers)


def _is_plain(layer: Any) -> bool:
    names = list(layer.lora_A)
    return (
        type(layer.get_base_layer()) is nn.Linear
        and layer.active_adapters == names
        and len(names) == 1
        and type(layer.lora_variant.get(names[0])) in (type(None), ALoraLinearVariant)
        and not layer.lora_bias[names[0]]
        and isinstance(layer.lora_dropout[names[0]], nn.Identity)
    )


def _forward(layer: Any, names: list[str], inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    weight = layer.get_base_layer().weight
    as_peft = layer.disable_adapters or layer.merged or layer.active_adapters != names
    as_peft = as_peft or (layer.lora_variant and not alora_acts_on_every_token())
    as_peft = as_peft or args or kwargs or weight.requires_grad or inputs.dtype != weight.dtype
    if as_peft or (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != weight.dtype):
        output: Tensor = type(layer).forward(layer, inputs, *args, **kwargs)
        return output
    (name,) = names
    first, second = layer.lora_A[name].weight, layer.lora_B[name].weight
    return linear_with_update(inputs, weight, layer.get_base_layer().bias, first, second, layer.scaling[name])


def linear_with_update(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, second: Tensor, scale: float
) -> Tensor:
    """Return x W^T + b + s (x A^T) B^T, with gradients to x, A and B.

    Args:
        inputs: x, of shape (..., in_features).
        weight: W, frozen, of shape (out_features, in_features) and of the dtype of ``inputs``.
        bias: b, frozen, of shape (out_features,), or None.
        first: A, of shape (rank, in_features), of any float dtype.
        second: B, of shape (out_features, rank).
        scale: s, alpha / rank.

    Returns:
        Tensor of shape (..., out_features), of the dtype of ``inputs``.
    """
    # The views are outside of the function: one made inside may not be changed in place, as Llama 4 does.
    rows = inputs.reshape(-1, inputs.shape[-1])
    if torch.is_grad_enabled():
        output: Tensor = _LinearWithUpdate.apply(rows, weight, bias, first, second, scale)
    else:
        inner = rows @ first.to(rows.dtype).T
        output = functional.linear(rows, weight, bias).addmm_(inner, second.to(rows.dtype).T, alpha=scale)
    return output.view(*inputs.shape[:-1], weight.shape[0])


class _LinearWithUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        rows, weight, bias, first, second, scale = arguments
        ctx.scale, ctx.dtype = scale, first.dtype
        first, second = first.to(rows.dtype), (second * scale).to(rows.dtype)
        inner = rows @ first.T
        output = functional.linear(rows, weight, bias).addmm_(inner, second.T)
        ctx.save_for_backward(rows, weight, first, second, inner)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, first, second, inner = ctx.saved_tensors
        of_inner = gradient @ second
        of_first = (of_inner.T @ rows).to(ctx.dtype)
        of_second = (gradient.T @ inner).to(ctx.dtype) * ctx.scale
        of_rows = (gradient @ weight).addmm_(of_inner, first) if ctx.needs_input_grad[0] else None
        return of_rows, None, None, of_first, of_second, None
