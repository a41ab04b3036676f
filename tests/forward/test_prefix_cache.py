"""Activated adapters: of the template's suffix only, and of the whole sentence under the template."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import (
    add_random_adapter,
    make_config,
    make_gemma,
    make_llama,
    make_tokenizer,
    sample_sentences,
    save_base,
)
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForCausalLM, OPTConfig, OPTForCausalLM

import sempa_st
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model
from sempa_st.folder.layout import ModelFolder
from sempa_st.forward.embed import embed_rows_fast
from sempa_st.model.prompt_eol import PromptEOL, embed_rows
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.model.tokenizer import install_template, load_tokenizer, prefix_tokens, suffix_tokens
from sempa_st.training.forward import TrainingForward, last_states
from sempa_st.training.run import train

pytestmark = pytest.mark.names_dtype

TEMPLATE = EMBEDDING_TEMPLATES["prompteol"]
SENTENCES = ["A cat", "Dogs bark.", sample_sentences()[3], "", 'Who said "no"?', "word " * 90]
TEXTS = ["The best thing about a rainy Sunday", "A cat means in one word", "Once upon a time there was"]


def make_parts(model: Any, *, activated: bool = False) -> tuple[Any, Any]:
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    install_template(tokenizer, TEMPLATE)
    invocation = suffix_tokens(tokenizer, "prompteol") if activated else None
    return add_random_adapter(model, invocation=invocation), tokenizer


def make_module(model: Any, **kwargs: Any) -> PromptEOL:
    return PromptEOL(*make_parts(model, activated=True), max_seq_length=160, **kwargs)


def adapter_gradients(module: PromptEOL) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in module.model.named_parameters() if p.grad is not None}
    module.model.zero_grad()
    return found


@pytest.mark.parametrize("make", [make_llama, make_gemma])
def test_prefix_cache_equals_one_pass(make: Any) -> None:
    """Hidden states and gradients; the tiny Gemma's window of 16 tokens is shorter than most sentences here."""
    module = make_module(make())
    batch = module.preprocess(SENTENCES)
    lengths = batch["attention_mask"].sum(dim=1)
    assert lengths.min() < lengths.max() == 160
    two, reference = last_states(module, batch["input_ids"], batch["attention_mask"], num_reference=3)
    one = module(dict(batch))["sentence_embedding"]
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
    with torch.no_grad(), module.model.disable_adapter():
        plain = module(dict(batch))["sentence_embedding"]
    torch.testing.assert_close(reference, plain[:3], rtol=0, atol=1e-5)
    assert not reference.requires_grad
    assert (one - plain).norm(dim=1).min() > 1e-2
    check_gradients(module, two, one)


@pytest.mark.parametrize("make", [make_llama, make_gemma])
@pytest.mark.parametrize("sentences", [SENTENCES, ["A cat", "A dog", "Birds"]], ids=["long", "short"])
@pytest.mark.parametrize("activated", [False, True])
def test_sequences_that_share_a_prefix_equal_sequences_alone(make: Any, sentences: list[str], activated: bool) -> None:
    """A plain adapter acts on the shared prefix too, whose gradients come from all sequences."""
    module = PromptEOL(*make_parts(make(), activated=activated), max_seq_length=160)
    module.forward_rows = TrainingForward()
    batch = module.preprocess(sentences)
    # As sentence-transformers' loss joins the columns of a batch, with padding on the right too.
    batch = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in batch.items()}
    together = module(dict(batch))["sentence_embedding"]
    alone = [embed_rows(module, **module.preprocess([text])) for text in sentences]
    one = torch.cat(alone)
    torch.testing.assert_close(together, one, rtol=0, atol=1e-5)
    check_gradients(module, together, one)


@pytest.mark.parametrize("make", [make_llama, make_gemma])
@torch.no_grad()
def test_an_adapter_of_the_whole_template_runs_as_a_plain_one(make: Any) -> None:
    """At a plain one's price: PEFT's own way gathers the tokens that the adapter acts on in every layer."""
    tokenizer = make_tokenizer()
    install_template(tokenizer, TEMPLATE)
    model = add_random_adapter(make(), invocation=prefix_tokens(tokenizer, "prompteol"))
    module = PromptEOL(model, tokenizer, max_seq_length=160)
    batch = module.preprocess(["A cat", "A dog", "Birds"])
    expected = embed_rows(module, **batch)
    logits = model(**batch).logits
    torch.testing.assert_close(embed_rows_fast(module, **batch), expected, rtol=0, atol=1e-5)
    with model.disable_adapter():
        plain = embed_rows_fast(module, **batch)
    assert float((plain - expected).norm(dim=1).min()) > 1e-2
    assert torch.equal(model(**batch).logits, logits)  # and back to PEFT's own way


def check_gradients(module: PromptEOL, first: torch.Tensor, second: torch.Tensor) -> None:
    """Two ways to the same states have the same gradients, to the adapter and to nothing else."""
    direction = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)) / first.numel()
    (first * direction).sum().backward()
    gradients = adapter_gradients(module)
    (second * direction).sum().backward()
    expected = adapter_gradients(module)
    assert gradients.keys() == expected.keys()
    assert all("lora_" in name for name in gradients)
    assert sum(float(gradient.abs().sum()) > 0 for gradient in gradients.values()) > len(gradients) / 2
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("template", list(EMBEDDING_TEMPLATES))
def test_every_sentence_ends_in_the_suffix(template: str) -> None:
    tokenizer = make_tokenizer()
    install_template(tokenizer, EMBEDDING_TEMPLATES[template])
    suffix = suffix_tokens(tokenizer, template)
    assert len(suffix) > 3
    module = PromptEOL(make_llama(), tokenizer, template=template, max_seq_length=160)
    marks = [f"x{a}{b}" for a in string.punctuation + " " for b in string.printable]
    for row in module.token_rows([*marks, *sample_sentences(), *SENTENCES, "ö", "😀", "「猫」", "\n"]):
        assert row[-len(suffix) :] == suffix


@pytest.mark.parametrize("template", list(EMBEDDING_TEMPLATES))
def test_every_sentence_begins_with_the_prefix(template: str) -> None:
    tokenizer = make_tokenizer()
    install_template(tokenizer, EMBEDDING_TEMPLATES[template])
    prefix = prefix_tokens(tokenizer, template)
    assert len(prefix) > 2
    module = PromptEOL(make_llama(), tokenizer, template=template, max_seq_length=160)
    marks = [f"{a}{b}x" for a in string.printable for b in string.punctuation + " "]
    for row in module.token_rows([*marks, *sample_sentences(), *SENTENCES, "ö", "😀", "「猫」", "\n"]):
        assert row[: len(prefix)] == prefix


def train_words(base: Path, output: Path, activation: str) -> Path:
    settings = {"objective": "one-word-listwise", "learning_rate": 2e-2, "checkpoint_samples": 24}
    train(make_config(base, output, activation=activation, **settings))
    return output


@pytest.fixture(scope="module", params=["template", "sentence"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    return train_words(tiny_base, tmp_path_factory.mktemp("trained") / request.param, request.param)


def test_on_whole_sentences_it_is_trained_as_a_plain_one(folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    if folder.name == "template":
        pytest.skip("its adapter acts on a part of the row")
    plain = train_words(tiny_base, tmp_path / "plain", "always")
    tensors = [load_file(path / "adapter_model.safetensors") for path in (folder, plain)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_training_writes_a_custom_folder(folder: Path) -> None:
    assert (ModelFolder(folder).format, ModelFolder(folder).is_activated) == ("custom", True)
    settings = json.loads((folder / "adapter_config.json").read_text())
    tokenizer = load_tokenizer(folder)
    tokens = {"template": suffix_tokens, "sentence": prefix_tokens}[folder.name](tokenizer, "prompteol")
    assert settings["alora_invocation_tokens"] == tokens
    assert json.loads((folder / "sempa_run.json").read_text())["config"]["activation"] == folder.name
    assert "trust_remote_code=True" in (folder / "README.md").read_text()


def test_the_generator_is_the_base_where_the_adapter_does_not_act(folder: Path, tiny_base: Path) -> None:
    tuned = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    tokenizer = make_tokenizer()
    with torch.no_grad():
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt")
            assert torch.equal(tuned(**ids).logits, base(**ids).logits)
            drawn = [model.generate(**ids, max_new_tokens=8, do_sample=False) for model in (tuned, base)]
            assert torch.equal(*drawn)
        ids = tokenizer(TEMPLATE.text("A cat"), return_tensors="pt")
        suffix = len(tuned.active_peft_config.alora_invocation_tokens)
        acts = suffix if folder.name == "template" else ids["input_ids"].shape[1]
        logits = tuned(**ids).logits, base(**ids).logits
        assert torch.equal(*(values[:, :-acts] for values in logits))
        assert (logits[0] - logits[1])[:, -acts:].abs().amax(dim=-1).min() > 1e-3


def vectors_by_peft(folder: Path) -> np.ndarray:
    """One sentence at a time, through PEFT's own search for the invocation tokens."""
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer, vectors = make_tokenizer(), []
    for sentence in SENTENCES[:-1]:
        ids = tokenizer(TEMPLATE.text(sentence), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            vectors.append(model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1])
    return torch.nn.functional.normalize(torch.stack(vectors)).numpy()


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_vectors_are_those_of_pefts_own_search(
    folder: Path, tiny_base: Path, padding_side: str, batch_size: int
) -> None:
    model = sempa_st.load(folder, dtype="float32", device="cpu")
    model.tokenizer.padding_side = padding_side
    vectors = model.encode(SENTENCES, batch_size=batch_size)
    np.testing.assert_allclose(vectors[:-1], vectors_by_peft(folder), rtol=0, atol=1e-5)
    plain = sempa_st.load(tiny_base, dtype="float32", device="cpu").encode(SENTENCES[:-1])
    assert np.abs(vectors[:-1] - plain).max(axis=1).min() > 1e-3


def test_sentence_transformers_gives_the_same_vectors_when_trusted(folder: Path) -> None:
    expected = sempa_st.load(folder, dtype="float32", device="cpu").encode(SENTENCES)
    trusted = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(trusted.encode(SENTENCES), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(folder), device="cpu")


def test_readers_that_would_pass_the_adapter_over_are_refused(folder: Path) -> None:
    for reader in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=r"activated adapter: embed with sempa_st\.load"):
            reader.from_pretrained(folder)
    with pytest.raises(SempaError, match="activated one, which has no native form"):
        sempa_st.load(folder, reader="native", dtype="float32")


def test_copies_stay_activated(folder: Path, tmp_path: Path) -> None:
    for format in ("custom", "native"):
        with pytest.raises(SempaError, match="activated one, which cannot be merged"):
            copy_model(str(folder), tmp_path / "wrong", merge=True, format=format)
    if folder.name == "template":
        with pytest.raises(SempaError, match=r"activated one.*Expected format custom"):
            copy_model(str(folder), tmp_path / "wrong", format="native")
    assert not (tmp_path / "wrong").exists()
    copy = copy_model(str(folder), tmp_path / "copy")
    vectors = [sempa_st.load(path, dtype="float32", device="cpu").encode(SENTENCES) for path in (folder, copy)]
    assert np.array_equal(*vectors)
    with pytest.raises(ValueError, match="activated adapter"):
        AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize("merge", [False, True])
def test_a_native_copy_of_whole_sentences_has_the_same_vectors(folder: Path, tmp_path: Path, merge: bool) -> None:
    if folder.name == "template":
        pytest.skip("its adapter acts on a part of the row")
    copy = copy_model(str(folder), tmp_path / "native", format="native")
    if merge:
        copy = copy_model(str(copy), tmp_path / "merged", merge=True)
    expected = sempa_st.load(folder, dtype="float32", device="cpu").encode(SENTENCES)
    plain = SentenceTransformer(str(copy), device="cpu")
    np.testing.assert_allclose(plain.encode(SENTENCES), expected, rtol=0, atol=1e-5)
    ids = make_tokenizer()(TEXTS[0], return_tensors="pt")
    tuned = sempa_st.load(copy, dtype="float32", device="cpu")[0].model(**ids).logits
    activated = sempa_st.load(folder, dtype="float32", device="cpu")[0].model(**ids).logits
    assert (tuned - activated).abs().max() > 1e-3


def test_a_plain_adapter_can_be_activated(adapter_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    copy = copy_model(str(adapter_folder), tmp_path / "activated", activate=True)
    assert ModelFolder(copy).format == "custom"
    plain, activated, base = (
        sempa_st.load(path, dtype="float32", device="cpu") for path in (adapter_folder, copy, tiny_base)
    )
    np.testing.assert_allclose(activated.encode(SENTENCES), plain.encode(SENTENCES), rtol=0, atol=1e-5)
    ids = make_tokenizer()(TEXTS[0], return_tensors="pt")
    logits = [model[0].model(**ids).logits for model in (activated, base, plain)]
    assert torch.equal(logits[0], logits[1])
    assert (logits[1] - logits[2]).abs().max() > 1e-3
    back = copy_model(str(copy), tmp_path / "plain", format="native")
    assert json.loads((back / "adapter_config.json").read_text())["alora_invocation_tokens"] is None
    for source, settings in (
        (adapter_folder, {"merge": True}),
        (adapter_folder, {"format": "native"}),
        (tiny_base, {}),
        (copy, {}),
    ):
        with pytest.raises(SempaError, match="--activate cannot be applied"):
            copy_model(str(source), tmp_path / "refused", activate=True, **settings)
    assert not (tmp_path / "refused").exists()


def test_settings_that_do_not_go_together_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    one_word = {"objective": "one-word", "activation": "template"}
    for message, settings in {
        "objective dpo trains on text without the embedding template": {"activation": "template"},
        "objective listwise trains on text": {**one_word, "objective": "one-word,listwise"},
        "kl keeps the model close to the base": {**one_word, "kl": 0.1},
        "Expected --format custom": {**one_word, "format": "native"},
        "gradient_checkpointing does not work": {**one_word, "gradient_checkpointing": True},
        "contains both dpo and listwise": {"objective": "dpo,listwise"},
        "Unknown objective 'nope'": {"objective": "nope"},
        "lora_layers is '1-'": {"lora_layers": "1-"},
        "lora_layers is 'a'": {"lora_layers": "a"},
        "lora_layers is '2-1'": {"lora_layers": "2-1"},
        "lora_layers is '1,,2'": {"lora_layers": "1,,2"},
    }.items():
        with pytest.raises(SempaError, match=message):
            make_config(tiny_base, tmp_path, **settings)
    for activation in ("template", "sentence"):
        config = make_config(tiny_base, tmp_path, **{**one_word, "activation": activation})
        assert (config.folder_format, config.is_activated) == ("custom", True)
    assert make_config(tiny_base, tmp_path, lora_layers="2, 0-1,1").adapted_layers == [0, 1, 2]
    assert make_config(tiny_base, tmp_path).adapted_layers is None


def test_only_the_chosen_layers_are_adapted(tiny_base: Path, tmp_path: Path) -> None:
    names = [name for name, _ in add_random_adapter(make_llama(), layers=[0, 2]).named_parameters() if "lora_B" in name]
    assert {name.split(".layers.")[1][0] for name in names} == {"0", "2"}
    with pytest.raises(SempaError, match="no decoder layer 3 to adapt: the base's layers are 0 to 2"):
        train(make_config(tiny_base, tmp_path / "model", lora_layers="1-3"))
    assert not list(tmp_path.iterdir())


def test_a_template_without_words_of_its_own_is_refused() -> None:
    tokenizer = make_tokenizer()
    install_template(tokenizer, TEMPLATE)
    tokenizer.chat_template = {**tokenizer.chat_template, "open": "{{ messages[0]['content'] }}"}
    with pytest.raises(SempaError, match="do not end in the same token"):
        suffix_tokens(tokenizer, "open")
    with pytest.raises(SempaError, match="do not begin alike"):
        prefix_tokens(tokenizer, "open")


def test_an_architecture_that_hides_its_tokens_is_refused(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=600, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    base = save_base(tmp_path / "tiny-opt", OPTForCausalLM(config), make_tokenizer(chat=None))
    settings = {"objective": "one-word-listwise", "activation": "template"}
    with pytest.raises(SempaError, match="does not work with OPTModel"):
        train(make_config(base, tmp_path / "m", **settings))
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "m.training").exists()
