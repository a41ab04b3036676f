"""A decoder computed row by row, layer by layer and head by head: what the methods' vectors are compared with."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Edit = Callable[[int, Tensor], Tensor]


def keep(_: int, states: Tensor) -> Tensor:
    return states


def hidden_states(
    decoder: Any, ids: list[int], *, enter: Edit = keep, mix: Edit = keep, bidirectional: bool = False
) -> list[Tensor]:
    """Return the states of one row: the embeddings, each layer's output, and at last that with the final norm.

    ``enter`` changes what enters a layer, ``mix`` the concatenated heads before a layer's output projection.
    """
    states = decoder.embed_tokens(torch.tensor(ids)[None])[0]
    found = [states]
    for number, layer in enumerate(decoder.layers):
        states = enter(number, states)
        attended = attention(decoder, number, layer.input_layernorm(states), mix, bidirectional)
        gemma = hasattr(layer, "pre_feedforward_layernorm")
        if gemma:
            states = states + layer.post_attention_layernorm(attended)
            states = states + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(states)))
        else:
            states = states + attended
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        found.append(states)
    return [*found[:-1], decoder.norm(found[-1])]


def attention(decoder: Any, number: int, states: Tensor, mix: Edit, bidirectional: bool) -> Tensor:
    module, config = decoder.layers[number].self_attn, decoder.config
    kind = getattr(config, "layer_types", ["full_attention"] * (number + 1))[number]
    window = config.sliding_window if kind == "sliding_attention" else len(states)
    size, length = module.head_dim, len(states)
    group = config.num_attention_heads // config.num_key_value_heads
    theta = config.rope_parameters.get(kind, config.rope_parameters)["rope_theta"]
    heads = []
    for head in range(config.num_attention_heads):
        query = part(module.q_proj(states), head, size)
        key, value = (part(project(states), head // group, size) for project in (module.k_proj, module.v_proj))
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        query, key = rotated(query, theta), rotated(key, theta)
        outputs = []
        for place in range(length):
            seen = range(length) if bidirectional else range(max(0, place - window + 1), place + 1)
            scores = torch.stack([query[place] @ key[other] * module.scaling for other in seen])
            weights = scores.softmax(dim=0)
            outputs.append(sum(weight * value[other] for weight, other in zip(weights, seen, strict=True)))
        heads.append(torch.stack(outputs))  # type: ignore[arg-type]
    return module.o_proj(mix(number, torch.cat(heads, dim=-1)))  # type: ignore[no-any-return]


def part(states: Tensor, head: int, size: int) -> Tensor:
    return states[:, head * size : (head + 1) * size]


def rotated(states: Tensor, theta: float) -> Tensor:
    half = states.shape[1] // 2
    angles = torch.arange(len(states))[:, None] / theta ** (torch.arange(half) / half)
    first, second = states[:, :half], states[:, half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=1
    )


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """Stand in for the varlen kernel: attention within each sequence, one after another."""
    rows = []
    for start, end in pairwise(starts.tolist()):
        assert end - start <= longest
        own = [tensor[start:end].transpose(0, 1) for tensor in (queries, keys, values)]
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril().triu(1 - (window or end))
        rows.append(scaled_dot_product_attention(*own, attn_mask=seen, scale=scale).transpose(0, 1))
    return torch.cat(rows)
