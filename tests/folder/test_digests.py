"""What tells two models apart: digests of folders, and the names that MTEB caches scores by."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers.tiny import finish_adapter, make_config, make_llama, make_tokenizer, save_base
from sentence_transformers import SentenceTransformer

import sempa_st
from sempa_st.data.rows import read_rows
from sempa_st.folder import digests
from sempa_st.folder.copying import copy_model
from sempa_st.folder.layout import ModelFolder
from sempa_st.folder.resolve import Source, find_model, source_digest
from sempa_st.training.run import train
from sempa_st.utils.assets import asset_path
from sempa_st.utils.files import read_json, write_json


def make_pair(root: Path) -> tuple[Path, Path]:
    """Save two bases that differ in layers in the middle of their files only."""
    first = save_base(root / "first", make_llama(hidden=128, layers=8), make_tokenizer())
    changed = make_llama(hidden=128, layers=8)
    for layer in (3, 4):
        changed.model.layers[layer].mlp.up_proj.weight.data.add_(0.3)
    return first, save_base(root / "second", changed, make_tokenizer())


def test_bases_that_differ_in_the_middle_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference that was kept for one of them is not taken for the other's: at its start DPO's loss is log 2."""
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(tmp_path / "cache"))
    losses = []
    for base in make_pair(tmp_path):
        record = train(make_config(base, tmp_path / f"of-{base.name}", max_triplets=8, warmup_ratio=0.9)).record
        losses.append(record["training"][0]["loss"])
    assert losses == pytest.approx([np.log(2)] * 2, abs=1e-3)
    names = {sempa_st.load(tmp_path / name).model_card_data.model_name.split("-")[-1] for name in ("first", "second")}
    assert len(names) == 2


@pytest.mark.parametrize(
    ("name", "decides"),
    [
        ("tokenizer.model", True), ("vocab.txt", True), ("merges.txt", True), ("chat_template.jinja", True),
        ("additional_chat_templates/other.jinja", True), ("1_Pooling/config.json", True),
        ("2_Dense/model.safetensors", True), ("2_Dense/inner/deeper/model.safetensors", True),
        ("README.md", False), ("sempa_run.json", False), ("notes.txt", False), ("trainer_state.json", False),
        ("elsewhere/config.json", False), ("NOTICE", False),
    ],
)  # fmt: skip
def test_what_decides_a_model_is_hashed(adapter_folder: Path, tmp_path: Path, name: str, decides: bool) -> None:
    folder = tmp_path / "model"
    shutil.copytree(adapter_folder, folder)
    modules = read_json(folder / "modules.json")
    write_json(folder / "modules.json", [*modules, {"idx": 2, "name": "2", "path": "2_Dense", "type": "x"}])
    before = ModelFolder(folder).digest
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text('{"changed": true}')
    assert (ModelFolder(folder).digest != before) is decides


def test_where_a_model_lies_decides_nothing(tmp_path: Path) -> None:
    identities = set()
    for location in ("here", "there"):
        base = save_base(tmp_path / location / "base", make_llama(), make_tokenizer())
        folder = finish_adapter(tmp_path / location / "model", base, make_llama())
        config = read_json(base / "config.json")
        write_json(base / "config.json", {**config, "_name_or_path": str(base)})
        identities.add((ModelFolder(folder).digest, sempa_st.load(folder, device="cpu").model_card_data.model_name))
    assert len(identities) == 1


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """List the files that are read in full; the digest of any file, however small, is kept on disk."""
    files: list[Path] = []
    original = digests.file_sha256
    monkeypatch.setattr(digests, "file_sha256", lambda path: (files.append(path), original(path))[1])
    monkeypatch.setattr(digests, "_LARGE", 0)
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(tmp_path / "cache"))
    digests._remembered.cache_clear()
    return files


def settle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(digests.time, "time", lambda: now + 60)


def test_a_file_is_read_once(
    tiny_base: Path, tmp_path: Path, readings: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_base, folder)
    first = ModelFolder(folder).digest
    first_time = len(readings)
    assert ModelFolder(folder).digest == first
    assert len(readings) == 2 * first_time, "a file just written may change within its time's grain"
    settle(folder, monkeypatch)
    assert ModelFolder(folder).digest == first
    assert len(readings) == 3 * first_time
    digests._remembered.cache_clear()  # as in another process
    assert ModelFolder(folder).digest == first
    assert len(readings) == 3 * first_time
    weights = folder / "model.safetensors"
    times = weights.stat()
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert ModelFolder(folder).digest != first, "the same size and time of change"


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"file": 3}'])
def test_a_damaged_or_unwritable_cache_is_no_error(
    tiny_base: Path, tmp_path: Path, readings: list[Path], monkeypatch: pytest.MonkeyPatch, note: str
) -> None:
    settle(tiny_base, monkeypatch)
    expected = ModelFolder(tiny_base).digest
    for path in (tmp_path / "cache" / "digests").iterdir():
        path.write_text(note)
    digests._remembered.cache_clear()
    assert ModelFolder(tiny_base).digest == expected
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the folder should be")
    digests._remembered.cache_clear()
    assert ModelFolder(tiny_base).digest == expected


def other_base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "other", make_llama(seed=5), make_tokenizer())


def score(model: Any, cache: mteb.ResultCache) -> float:
    task = mteb.get_task("STSBenchmark")
    rows = read_rows(asset_path("sts_sample.jsonl"))
    task.dataset, task.data_loaded = DatasetDict({"test": Dataset.from_list(rows)}), True
    result = mteb.evaluate(model, task, cache=cache, co2_tracker=False)
    return float(result.task_results[0].get_score())


def test_every_way_to_embed_gets_its_own_score(tiny_base: Path, adapter_folder: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut" / adapter_folder.name
    shutil.copytree(adapter_folder, cut)
    write_json(cut / "config_sentence_transformers.json", {"truncate_dim": 8})
    short = tmp_path / "short" / adapter_folder.name
    shutil.copytree(adapter_folder, short)
    write_json(
        short / "sentence_bert_config.json", read_json(short / "sentence_bert_config.json") | {"max_seq_length": 24}
    )
    prompted = tmp_path / "prompted" / adapter_folder.name
    shutil.copytree(adapter_folder, prompted)
    settings = {"prompts": {"x": "Topic: "}, "default_prompt_name": "x"}
    write_json(prompted / "config_sentence_transformers.json", settings)
    ways: list[Callable[[], Any]] = [
        lambda: sempa_st.load(tiny_base, dtype="float32"),
        lambda: sempa_st.load(tiny_base, dtype="float32", template="pretended-cot"),
        lambda: sempa_st.load(tiny_base, dtype="float32", method="mean"),
        lambda: sempa_st.load(tiny_base, dtype="float32", method="mean:layer=1"),
        lambda: sempa_st.load(tiny_base, dtype="bfloat16"),
        lambda: sempa_st.load(tiny_base, dtype="float32", int8=True),
        lambda: sempa_st.load(adapter_folder, dtype="float32"),
        lambda: sempa_st.load(adapter_folder, dtype="float32", base=str(other_base(tmp_path))),
        lambda: sempa_st.load(adapter_folder, dtype="float32", method="echo"),
        lambda: sempa_st.load(adapter_folder, dtype="float32", reader="native"),
        lambda: sempa_st.load(cut, dtype="float32"),
        lambda: sempa_st.load(short, dtype="float32"),
        lambda: sempa_st.load(prompted, dtype="float32"),
    ]
    names = [way().model_card_data.model_name for way in ways]
    assert len(set(names)) == len(ways)
    assert names == [way().model_card_data.model_name for way in ways]
    assert all(re.fullmatch(r"local/(tiny-llama|tiny-sempa)-[0-9a-f]{12}", name) for name in names)
    cache = mteb.ResultCache(tmp_path / "mteb")
    scores = [score(ways[number](), cache) for number in (0, 1, 6, 7, 8)]
    assert len(set(scores)) == len(scores)
    again = [score(ways[number](), cache) for number in (0, 1, 6, 7, 8)]
    assert again == pytest.approx(scores, abs=1e-5), "MTEB rounds what it keeps"


def test_a_name_is_of_the_folder_however_it_is_called(
    adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = sempa_st.load(adapter_folder).model_card_data.model_name
    monkeypatch.chdir(adapter_folder)
    assert {sempa_st.load(way).model_card_data.model_name for way in (".", "./", f"../{adapter_folder.name}/.")} == {
        name
    }


def test_an_adapters_digest_holds_its_base(adapter_folder: Path, tmp_path: Path) -> None:
    source = find_model(str(adapter_folder))
    assert source_digest(source) == source_digest(source) != ModelFolder(adapter_folder).digest
    assert source_digest(source, str(other_base(tmp_path))) != source_digest(source)


def test_all_that_plain_readers_restore_is_restored(adapter_folder: Path, tmp_path: Path) -> None:
    merged = copy_model(str(adapter_folder), tmp_path / "merged", merge=True)
    saved = SentenceTransformer(
        str(merged), device="cpu", truncate_dim=8, similarity_fn_name="dot", default_prompt_name="topic",
        prompts={"topic": "Topic: ", "query": "Find: "},
    )  # fmt: skip
    saved.save_pretrained(str(tmp_path / "saved"))
    folder = tmp_path / "saved"
    plain = SentenceTransformer(str(folder), device="cpu")
    ours = sempa_st.load(folder, dtype="float32", device="cpu")
    for name in ("truncate_dim", "similarity_fn_name", "default_prompt_name", "prompts"):
        assert getattr(ours, name) == getattr(plain, name), name
    assert ours.get_embedding_dimension() == plain.get_embedding_dimension() == 8
    texts = ["A cat sleeps.", "Why?"]
    for options in ({}, {"prompt_name": "query"}, {"truncate_dim": 5}, {"normalize_embeddings": True}):
        expected = plain.encode(texts, **options)
        if "normalize_embeddings" not in options:  # plain readers cut the vector of norm 1, and leave it at that
            expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(ours.encode(texts, **options), expected, atol=1e-4)
    actual, expected_similarity = (model.similarity(*[torch.tensor(expected)] * 2) for model in (ours, plain))
    torch.testing.assert_close(actual, expected_similarity)
    assert json.loads((folder / "config_sentence_transformers.json").read_text())["truncate_dim"] == 8


@pytest.mark.parametrize("subfolder", ["", "0_Transformer"])
def test_the_base_of_an_adapter_in_a_plain_model_is_part_of_it(subfolder: str, tiny_base: Path, tmp_path: Path) -> None:
    """As of a native folder to which somebody has added a module."""
    digests_found = set()
    for seed, base in enumerate((tiny_base, save_base(tmp_path / "other", make_llama(7), make_tokenizer()))):
        folder = tmp_path / str(seed)
        finish_adapter(folder / subfolder, base, make_llama())
        modules = [
            {"idx": 0, "name": "0", "path": subfolder, "type": "x"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "y"},
        ]
        write_json(folder / "modules.json", modules)
        digests_found.add(source_digest(Source("model", ModelFolder(folder), "sentence-transformers")))
    assert len(digests_found) == 2


def test_weights_that_an_index_names_are_hashed_where_they_lie(tmp_path: Path) -> None:
    (tmp_path / "within").mkdir()
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": "within/a.safetensors"}})
    found_digests = set()
    for content in (b"first", b"second"):
        (tmp_path / "within" / "a.safetensors").write_bytes(content)
        found_digests.add(ModelFolder(tmp_path).digest)
    assert len(found_digests) == 2
