from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.readers import assert_same, encode_without_sempa_st
from helpers.tiny import (
    CHAT_TEMPLATE,
    finish_adapter,
    make_gemma,
    make_llama,
    make_tokenizer,
    sample_sentences,
    save_base,
)
from peft import AutoPeftModelForCausalLM
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from transformers import AutoModelForCausalLM, AutoTokenizer

import sempa_st
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model
from sempa_st.folder.layout import ModelFolder
from sempa_st.model.templates import EMBEDDING_TEMPLATES

pytestmark = pytest.mark.names_dtype

SENTENCES = [*sample_sentences()[:60], "", 'Who said "no"?', "Ünï 😀", "word " * 300]


def load(folder: Path) -> SentenceTransformer:
    return sempa_st.load(folder, dtype="float32", device="cpu")


def manual_embeddings(folder: Path, sentences: list[str]) -> torch.Tensor:
    """The paper's procedure on PEFT's own causal LM: all hidden states, one sentence at a time."""
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = make_tokenizer()
    vectors = []
    for sentence in sentences:
        inputs = tokenizer(EMBEDDING_TEMPLATES["prompteol"].text(sentence), return_tensors="pt")
        with torch.no_grad():
            vectors.append(model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1])
    return torch.nn.functional.normalize(torch.stack(vectors))


@pytest.fixture(scope="module", params=["llama", "gemma"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        base = save_base(root / "base", make_llama(), make_tokenizer())
        return finish_adapter(root / "sempa", base, make_llama())
    base = save_base(root / "base", make_gemma(), make_tokenizer(chat=None))
    return finish_adapter(root / "sempa", base, make_gemma())


def test_three_readers_give_the_same_vectors(folder: Path) -> None:
    ours = load(folder).encode(SENTENCES)
    assert_same(SentenceTransformer(str(folder), device="cpu").encode(SENTENCES), ours)
    assert_same(manual_embeddings(folder, SENTENCES[:20]), ours[:20])
    assert_same(sempa_st.load(folder, dtype="float32", device="cpu", reader="native").encode(SENTENCES), ours)


def test_native_opens_without_sempa_st(folder: Path, tmp_path: Path) -> None:
    vectors = encode_without_sempa_st(folder, SENTENCES, trust=False, cwd=tmp_path)
    assert_same(vectors, load(folder).encode(SENTENCES))


def test_custom_opens_without_sempa_st_when_trusted(folder: Path, tmp_path: Path) -> None:
    custom = copy_model(str(folder), tmp_path / "custom-model", format="custom")
    assert ModelFolder(custom).format == "custom"
    assert not (custom / "1_Pooling").exists()
    vectors = encode_without_sempa_st(custom, SENTENCES, trust=True, cwd=tmp_path)
    assert_same(vectors, load(folder).encode(SENTENCES))
    assert_same(load(custom).encode(SENTENCES), vectors)
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(custom), device="cpu")
    back = copy_model(str(custom), tmp_path / "native-again")
    assert ModelFolder(back).format == "custom"
    native = copy_model(str(custom), tmp_path / "native", format="native")
    assert_same(SentenceTransformer(str(native), device="cpu").encode(SENTENCES), vectors)


def test_code_in_a_folder_is_never_run_by_us(folder: Path, tmp_path: Path) -> None:
    custom = copy_model(str(folder), tmp_path / "custom", format="custom")
    (custom / "prompt_eol.py").write_text("raise SystemExit('foreign code ran')")
    assert load(custom).encode(["a cat"]).shape == (1, 32)
    with pytest.raises(SempaError, match="is of format custom"):
        sempa_st.load(custom, reader="native", dtype="float32")


def test_added_modules_are_not_passed_over(folder: Path, tmp_path: Path) -> None:
    """A merged folder with another module is no longer ours: it is read as what it says it is."""
    merged = copy_model(str(folder), tmp_path / "merged", merge=True)
    native = SentenceTransformer(str(merged), device="cpu")
    native.append(Dense(32, 4))
    native.save_pretrained(str(tmp_path / "projected"))
    assert_same(load(tmp_path / "projected").encode(SENTENCES[:3]), native.encode(SENTENCES[:3]))


def test_a_sentence_that_just_fits_is_read_alike(folder: Path) -> None:
    """At exactly the limit a reader cannot tell a cut sentence from a whole one; both must do the same."""
    ours, native = load(folder), SentenceTransformer(str(folder), device="cpu")
    growing = ["x" + "x" * count + " '" for count in range(200)]
    lengths = [len(ours[0].preprocess([text])["input_ids"][0]) for text in growing]
    limit = lengths.index(160)
    fitting = growing[limit - 3 : limit + 6]
    assert lengths[limit - 3] < 160
    assert_same(native.encode(fitting, batch_size=1), ours.encode(fitting, batch_size=1))


def test_prompts_mean_the_same_to_both_readers(folder: Path) -> None:
    native = SentenceTransformer(str(folder), device="cpu").encode(["a cat"], prompt="Find: ")
    assert_same(native, load(folder).encode(["a cat"], prompt="Find: "))
    assert abs(native - load(folder).encode(["a cat"])).max() > 1e-3


def test_right_padding_changes_nothing(folder: Path) -> None:
    model = SentenceTransformer(str(folder), device="cpu", processor_kwargs={"padding_side": "right"})
    assert model.tokenizer.padding_side == "right"
    assert_same(model.encode(SENTENCES), load(folder).encode(SENTENCES))


def test_merged_is_a_full_model_with_the_same_vectors(folder: Path, tmp_path: Path) -> None:
    merged = copy_model(str(folder), tmp_path / "merged", merge=True)
    expected = load(folder).encode(SENTENCES)
    assert_same(load(merged).encode(SENTENCES), expected)
    assert_same(SentenceTransformer(str(merged), device="cpu").encode(SENTENCES), expected)
    assert not (merged / "adapter_config.json").exists()
    ids = AutoTokenizer.from_pretrained(merged)("A cat", return_tensors="pt")
    tuned = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(whole(**ids).logits, tuned(**ids).logits, rtol=1e-3, atol=1e-3)
    with pytest.raises(SempaError, match="nothing to merge"):
        copy_model(str(merged), tmp_path / "twice", merge=True)
    again = copy_model(str(merged), tmp_path / "again")
    assert_same(load(again).encode(SENTENCES[:4]), expected[:4])


def test_the_generator_without_adapter_is_the_base_bit_for_bit(folder: Path) -> None:
    tuned = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)("The best thing about rain", return_tensors="pt")
    with torch.no_grad():
        assert not torch.equal(tuned(**ids).logits, base(**ids).logits)
        with tuned.disable_adapter():
            assert torch.equal(tuned(**ids).logits, base(**ids).logits)


def test_the_bases_own_chat_template_stays(adapter_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(adapter_folder)
    messages = [{"role": "user", "content": "Hi"}]
    expected = make_tokenizer().apply_chat_template(messages, tokenize=False)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    assert (adapter_folder / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert (adapter_folder / "additional_chat_templates" / "prompteol.jinja").is_file()


def test_a_resaved_model_still_opens(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    expected = model.encode(SENTENCES[:5])
    model.save_pretrained(str(tmp_path / "resaved"))
    assert_same(load(tmp_path / "resaved").encode(SENTENCES[:5]), expected)


def test_a_base_becomes_a_native_folder(tiny_base: Path, tmp_path: Path) -> None:
    native = copy_model(str(tiny_base), tmp_path / "native", template="pretended-cot")
    expected = sempa_st.load(tiny_base, template="pretended-cot", dtype="float32", device="cpu").encode(SENTENCES)
    assert_same(SentenceTransformer(str(native), device="cpu").encode(SENTENCES), expected)
    ids = torch.tensor([[1, 7, 30]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(native, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(logits, make_llama()(ids).logits)


def test_a_moved_folder_is_repaired(tmp_path: Path) -> None:
    base = save_base(tmp_path / "old" / "base", make_llama(), make_tokenizer())
    made = finish_adapter(tmp_path / "old" / "sempa", base, make_llama())
    expected = load(made).encode(SENTENCES[:5])
    moved = shutil.move(tmp_path / "old", tmp_path / "new")
    (moved / "base").rename(moved / "elsewhere")
    with pytest.raises(SempaError, match=r"base of the adapter in .*old.*pass --base"):
        load(moved / "sempa")
    model = sempa_st.load(moved / "sempa", base=str(moved / "elsewhere"), dtype="float32", device="cpu")
    assert_same(model.encode(SENTENCES[:5]), expected)
    with pytest.raises(SempaError, match=r"cannot be used on the base .*of another shape"):
        wide = save_base(tmp_path / "wide", make_llama(hidden=64), make_tokenizer())
        copy_model(str(moved / "sempa"), tmp_path / "wrong", base=str(wide))
    assert not (tmp_path / "wrong").exists()
    repaired = copy_model(str(moved / "sempa"), tmp_path / "repaired", base=str(moved / "elsewhere"))
    assert_same(SentenceTransformer(str(repaired), device="cpu").encode(SENTENCES[:5]), expected)


def test_a_copy_never_replaces_what_it_reads(adapter_folder: Path) -> None:
    for output in (adapter_folder, adapter_folder.parent):
        with pytest.raises(SempaError, match="which is read from"):
            copy_model(str(adapter_folder), output, overwrite=True)
    assert (adapter_folder / "adapter_model.safetensors").is_file()


def test_the_card_of_an_untrained_folder_claims_no_training(tiny_base: Path, tmp_path: Path) -> None:
    card = (copy_model(str(tiny_base), tmp_path / "native") / "README.md").read_text()
    assert "its weights unchanged" in card
    assert "LoRA" not in card
    assert str(tiny_base.parent) not in card


def test_nothing_half_written_is_left(adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    kept = tmp_path / "model"
    kept.mkdir()
    (kept / "precious.txt").write_text("mine")
    monkeypatch.setattr("sempa_st.folder.copying.write_card", fail)
    with pytest.raises(OSError, match="No space left"):
        copy_model(str(adapter_folder), kept, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (kept / "precious.txt").read_text() == "mine"
    with pytest.raises(SempaError, match="not empty"):
        copy_model(str(adapter_folder), kept)


def test_a_scaled_copy_moves_the_base_by_as_much(adapter_folder: Path, tmp_path: Path) -> None:
    scaled = copy_model(str(adapter_folder), tmp_path / "half", scale=0.5)
    vectors = sempa_st.load(scaled, dtype="float32", device="cpu").encode(SENTENCES[:4])
    module = sempa_st.load(adapter_folder, dtype="float32", device="cpu")
    for name, tensor in module.named_parameters():
        if "lora_B" in name:
            tensor.data *= 0.5
    assert vectors == pytest.approx(module.encode(SENTENCES[:4]), abs=1e-6)
    for arguments in ({"scale": 0.0}, {"scale": 0.5, "merge": True}, {"scale": float("nan")}):
        with pytest.raises(SempaError, match="cannot be applied"):
            copy_model(str(adapter_folder), tmp_path / "refused", **arguments)
    assert not (tmp_path / "refused").exists()
