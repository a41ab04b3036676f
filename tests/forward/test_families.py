"""Every forward strategy on every architecture, with windows shorter than the rows: right, or not supported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.families import make_windowed
from helpers.naive import attend
from helpers.tiny import add_random_adapter, make_tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sempa_st.forward import packing, varlen
from sempa_st.forward.decoder import can_cache
from sempa_st.forward.packing import can_pack, last_states_packed
from sempa_st.forward.prefix_cache import PrefixCache
from sempa_st.forward.varlen import VarlenUnsupported, attention_is_exchangeable, last_states_varlen
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.model.tokenizer import install_template, suffix_tokens
from sempa_st.training.forward import last_states

pytestmark = pytest.mark.names_dtype

WINDOW = 12
LENGTHS = [9, 3, 12, 7, 5, 12, 4]
"""All within the window, so that only what a strategy puts beside a sequence lies outside it."""
EVERY_ARCHITECTURE = pytest.mark.parametrize("family", ARCHITECTURES)


def make_sequences(lengths: list[int]) -> list[Tensor]:
    """Draw sequences with a common prefix of two tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.cat([torch.tensor([7, 9]), torch.randint(3, 580, (n - 2,), generator=generator)]) for n in lengths]


def alone(decoder: Any, sequences: list[Tensor]) -> Tensor:
    return torch.stack([decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0, -1] for ids in sequences])


def check_close(found: Tensor, expected: Tensor) -> None:
    """Compare with how far apart the sequences are: a tiny random Mamba puts them close to each other."""
    apart = torch.pdist(expected).mean()
    assert float((found - expected).norm(dim=1).max()) < 5e-3 * float(apart)


@EVERY_ARCHITECTURE
@torch.no_grad()
def test_packs(family: str, prefix_pass: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_windowed(family, WINDOW).base_model
    for sequences in (make_sequences(LENGTHS), make_sequences([40, *LENGTHS])):
        if can_pack(decoder, max(map(len, sequences))):
            expected = alone(decoder, sequences)
            check_close(last_states_packed(decoder, sequences), expected)
            with monkeypatch.context() as patch:
                patch.setattr(packing, "_PASS", prefix_pass)
                check_close(last_states_packed(decoder, sequences), expected)


@EVERY_ARCHITECTURE
@torch.no_grad()
def test_varlen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "attend", attend)
    decoder = make_windowed(family, WINDOW).base_model
    sequences = make_sequences([40, *LENGTHS])
    if attention_is_exchangeable(decoder):
        mask = pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True)
        try:
            found = last_states_varlen(decoder, pad_sequence(sequences, batch_first=True), mask)
        except VarlenUnsupported:
            return
        check_close(found, alone(decoder, sequences))


@EVERY_ARCHITECTURE
@torch.no_grad()
def test_prefix_cache(family: str) -> None:
    """The base's states, which need no activated adapter: PEFT has none for some architectures."""
    module = make_module(family, make_windowed(family, WINDOW))
    if can_cache(module.decoder):
        sequences = make_sequences([40, *LENGTHS])
        mask = pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True, padding_side="left")
        ids = pad_sequence(sequences, batch_first=True, padding_side="left")
        cache = PrefixCache(module, ids, mask, num_suffix_tokens=1)
        with module.model.disable_adapter():
            check_close(cache.base_suffix_states(), alone(module.decoder, sequences))


@pytest.mark.parametrize("family", ["falcon:alibi", "gpt_neo", "lfm2", "llama", "mamba", "stablelm"])
@torch.no_grad()
def test_training_of_an_adapter_on_the_suffix(family: str) -> None:
    """With the cache and without: sequences of a group, whose padding could stand in the middle, equal each alone."""
    tokenizer = make_tokenizer()
    install_template(tokenizer, EMBEDDING_TEMPLATES["prompteol"])
    module = make_module(family, make_windowed(family, WINDOW), invocation=suffix_tokens(tokenizer, "prompteol"))
    sentences = ["A cat", "Two dogs run over the wet grass, after a ball.", "Snow"]
    states = last_states(module, **module.preprocess(sentences), num_reference=2)
    one = [last_states(module, **module.preprocess([text]), num_reference=1) for text in sentences]
    check_close(states.states, torch.cat([each.states for each in one]))
    check_close(states.reference, torch.cat([each.reference for each in one[:2]]))
    assert not torch.equal(states.states[:2], states.reference)


def make_module(family: str, model: Any, **settings: Any) -> PromptEOL:
    tokenizer = make_tokenizer()
    install_template(tokenizer, EMBEDDING_TEMPLATES["prompteol"])
    return PromptEOL(add_random_adapter(model, **settings), tokenizer, max_seq_length=160)


def test_local_attention_of_its_own_is_not_packed() -> None:
    """GPT-Neo counts its window in indices of a row, whatever the mask and the positions."""
    decoder = make_windowed("gpt_neo", WINDOW).base_model
    assert not can_pack(decoder, 4)
    assert not attention_is_exchangeable(decoder)
