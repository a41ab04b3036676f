"""``sempa push`` and ``sempa pull``, with the Hub's real client against a local stand-in for the Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.hub import TOKEN, Hub, running_hub, talk_to
from helpers.readers import encode_without_sempa_st
from huggingface_hub import constants

import sempa_st
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model
from sempa_st.hub.checks import local_paths
from sempa_st.hub.push import pull, push

Cli = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.names_dtype
SENTENCES = ["A cat sleeps.", "Where is it?"]


@pytest.fixture
def hub(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in with a base under a licence, which the client of this process talks to."""
    shutil.copytree(tiny_base, tmp_path / "acme")
    (tmp_path / "acme" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    (tmp_path / "acme" / "LICENSE").write_text("Apache License")
    with running_hub() as hub:
        hub.publish("acme/tiny", tmp_path / "acme")
        talk_to(hub, monkeypatch, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("SEMPA_AUTO_DTYPE", "float32")
        yield hub


@pytest.fixture
def folder(hub: Hub, adapter_folder: Path, tmp_path: Path) -> Path:
    """A finished folder over the stand-in's base."""
    source = shutil.copytree(adapter_folder, tmp_path / "source")
    settings = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "acme/tiny"}))
    return copy_model(str(source), tmp_path / "tiny-sempa")


def test_push_and_pull(run_cli: Cli, hub: Hub, folder: Path, tmp_path: Path) -> None:
    (folder / "trainer_state.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"0")
    code, out, err = run_cli("push", folder, "me/tiny", "--dry-run")
    assert code == 0, err
    assert "Nothing was sent" in out
    assert "me/tiny" not in hub.repositories
    code, out, err = run_cli("push", folder, "me/tiny", "--private")
    assert code == 0, err
    repository = hub.repositories["me/tiny"]
    assert repository.private
    assert len(repository.commits) == 1
    assert not {"trainer_state.json", "optimizer.pt"} & repository.files.keys()
    card = repository.files["README.md"].decode()
    assert 'SentenceTransformer("me/tiny")' in card
    assert "license: apache-2.0" in card
    assert repository.files["LICENSE"] == b"Apache License"  # the base's own
    code, out, err = run_cli("pull", "me/tiny", tmp_path / "pulled")
    assert code == 0, err
    assert repository.sha in out
    pulled = {p.relative_to(tmp_path / "pulled").as_posix(): p for p in (tmp_path / "pulled").rglob("*") if p.is_file()}
    assert {name: path.read_bytes() for name, path in pulled.items()} == repository.files
    vectors = [sempa_st.load(path, device="cpu").encode(SENTENCES) for path in (folder, tmp_path / "pulled")]
    np.testing.assert_array_equal(*vectors)


def test_a_broken_upload_is_run_again(hub: Hub, folder: Path) -> None:
    hub.refuse_uploads_after = 1
    with pytest.raises(SempaError, match="the same command sends what is missing"):
        push(str(folder), "me/tiny")
    assert hub.repositories["me/tiny"].files == {}  # nothing shows before all is there
    (first,) = hub.uploads
    hub.refuse_uploads_after = None
    push(str(folder), "me/tiny")
    assert hub.uploads.count(first) == 1
    assert len(hub.uploads) == 2
    assert "adapter_model.safetensors" in hub.repositories["me/tiny"].files


def test_merged_in_place_of_the_adapter(hub: Hub, folder: Path, tmp_path: Path) -> None:
    push(str(folder), "me/tiny")
    pushed = push(str(folder), "me/tiny", merged=True)
    files = hub.repositories["me/tiny"].files
    assert files.keys() == pushed.files.keys()  # the adapter is gone
    assert "model.safetensors" in files
    pull("me/tiny", tmp_path / "whole")
    expected = sempa_st.load(folder, device="cpu").encode(SENTENCES)
    found = encode_without_sempa_st(tmp_path / "whole", SENTENCES, trust=False, cwd=tmp_path)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_custom_format(hub: Hub, folder: Path, tmp_path: Path) -> None:
    custom = copy_model(str(folder), tmp_path / "custom", format="custom")
    push(str(custom), "me/custom")
    assert "prompt_eol.py" in hub.repositories["me/custom"].files
    (custom / "prompt_eol.py").write_text("raise SystemExit('never run')")
    with pytest.raises(SempaError, match=r"prompt_eol\.py in custom is not this version's"):
        push(str(custom), "me/custom")


def spoil(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_refused_before_anything_is_sent(
    hub: Hub, folder: Path, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(name: str) -> Path:
        return shutil.copytree(folder, tmp_path / "wrong" / name)

    local = copied("local-base")
    spoil(local, "adapter_config.json", base_model_name_or_path=str(tmp_path / "acme"))
    path = copied("path")
    spoil(path, "config_sentence_transformers.json", origin="/home/someone/runs/first")
    home = copied("home")
    (home / "README.md").write_text(f"{(home / 'README.md').read_text()}\nTrained in {Path.home()}/runs.\n")
    card = copied("card")
    (card / "README.md").unlink()
    mapped = copied("mapped")
    spoil(mapped, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil--mod.Tokenizer"]})
    before = dict(hub.repositories)
    for wrong, message in (
        (local, "which nobody else has. Push the whole model with --merged"),
        (path, "config_sentence_transformers.json names a folder of this machine: '/home/someone/runs/first'"),
        (home, "README.md names a folder of this machine"),
        (card, "Expected a model card"),
        (mapped, "tokenizer_config.json names code of its own (auto_map)"),
        (tmp_path / "acme", "is no folder of this package"),
    ):
        with pytest.raises(SempaError) as error:
            push(str(wrong), "me/wrong")
        assert message in str(error.value)
    monkeypatch.setattr("sempa_st.hub.checks._plain", lambda staged, dtype: sempa_st.load(tmp_path / "acme"))
    with pytest.raises(SempaError, match="differently: cosine"):
        push(str(folder), "me/wrong")
    assert hub.repositories == before


def test_names_tokens_and_repositories_that_do_not_fit(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tiny", "me/ti ny", "a/b/c"):
        with pytest.raises(SempaError, match="Expected owner/name"):
            push(str(folder), name)
    push(str(folder), "me/public")
    with pytest.raises(SempaError, match="exists and is public"):
        push(str(folder), "me/public", private=True)
    with pytest.raises(SempaError, match="no repository of that name"):
        pull("me/none", tmp_path / "none")
    with pytest.raises(SempaError, match="no such revision"):
        pull("me/public", tmp_path / "none", revision="f" * 40)
    assert not (tmp_path / "none").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SempaError, match="hf auth whoami"):
        push(str(folder), "me/other")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SempaError, match="the Hub cannot be reached"):
        pull("me/public", tmp_path / "none")


def test_local_paths(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps({"x": ["/data/me/model"], "y": "</s>", "z": "/", "u": "https://a.b/c/d"})
    )
    (tmp_path / "b.json").write_text(
        json.dumps({"x": r"C:\runs\first", "command": "sempa train --data=/home/me/x.csv"})
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps({"vocab": ["/home/me"]}))
    (tmp_path / "README.md").write_text("See https://x.org/home/me and /home/mean.\n")
    assert list(local_paths(tmp_path, [Path("/home/me"), Path("/")])) == [
        ("a.json", "/data/me/model"),
        ("b.json", r"C:\runs\first"),
        ("b.json", "/home/me"),
    ]
