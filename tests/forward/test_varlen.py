"""Varlen attention equals sequences run alone. FlashAttention needs CUDA, so ``attend`` stands in for the kernel here.

``benchmarks/run_speed.py encode --device cuda`` gives the lowest cosine of the kernel's vectors with plain float32's.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers.families import FAMILIES, make_causal_lm
from helpers.naive import attend
from helpers.tiny import make_llama, make_tokenizer, sample_sentences
from torch import Tensor

from sempa_st.forward import embed, packing, varlen
from sempa_st.forward.embed import embed_rows_fast
from sempa_st.forward.sentence_transformers import SentenceTransformer
from sempa_st.forward.varlen import VarlenUnsupported, attention_is_exchangeable, last_states_varlen, supports_varlen
from sempa_st.model.prompt_eol import PromptEOL, embed_rows
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.model.tokenizer import install_template

pytestmark = pytest.mark.names_dtype

LENGTHS = [5, 1, 90, 17, 70]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "attend", attend)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_varlen_equals_sequences_alone(family: str, side: str) -> None:
    decoder = make_causal_lm(family).base_model
    assert attention_is_exchangeable(decoder)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 600, (length,), generator=generator) for length in LENGTHS]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    with torch.inference_mode():
        alone = [decoder(input_ids=row[None], use_cache=False).last_hidden_state[0, -1] for row in rows]
        found = last_states_varlen(decoder, ids, mask)
        after = [decoder(input_ids=row[None], use_cache=False).last_hidden_state[0, -1] for row in rows]
    torch.testing.assert_close(found, torch.stack(alone), rtol=0, atol=1e-5)
    assert all(map(torch.equal, after, alone))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_other_passes_stay_the_same_after_varlen(family: str, implementation: str) -> None:
    """Bit for bit: padded batches, generation with its cache, and packs, whose mask is one of queries by keys."""
    model = make_causal_lm(family)
    model.set_attn_implementation(implementation)
    ids = torch.tensor([[0, 0, 5, 9, 30], [7, 30, 8, 12, 40]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

    def passes() -> list[Tensor]:
        generated = model.generate(ids[1:], attention_mask=mask[1:], max_new_tokens=5, do_sample=False)
        packed = packing.last_states_packed(model.base_model, [ids[1, :3], ids[1]])
        return [model(input_ids=ids, attention_mask=mask).logits, generated, packed]

    with torch.inference_mode():
        before = passes()
        last_states_varlen(model.base_model, ids, mask)
        after = passes()
    assert model.config._attn_implementation == varlen.ATTENTIONS[implementation]
    assert all(map(torch.equal, after, before))


def test_varlen_is_refused_where_the_kernel_cannot() -> None:
    assert not attention_is_exchangeable(make_causal_lm("gemma2").base_model)  # caps its scores
    assert not attention_is_exchangeable(make_causal_lm("llama", head_dim=264).base_model)
    decoder = make_causal_lm("qwen3").base_model
    decoder.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    assert not attention_is_exchangeable(decoder)  # recurrence would continue into the next sequence
    assert not supports_varlen(make_llama().to(torch.bfloat16).base_model)  # not on CUDA


def make_module(model: Any) -> PromptEOL:
    tokenizer = make_tokenizer()
    install_template(tokenizer, EMBEDDING_TEMPLATES["prompteol"])
    return PromptEOL(model, tokenizer).eval()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {}),  # caps its scores
        ("llama", {"head_dim": 12}),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}),  # has sinks
    ],
)
def test_an_attention_that_varlen_does_not_support_is_packed(
    family: str, changes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module(make_causal_lm(family, **changes))
    features = module.preprocess(sample_sentences()[:4])
    with pytest.raises(VarlenUnsupported):
        last_states_varlen(module.decoder, **features)
    monkeypatch.setattr(embed, "supports_varlen", lambda decoder: True)
    with torch.inference_mode():
        found, expected = (run(module, **features) for run in (embed_rows_fast, embed_rows))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("kernel")
def test_an_embedder_uses_varlen_where_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module(make_llama())
    embedder = SentenceTransformer(modules=[module], device="cpu")
    expected = embedder.encode(sample_sentences(), convert_to_tensor=True)
    module.forward_rows = embed_rows_fast
    calls: list[int] = []

    def counted(decoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        calls.append(len(input_ids))
        return last_states_varlen(decoder, input_ids, attention_mask)

    monkeypatch.setattr(embed, "supports_varlen", lambda decoder: True)
    monkeypatch.setattr(embed, "last_states_varlen", counted)
    found = embedder.encode(sample_sentences(), convert_to_tensor=True)
    assert sum(calls) == len(sample_sentences())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("kernel")
def test_a_model_that_used_varlen_can_be_pickled() -> None:
    model = make_causal_lm("llama")
    ids = torch.tensor([[7, 30, 8, 12]])
    expected = model(input_ids=ids).logits
    last_states_varlen(model.base_model, ids, torch.ones_like(ids))
    # Whatever unpickles one of our modules imports this one.
    code = "import pickle, sys, torch, sempa_st.forward.embed; model = pickle.load(sys.stdin.buffer); "
    code += f"print(model(torch.tensor({ids.tolist()})).logits.sum().item())"
    result = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(model), capture_output=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(float(expected.sum()), rel=1e-4)
