from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.families import make_causal_lm
from helpers.tiny import make_tokenizer, save_base

import sempa_st
from sempa_st.analysis import tokens
from sempa_st.analysis.tokens import LanguageHead, aligned_tokens
from sempa_st.errors import SempaError
from sempa_st.loading import load
from sempa_st.model.templates import EMBEDDING_TEMPLATES

pytestmark = pytest.mark.names_dtype

Cli = Callable[..., tuple[int, str, str]]
SENTENCE = "Two dogs run over the wet grass."
FAMILIES = {
    **{name: {} for name in ("llama", "opt", "gpt2", "gptj", "phi", "qwen3", "bloom", "lfm2")},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}
"""Architectures, and what some do to the logits, strong enough to be noticed."""


def own_top(causal_lm: torch.nn.Module, tokenizer: object, k: int) -> tuple[list[int], list[float]]:
    """The largest logits of the decoder's own forward at the end of the prompt."""
    text = EMBEDDING_TEMPLATES["prompteol"].text(SENTENCE)
    with torch.no_grad():
        logits = causal_lm(**tokenizer(text, return_tensors="pt"), use_cache=False).logits  # type: ignore[operator]
    values, ids = logits[0, -1].topk(k)
    return ids.tolist(), values.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_those_of_the_decoders_own_forward(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_CHUNK", 77)  # several chunks, and one that is not full
    causal_lm = make_causal_lm(family, **FAMILIES[family])
    tokenizer = make_tokenizer()
    model = load(save_base(tmp_path / "base", causal_lm, tokenizer), dtype="float32", device="cpu")
    (found,) = aligned_tokens(model, [SENTENCE], k=12)
    ids, logits = own_top(causal_lm, model.tokenizer, 12)
    assert [token.id for token in found] == ids
    assert [token.logit for token in found] == pytest.approx(logits, rel=1e-3, abs=1e-3)


def test_an_adapter_changes_the_tokens(adapter_folder: Path, tiny_base: Path) -> None:
    tuned = load(adapter_folder, dtype="float32", device="cpu")
    ids, logits = own_top(tuned[0].causal_lm, tuned.tokenizer, 10)
    (found,) = aligned_tokens(tuned, [SENTENCE])
    assert [token.id for token in found] == ids
    assert [token.logit for token in found] == pytest.approx(logits, rel=1e-3)
    (before,) = aligned_tokens(load(tiny_base, dtype="float32", device="cpu"), [SENTENCE])
    assert [token.id for token in before] != ids


@pytest.mark.parametrize("method", ["prompteol", "mean", "echo"])
def test_embeddings_of_methods_go_through_the_head(method: str, tiny_base: Path, tmp_path: Path) -> None:
    model = load(tiny_base, method=method, dtype="float32", device="cpu")
    head = model[0].model.lm_head.weight
    logits = torch.from_numpy(model.encode([SENTENCE])) @ head.T
    (found,) = aligned_tokens(model, [SENTENCE], k=4)
    assert [token.id for token in found] == logits[0].topk(4).indices.tolist()


def test_weights_in_16_bits_are_multiplied_in_32(tiny_base: Path) -> None:
    model = load(tiny_base, dtype="bfloat16", device="cpu")
    vectors = model.encode([SENTENCE], convert_to_tensor=True)
    ids, logits = LanguageHead(model).top(vectors, 600)
    exact = vectors.double() @ model[0].causal_lm.lm_head.weight.double().T
    torch.testing.assert_close(logits.double(), exact.gather(1, ids), rtol=1e-5, atol=1e-5)
    assert ids[0].tolist() == exact[0].argsort(descending=True).tolist()


def test_texts_of_tokens(tiny_base: Path) -> None:
    model = load(tiny_base, dtype="float32", device="cpu")
    head = LanguageHead(model)
    ids = model.tokenizer("A man plays", add_special_tokens=False)["input_ids"]
    assert "".join(map(head.text, ids)) == "A▁man▁plays"
    assert head.surface("A man, a man") == set(model.tokenizer("A man, a man", add_special_tokens=False)["input_ids"])
    assert head.text(model.tokenizer("\n", add_special_tokens=False)["input_ids"][0]) == "\\n"
    assert all(head.text(token).isprintable() and head.text(token) for token in range(600))


@pytest.mark.parametrize("k", [0, 601])
def test_k_is_checked(k: int, tiny_base: Path) -> None:
    with pytest.raises(SempaError, match=f"k is {k}. Expected a number from 1 to 600"):
        aligned_tokens(load(tiny_base, dtype="float32", device="cpu"), [SENTENCE], k=k)


def test_embeddings_that_the_head_does_not_read_are_refused(
    tiny_base: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    options = {"dtype": "float32", "device": "cpu"}
    with pytest.raises(SempaError, match="reads a layer before the last"):
        aligned_tokens(load(tiny_base, method="prompteol:layer=-2", **options), [SENTENCE])  # type: ignore[arg-type]
    with pytest.raises(SempaError, match="is not a decoder with an LM head"):
        aligned_tokens(load(adapter_folder, reader="native", **options), [SENTENCE])  # type: ignore[arg-type]
    model = load(tiny_base, **options)  # type: ignore[arg-type]
    with pytest.raises(SempaError, match=r"shape \(1, 9\)\. Expected rows of width 32"):
        LanguageHead(model).top(torch.zeros(1, 9), 3)
    headless = tmp_path / "headless"
    model[0].decoder.save_pretrained(headless)
    model.tokenizer.save_pretrained(headless)
    config = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(SempaError, match="MissingHead"):
        aligned_tokens(load(headless, **options), [SENTENCE])  # type: ignore[arg-type]


def test_the_command_shows_models_side_by_side(
    run_cli: Cli, tiny_base: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    options = ("--k", 3, "--dtype", "float32", "--device", "cpu")
    code, out, err = run_cli("tokens", tiny_base, f"mean:{tiny_base}", adapter_folder, SENTENCE, *options)
    assert code == 0, err
    header, _, *rows = out.splitlines()
    assert header.split() == ["rank", "tiny-llama", "mean:tiny-llama", "tiny-sempa"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    code, out, _ = run_cli("tokens", tiny_base, SENTENCE, "--json", *options)
    (expected,) = aligned_tokens(sempa_st.load(tiny_base, dtype="float32", device="cpu"), [SENTENCE], k=3)
    assert json.loads(out)["models"]["tiny-llama"] == [vars(token) for token in expected]
    assert all(token.text in row for token, row in zip(expected, rows, strict=True))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no-such-model", "A cat."], "no-such-model"),
        (["BASE", "half \ud800 a character"], "lone surrogate"),
        (["BASE", "A cat.", "--k", "601"], "k is 601"),
        (["BASE", "A cat.", "--k", "0"], "0 is not a number above 0"),
        (["mean:layer=1:BASE", "A cat."], "reads a layer before the last"),
    ],
)
def test_bad_input_is_refused(run_cli: Cli, tiny_base: Path, argv: list[str], message: str) -> None:
    words = [word.replace("BASE", str(tiny_base)) for word in argv]
    code, out, err = run_cli("tokens", *words, "--dtype", "float32", "--device", "cpu")
    assert (code, out) == (2, "")
    assert message in err
