"""What a ModelFolder says of a folder, and how often it reads the files."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import finish_adapter, make_llama

from sempa_st.checks import inspection
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model
from sempa_st.folder.layout import ModelFolder
from sempa_st.folder.write import set_base_reference
from sempa_st.model.templates import DEFAULT_TEMPLATE, EMBEDDING_TEMPLATES
from sempa_st.model.tokenizer import load_tokenizer, template_ids
from sempa_st.utils.files import read_json, write_json

pytestmark = pytest.mark.names_dtype


def test_an_adapter_folder(adapter_folder: Path, tiny_base: Path) -> None:
    folder = ModelFolder(adapter_folder)
    assert (folder.format, folder.template, folder.max_seq_length) == ("native", "prompteol", 160)
    assert (folder.is_adapter, folder.is_activated, folder.invocation) == (True, False, [])
    assert (folder.base, folder.record) == (str(tiny_base), None)
    assert folder.module_folders == ["1_Pooling", "2_Normalize"]
    assert folder.embedding_settings(load_tokenizer(adapter_folder)) == ("prompteol", 160)


def test_embedding_settings_that_do_not_fit_are_refused(adapter_folder: Path) -> None:
    tokenizer = load_tokenizer(adapter_folder)
    templates = dict(tokenizer.chat_template)
    with pytest.raises(SempaError) as raised:
        tokenizer.chat_template = {"b": "", "a": ""}
        ModelFolder(adapter_folder).embedding_settings(tokenizer)
    settings = adapter_folder / "sentence_bert_config.json"
    assert str(raised.value).startswith(f"{settings} names the template 'prompteol', and the tokenizer has only: a, b.")
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(SempaError, match="the tokenizer has only: none"):
        ModelFolder(adapter_folder).embedding_settings(tokenizer)
    where = re.escape(f"The template 'prompteol' in {adapter_folder}")
    tokenizer.chat_template = {**templates, "prompteol": "{{ raise_exception('not today') }}"}
    with pytest.raises(SempaError, match=rf"{where} cannot be rendered .*not today"):
        ModelFolder(adapter_folder).embedding_settings(tokenizer)


def test_a_folder_names_its_own_template(tiny_base: Path, tmp_path: Path) -> None:
    other = next(name for name in EMBEDDING_TEMPLATES if name != DEFAULT_TEMPLATE)
    path = copy_model(str(tiny_base), tmp_path / "copied", template=other)
    assert ModelFolder(path).embedding_settings(load_tokenizer(path))[0] == other


@pytest.mark.parametrize("spare", [-1, 0])
def test_a_length_leaves_room_for_one_token_of_a_sentence(adapter_folder: Path, tmp_path: Path, spare: int) -> None:
    path = shutil.copytree(adapter_folder, tmp_path / "model")
    tokenizer = load_tokenizer(path)
    shortest = len(template_ids(tokenizer, "prompteol", "")) + 1
    settings = read_json(path / "sentence_bert_config.json")
    write_json(path / "sentence_bert_config.json", {**settings, "max_seq_length": shortest + spare})
    folder = ModelFolder(path)
    if spare < 0:
        with pytest.raises(SempaError, match=f"is {shortest - 1}, which leaves no room .* at least {shortest}:"):
            folder.embedding_settings(tokenizer)
    else:
        assert folder.embedding_settings(tokenizer) == ("prompteol", shortest)


def test_an_activated_adapter_names_its_tokens(tiny_base: Path, tmp_path: Path) -> None:
    folder = finish_adapter(tmp_path / "model", tiny_base, make_llama(), invocation=[5, 7], format="custom")
    assert (ModelFolder(folder).is_activated, ModelFolder(folder).invocation) == (True, [5, 7])
    assert ModelFolder(folder).format == "custom"


def test_a_base_is_no_folder_of_this_package(tiny_base: Path) -> None:
    folder = ModelFolder(tiny_base)
    assert (folder.format, folder.modules, folder.module_folders) == (None, [], [])
    assert (folder.is_adapter, folder.adapter_settings, folder.base, folder.invocation) == (False, None, "", [])
    with pytest.raises(SempaError, match=r"sentence_bert_config\.json does not exist"):
        _ = folder.template


def test_every_settings_file_is_read_once(adapter_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings: Counter[str] = Counter()
    original = inspection.read_json

    def read_json(path: Path) -> Any:
        readings[path.relative_to(adapter_folder).as_posix()] += 1
        return original(path)

    monkeypatch.setattr(inspection, "read_json", read_json)
    folder = ModelFolder(adapter_folder)
    for _ in range(2):
        values = [getattr(folder, name) for name, value in vars(ModelFolder).items() if hasattr(value, "__get__")]
    assert len(values) > 10
    files = (
        "1_Pooling/config.json",
        "2_Normalize/config.json",
        "adapter_config.json",
        "modules.json",
        "sentence_bert_config.json",
    )
    assert readings == dict.fromkeys(files, 1)


def test_a_change_is_seen_by_a_new_object(adapter_folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(adapter_folder, tmp_path / "model")
    before = ModelFolder(path)
    base, digest = before.base, before.digest
    set_base_reference(path, "other")
    write_json(path / "sentence_bert_config.json", {"max_seq_length": 99})
    assert (before.base, before.digest, before) == (base, digest, ModelFolder(path))
    assert (ModelFolder(path).base, ModelFolder(path).max_seq_length) == ("other", 99)
    assert ModelFolder(path).digest != digest
    with pytest.raises(FrozenInstanceError):
        before.path = adapter_folder  # type: ignore[misc]


def test_weights_in_several_files_are_those_of_the_index(tmp_path: Path) -> None:
    files = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": files})
    names = ["model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"]
    assert ModelFolder(tmp_path).weight_files == names
    assert ModelFolder(tmp_path / "none").weight_files == ["model.safetensors", "adapter_model.safetensors"]


def test_an_adapter_is_activated_and_scaled_in_one_copy(adapter_folder: Path, tmp_path: Path) -> None:
    scaled = copy_model(str(adapter_folder), tmp_path / "scaled", scale=0.5)
    expected = copy_model(str(scaled), tmp_path / "two", activate=True)
    copy = copy_model(str(adapter_folder), tmp_path / "one", activate=True, scale=0.5)
    assert ModelFolder(copy).digest == ModelFolder(expected).digest
    assert ModelFolder(copy).is_activated
