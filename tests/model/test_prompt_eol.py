from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import make_causal_lm
from helpers.tiny import make_gemma, make_llama, make_tokenizer, randomise, sample_sentences, save_base
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cosine_similarity
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_imports

import sempa_st
from sempa_st.folder.copying import copy_model
from sempa_st.model.prompt_eol import SOURCES, PromptEOL
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.model.token_rows import pad_rows, tokenize
from sempa_st.model.tokenizer import install_template

pytestmark = pytest.mark.names_dtype

TEMPLATE = EMBEDDING_TEMPLATES["prompteol"]


def make_opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=600,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            word_embed_proj_dim=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=600, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


DECODERS = {"llama": make_llama, "gemma": make_gemma, "opt": make_opt, "gpt2": make_gpt2}


def make_module(model: Any = None, *, padding_side: str = "left", **kwargs: Any) -> PromptEOL:
    tokenizer = make_tokenizer()
    tokenizer.padding_side = padding_side
    install_template(tokenizer, TEMPLATE)
    return PromptEOL(model or make_llama(), tokenizer, **kwargs)


def manual_embedding(model: Any, tokenizer: Any, sentence: str) -> torch.Tensor:
    """The paper's procedure, one sentence at a time: all hidden states of the causal LM, last layer, last token."""
    inputs = tokenizer(TEMPLATE.text(sentence), return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    return states[-1][0, -1]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_batches_equal_a_manual_forward(name: str, padding_side: str) -> None:
    model = DECODERS[name]()
    module = make_module(model, padding_side=padding_side, max_seq_length=256)
    sentences = [*sample_sentences()[:29], "", 'Who said "no"?', "Ünï 😀"]
    plain = make_tokenizer()
    expected = torch.stack([manual_embedding(model, plain, sentence) for sentence in sentences])
    embedder = SentenceTransformer(modules=[module], device="cpu")
    for batch_size in (1, 32):
        actual = embedder.encode(sentences, batch_size=batch_size, convert_to_tensor=True)
        assert cosine_similarity(actual, expected).min() >= 0.99999
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right", None])
def test_rows_are_padded_as_by_the_tokenizer(side: str | None) -> None:
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    rows = [[5, 6, 7], [8], [9, 10, 11, 12]]
    expected = tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
    actual = pad_rows(tokenizer, rows, side)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name])
        assert tensor.dtype == expected[name].dtype


def test_a_long_sentence_is_cut_and_the_template_is_not() -> None:
    module = make_module(max_seq_length=40)
    tokenizer = module.tokenizer
    ids = module.preprocess(["word " * 200, "short"])
    length = int(ids["attention_mask"][0].sum())
    text = tokenizer.decode(ids["input_ids"][0])
    assert length == 40
    assert text.startswith('<bos>This sentence : "word word')
    assert text.endswith('" means in one word:"')
    whole = make_module(max_seq_length=400).preprocess(["short"])
    short = ids["input_ids"][1][ids["attention_mask"][1].bool()]
    assert short[-8:].tolist() == whole["input_ids"][0][-8:].tolist()


def test_special_tokens_around_the_text_are_those_of_plain_tokenisation() -> None:
    for bos in (True, False):
        tokenizer = make_tokenizer(bos=bos)
        install_template(tokenizer, TEMPLATE)
        module = PromptEOL(make_llama(), tokenizer)
        ids = module.preprocess(["A cat"])["input_ids"][0].tolist()
        assert ids == make_tokenizer(bos=bos)(TEMPLATE.text("A cat"))["input_ids"]
        assert tokenizer.eos_token_id not in ids


def make_sentencepiece_like(prepend: str, *, bos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer with SentencePiece's word marks, as Llama 2 (``first``: none after BOS) or Mistral have them."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prepend, split=False)
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=prepend)
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=["😀", "°", "—"], show_progress=False
    )
    core.train_from_iterator([*sample_sentences(), TEMPLATE.text("0123")] * 2, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("prepend", ["first", "always", "never"])
def test_word_marks_are_those_of_plain_tokenisation(prepend: str, bos: bool) -> None:
    tokenizer = make_sentencepiece_like(prepend, bos=bos)
    install_template(tokenizer, TEMPLATE)
    module = PromptEOL(make_llama(), tokenizer)
    plain = make_sentencepiece_like(prepend, bos=bos)
    for sentence in ("A cat sleeps", "", 'Who said "no"?'):
        assert module.preprocess([sentence])["input_ids"][0].tolist() == plain(TEMPLATE.text(sentence))["input_ids"]


def test_an_eos_that_the_tokenizer_adds_is_left_out() -> None:
    tokenizer = make_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", pair="$A $B", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    install_template(tokenizer, TEMPLATE)
    ids = PromptEOL(make_llama(), tokenizer).preprocess(["A cat"])["input_ids"][0].tolist()
    assert ids == make_tokenizer()(TEMPLATE.text("A cat"))["input_ids"]


def test_a_prompt_goes_before_the_sentence() -> None:
    embedder = SentenceTransformer(modules=[make_module()], device="cpu", prompts={"query": "Find: ", "document": ""})
    spelt_out = embedder.encode("Find: a cat")
    assert embedder.encode("a cat", prompt="Find: ") == pytest.approx(spelt_out, abs=1e-6)
    assert embedder.encode_query("a cat") == pytest.approx(spelt_out, abs=1e-6)
    assert embedder.encode_document("a cat") == pytest.approx(embedder.encode("a cat"), abs=1e-6)


def test_the_module_has_a_width_and_generates() -> None:
    module = make_module()
    embedder = SentenceTransformer(modules=[module], device="cpu")
    assert embedder.get_embedding_dimension() == 32
    ids = module.tokenizer("A cat", return_tensors="pt")
    assert module.model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_gradients_reach_the_decoder() -> None:
    module = make_module()
    module.forward(module.preprocess(["A cat", "A longer sentence here"]))["sentence_embedding"].sum().backward()
    gradient = module.decoder.layers[0].self_attn.q_proj.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="no chat template named 'nope'"):
        make_module(template="nope")
    with pytest.raises(ValueError, match="max_seq_length 5 leaves no room"):
        make_module(max_seq_length=5)
    with pytest.raises(ValueError, match=r"embeds sentences, .* got int: 7"):
        SentenceTransformer(modules=[make_module()], device="cpu").encode(["a", 7])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="torch backend only"):
        PromptEOL.load("anything", backend="onnx")


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    module = make_module(max_seq_length=77)
    sentences = sample_sentences()[:8]
    before = SentenceTransformer(modules=[module], device="cpu").encode(sentences)
    module.save(str(tmp_path))
    loaded = PromptEOL.load(str(tmp_path), local_files_only=True)
    assert (loaded.max_seq_length, loaded.template) == (77, "prompteol")
    assert SentenceTransformer(modules=[loaded], device="cpu").encode(sentences) == pytest.approx(before, abs=1e-5)
    for name in SOURCES:
        source = Path("sempa_st/model", name)
        assert (tmp_path / name).read_text() == source.read_text()
        # Transformers refuses a folder whose code names a package that is not installed.
        packages = set(get_imports(source)) - sys.stdlib_module_names
        assert packages <= {"torch", "transformers", "sentence_transformers", "peft", "safetensors"}


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": True},
        {"padding": "max_length", "max_length": 90},
        {"truncation": True, "max_length": 3, "stride": 1},
    ],
)
def test_settings_of_other_calls_of_the_tokenizer_change_nothing(settings: dict[str, Any]) -> None:
    """They stay on a fast tokenizer after the call, and another thread may set them at any time."""
    tokenizer = make_tokenizer()
    texts = ["A cat", "", "A dog sleeps in the snow."]
    for special in (True, False):
        plain = tokenizer(texts, add_special_tokens=special, return_offsets_mapping=True)
        tokenizer(texts, **settings)
        set_before = (tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation)
        found = tokenize(tokenizer, texts, add_special_tokens=special)
        assert found == list(zip(plain["input_ids"], plain["offset_mapping"], strict=True))
        assert (tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation) == set_before


def test_token_embeddings_and_other_inputs_are_those_of_plain_modules(adapter_folder: Path) -> None:
    plain = SentenceTransformer(str(adapter_folder), device="cpu")
    loaded = sempa_st.load(adapter_folder, device="cpu", dtype="float32")
    texts = ["A cat", "A dog sleeps in the snow."]
    for output in ("token_embeddings", None):
        found, expected = (model.encode(texts, output_value=output) for model in (loaded, plain))
        for one, other in zip(found, expected, strict=True):
            if output is None:
                one, other = (row["token_embeddings"][row["attention_mask"].bool()] for row in (one, other))
            other = other[-len(one) :]  # plain sentence-transformers leaves the padding on the left in
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    for wrapped in ([{"text": text} for text in texts], {"text": texts[0]}):
        found, expected = (torch.as_tensor(model.encode(wrapped)) for model in (loaded, plain))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    for bad in ([3], [{"text": 3}]):
        with pytest.raises(ValueError, match=r"embeds sentences, each a string or \{'text': string\}"):
            loaded.encode(bad)
    method = sempa_st.load(adapter_folder, device="cpu", method="mean", dtype="float32")
    assert [features["sentence_embedding"].shape for features in method.encode(texts, output_value=None)] == [(32,)] * 2
    with pytest.raises(ValueError, match="one vector a sentence, and no token embeddings"):
        method.encode(texts, output_value="token_embeddings")


@pytest.mark.parametrize("method", [None, "mean"])
def test_vectors_in_sixteen_bits_can_have_norm_one(tiny_base: Path, method: str | None) -> None:
    model = sempa_st.load(tiny_base, method=method, device="cpu", dtype="bfloat16")
    for options in ({}, {"convert_to_tensor": True}):
        vectors = torch.as_tensor(model.encode(sample_sentences()[:9], normalize_embeddings=True, **options))
        assert vectors.dtype == torch.float32
        assert float((vectors.norm(dim=1) - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neo", "gptj"])
@pytest.mark.parametrize("method", [None, "mean", "token-prepending:exit=2:layer=2"])
def test_a_text_is_cut_to_the_positions_that_the_model_has(family: str, method: str | None, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"rotary_dim": 4} if family == "gptj" else {}
    if family == "gpt_neo":
        changes = {"attention_types": [[["global"], 3]]}
    if method and family != "opt":
        pytest.skip("methods know its layers by no name")
    model = make_causal_lm(family, **{"max_position_embeddings": 128, **changes})
    base = save_base(tmp_path / "base", model, make_tokenizer())
    embedder = sempa_st.load(base, method=method, device="cpu", dtype="float32")
    long = "A cat sleeps in the snow. " * 100
    assert np.isfinite(embedder.encode([long, "A cat"])).all()
    if not method:
        assert embedder[0].max_seq_length == len(embedder[0].token_rows([long])[0]) == 128
        native = SentenceTransformer(str(copy_model(str(base), tmp_path / "native")), device="cpu")
        np.testing.assert_allclose(native.encode([long]), embedder.encode([long]), rtol=0, atol=1e-4)


def test_an_adapter_that_sentence_transformers_adds_works_and_is_kept(tiny_base: Path, tmp_path: Path) -> None:
    model = sempa_st.load(tiny_base, device="cpu", dtype="float32")
    before = model.encode(["A cat"])
    model.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=["q_proj"]))
    np.testing.assert_allclose(model.encode(["A cat"]), before, rtol=0, atol=1e-6)
    randomise(model)
    after = model.encode(["A cat"])
    assert abs(after - before).max() > 1e-3
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    model.save_pretrained(str(tmp_path / "saved"))
    again = sempa_st.load(tmp_path / "saved", device="cpu", dtype="float32")
    np.testing.assert_allclose(again.encode(["A cat"]), after, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [None, "mean"])
def test_a_text_may_spell_out_a_token_that_the_model_has_no_embedding_of(
    method: str | None, tiny_base: Path, tmp_path: Path
) -> None:
    """As Gemma 3's for an image, which the small models' matrix does not hold."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(base)
    assert tokenizer.convert_tokens_to_ids("<image>") == 600
    model = sempa_st.load(base, method=method, device="cpu", dtype="float32")
    plain = sempa_st.load(tiny_base, method=method, device="cpu", dtype="float32")
    found, expected = model.encode(["A <image> cat", "A dog"]), plain.encode(["A <pad> cat", "A dog"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
