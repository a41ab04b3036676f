"""The methods on every architecture, against forward passes of one row, changed at absolute places by hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.families import FAMILIES, make_causal_lm
from helpers.tiny import make_tokenizer
from torch import Tensor

from sempa_st.methods.module import MethodModule

pytestmark = pytest.mark.names_dtype

SENTENCES = ["A cat sleeps", 'Is it "red"?', "Two dogs run over the wet grass after a ball.", "Snow"]
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def make_module(family: str, method: str) -> MethodModule:
    window = {"sliding_window": 256} if family in ("gemma2", "gemma3_text", "mistral") else {}
    return MethodModule(make_causal_lm(family, **window), make_tokenizer(), method)


@torch.no_grad()
def check(module: MethodModule, expected: Callable[[dict[str, Tensor]], Tensor]) -> None:
    """Compare a batch, which is padded or packed, with its rows one at a time."""
    rows = [module.preprocess([text]) for text in SENTENCES]
    together = module(module.preprocess(SENTENCES))["sentence_embedding"]
    torch.testing.assert_close(together, torch.stack([expected(row) for row in rows]), rtol=0, atol=1e-5)
    assert float((together[0] - together[2]).norm()) > 1e-2


def states_of(module: MethodModule, ids: Tensor, layer: int, mask: Tensor | None = None) -> Tensor:
    output = module.decoder(
        input_ids=ids,
        attention_mask=mask,
        position_ids=torch.arange(ids.shape[1])[None],
        output_hidden_states=True,
        use_cache=False,
    )
    states: Tensor = output.hidden_states[layer][0]
    return states


def layers_of(module: MethodModule) -> Any:
    decoder = module.decoder
    return decoder.decoder.layers if hasattr(decoder, "decoder") else decoder.layers


def projection_of(layer: Any) -> Any:
    if hasattr(layer, "attention"):
        return layer.attention.dense
    return getattr(layer.self_attn, "o_proj", None) or layer.self_attn.out_proj


@EVERY_FAMILY
@pytest.mark.parametrize(
    ("method", "layer"),
    [("mean", -1), ("mean:layer=1", 1), ("last-token:layer=-2", -2), ("echo", -1), ("knowledge-enhancement", -2)],
)
def test_readings(family: str, method: str, layer: int) -> None:
    module = make_module(family, method)

    def expected(row: dict[str, Tensor]) -> Tensor:
        return states_of(module, row["input_ids"], layer)[row["read"][0].bool()].mean(dim=0)

    check(module, expected)


@EVERY_FAMILY
def test_llm2vec(family: str) -> None:
    module = make_module(family, "llm2vec")

    def expected(row: dict[str, Tensor]) -> Tensor:
        tokens = row["input_ids"].shape[1]
        states = states_of(module, row["input_ids"], -1, torch.zeros(1, 1, tokens, tokens))
        return states[row["read"][0].bool()].mean(dim=0)

    check(module, expected)


@EVERY_FAMILY
def test_token_prepending(family: str) -> None:
    module = make_module(family, "token-prepending:start=1:exit=2:layer=-2")

    def expected(row: dict[str, Tensor]) -> Tensor:
        place = row["placeholder"][0].tolist().index(1)

        def prepend(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            states[0, place] = states[0, -1]

        handle = layers_of(module)[1].register_forward_pre_hook(prepend, with_kwargs=True)
        try:
            return states_of(module, row["input_ids"], -2)[-1]
        finally:
            handle.remove()

    check(module, expected)


@EVERY_FAMILY
def test_contrastive_prompting(family: str) -> None:
    module = make_module(family, "contrastive-prompting:at=1:variant=norm:layer=-1")

    def expected(row: dict[str, Tensor]) -> Tensor:
        mixtures: list[Tensor] = []

        def contrast(_: Any, args: tuple[Tensor, ...]) -> None:
            mixtures.append(args[0][0, -1].clone())
            if len(mixtures) == 2:
                difference = mixtures[1] - mixtures[0]
                args[0][0, -1] = difference * mixtures[1].norm() / difference.norm()

        handle = projection_of(layers_of(module)[1]).register_forward_pre_hook(contrast)
        try:
            states_of(module, row["input_ids_1"], -1)
            return states_of(module, row["input_ids"], -1)[-1]
        finally:
            handle.remove()

    check(module, expected)
