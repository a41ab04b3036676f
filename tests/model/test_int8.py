"""Int8 layers against the float layers that they stand for, and what a model with them can and cannot do."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import make_gemma, make_llama, make_tokenizer, sample_sentences, save_base
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import BertConfig, BertModel

import sempa_st
from sempa_st.encoding import encode_file
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model
from sempa_st.folder.identity import current_name
from sempa_st.model import int8
from sempa_st.model.int8 import Int8Linear

SENTENCES = sample_sentences()[:12]


def vectors(model: SentenceTransformer) -> Tensor:
    return torch.from_numpy(model.encode(SENTENCES))


def rounded_product(linear: nn.Linear, states: Tensor, *, balanced: bool, by_row: bool) -> Tensor:
    """Round weights by output channel to 8 bits and inputs to 7, in float arithmetic."""
    channel, weight = states.flatten(0, 1).abs().amax(0), linear.weight
    balance = channel**0.65 / weight.abs().amax(0) ** 0.35 if balanced else torch.ones_like(channel)
    inputs, weight = states / balance, weight * balance
    row = inputs.abs().amax(-1, keepdim=True) if by_row else torch.ones(1)
    inputs = inputs / row
    step, steps = (inputs.max() - inputs.min()) / 127, weight.abs().amax(1, keepdim=True) / 127
    output = row * ((inputs / step).round() * step @ ((weight / steps).round() * steps).T)
    return output if linear.bias is None else output + linear.bias


@pytest.mark.parametrize("bias", [True, False])
def test_rounding_follows_large_channels_and_large_rows(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias)
    linear.weight.data *= torch.linspace(2, -2, 64).exp()  # what is large going in counts little
    states = torch.randn(2, 20, 64) * torch.linspace(-2, 2, 64).exp()
    states[0, 3] *= 30
    with torch.no_grad():
        exact = linear(states)
        found = Int8Linear(linear, states.flatten(0, 1).abs().amax(0))(states)
        naive, without_balance, without_rows = (
            rounded_product(linear, states, balanced=balanced, by_row=by_row)
            for balanced, by_row in ((True, True), (False, True), (True, False))
        )
    wrong, from_naive, *worse = (
        difference.norm(dim=-1).median()
        for difference in (found - exact, found - naive, without_balance - exact, without_rows - exact)
    )
    assert from_naive < 0.01 * wrong
    assert min(worse) > 1.5 * wrong


def test_an_empty_row_gives_the_bias() -> None:
    linear = nn.Linear(8, 4)
    assert torch.equal(Int8Linear(linear, torch.ones(8))(torch.zeros(3, 8)), linear.bias.expand(3, 4))


@pytest.mark.parametrize("make", [make_gemma, make_llama])
def test_a_model_in_int8_stays_close_and_generates(
    make: Callable[[], nn.Module], tiny_base: Path, tiny_gemma: Path
) -> None:
    base = str(tiny_gemma if make is make_gemma else tiny_base)
    exact, rounded = sempa_st.load(base, device="cpu", dtype="float32"), sempa_st.load(base, device="cpu", int8=True)
    cosines = cosine_similarity(vectors(exact), vectors(rounded))
    assert cosines.min() > 0.99
    assert cosines.max() < 1 - 1e-7
    kinds = [type(layer) for layer in rounded[0].decoder.modules() if isinstance(layer, nn.Linear | Int8Linear)]
    assert Int8Linear in kinds
    assert isinstance(rounded[0].model.get_output_embeddings(), nn.Linear)
    inputs = rounded.tokenizer("a cat", return_tensors="pt")
    assert (
        rounded[0].model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    )
    assert exact.model_card_data.model_name != rounded.model_card_data.model_name


def test_layers_that_rounding_changes_too_much_are_left_alone(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = sempa_st.load(str(tiny_base), device="cpu", dtype="float32")
    linears = [name for name, layer in exact[0].decoder.named_modules() if isinstance(layer, nn.Linear)]
    before = vectors(exact)
    monkeypatch.setattr(int8, "_TOLERATED", 0.0)
    decoder = exact[0].decoder
    assert int8.quantize(decoder, lambda: exact.encode(SENTENCES)) == []
    assert torch.equal(vectors(exact), before)
    monkeypatch.setattr(int8, "_TOLERATED", 1.0)
    assert int8.quantize(decoder, lambda: exact.encode(SENTENCES)) == linears
    assert not torch.equal(vectors(exact), before)


def test_adapters_are_merged_and_methods_take_it_too(adapter_folder: Path, tiny_base: Path) -> None:
    folder = str(adapter_folder)
    exact, rounded = (
        sempa_st.load(folder, device="cpu", dtype="float32"),
        sempa_st.load(folder, device="cpu", int8=True),
    )
    bare = sempa_st.load(str(tiny_base), device="cpu", dtype="float32")
    close, far = (cosine_similarity(vectors(exact), vectors(other)) for other in (rounded, bare))
    assert close.min() > 0.99
    assert far.max() < close.min()
    assert not hasattr(rounded[0].model, "peft_config")
    pair = [
        sempa_st.load(str(tiny_base), method="echo", device="cpu", dtype="float32", int8=chosen)
        for chosen in (False, True)
    ]
    assert cosine_similarity(*(vectors(model) for model in pair)).min() > 0.99
    assert not torch.equal(*(vectors(model) for model in pair))


def test_what_int8_cannot_do_is_refused(adapter_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(SempaError, match=r"for float32 on a CPU, not for torch.bfloat16 on cpu"):
        sempa_st.load(str(tiny_base), dtype="bfloat16", device="cpu", int8=True)
    with pytest.raises(SempaError, match="leave out the native reader"):
        sempa_st.load(adapter_folder, reader="native", device="cpu", int8=True)
    bert = BertModel(BertConfig(vocab_size=600, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).eval()
    save_base(tmp_path / "bert", bert, make_tokenizer())
    with pytest.raises(SempaError, match="bert-avg reads an encoder"):
        sempa_st.load(tmp_path / "bert", method="bert-avg", device="cpu", int8=True)
    activated = copy_model(str(adapter_folder), tmp_path / "activated", activate=True)
    with pytest.raises(SempaError, match="which an activated one cannot be"):
        sempa_st.load(activated, device="cpu", int8=True)
    rounded = sempa_st.load(str(tiny_base), device="cpu", int8=True)
    with pytest.raises(SempaError, match="cannot be saved"):
        rounded.save(str(tmp_path / "saved"))


def test_the_command_line_takes_it(
    run_cli: Callable[..., tuple[int, str, str]], tiny_base: Path, tmp_path: Path
) -> None:
    source = tmp_path / "sentences.txt"
    source.write_text("\n".join(SENTENCES) + "\n")
    for name, flags in (("exact", []), ("rounded", ["--int8"])):
        code, _, _ = run_cli(
            "encode", tiny_base, source, "--output", tmp_path / f"{name}.npy", "--device", "cpu", *flags
        )
        assert code == 0
    exact, rounded = (torch.from_numpy(np.load(tmp_path / f"{name}.npy")) for name in ("exact", "rounded"))
    assert cosine_similarity(exact, rounded).min() > 0.99
    assert not torch.equal(exact, rounded)


def test_an_open_model_is_scored_and_writes_files(tiny_base: Path, tmp_path: Path) -> None:
    model = sempa_st.load(str(tiny_base), device="cpu", int8=True)
    (tmp_path / "texts.txt").write_text("A cat sleeps.\nTwo dogs run.\n")
    assert encode_file(model, tmp_path / "texts.txt", tmp_path / "v.npy") == (2, 32)
    exact = sempa_st.load(str(tiny_base), device="cpu", dtype="float32")
    names = [current_name(each) for each in (model, exact, sempa_st.load(str(tiny_base), device="cpu", int8=True))]
    assert names[0] == names[2] != names[1]


def test_other_processes_get_the_same_model(adapter_folder: Path) -> None:
    model = sempa_st.load(adapter_folder, device="cpu", int8=True)
    expected = model.encode(SENTENCES, batch_size=4)
    copied = pickle.loads(pickle.dumps(model[0]))
    other = type(model)(modules=[copied, *list(model)[1:]])
    assert torch.equal(*(torch.from_numpy(each.encode(SENTENCES)) for each in (model, other)))
    pool = model.start_multi_process_pool(["cpu"])
    try:
        found = model.encode(SENTENCES, pool=pool, chunk_size=6, batch_size=4)
    finally:
        model.stop_multi_process_pool(pool)
    # What is rounded how depends on the rows beside it.
    assert cosine_similarity(*map(torch.from_numpy, (found, expected))).min() > 0.999


@pytest.mark.parametrize("auto", ["float32", "bfloat16"])
def test_auto_means_what_int8_needs(auto: str, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMPA_AUTO_DTYPE", auto)
    assert sempa_st.load(tiny_base, device="cpu")[0].model.dtype == getattr(torch, auto)
    rounded = sempa_st.load(tiny_base, int8=True)
    assert (rounded[0].model.dtype, rounded.device.type) == (torch.float32, "cpu")
