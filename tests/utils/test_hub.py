"""Hub ids, offline: a local cache in the Hub's layout replaces the Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny import finish_adapter, make_llama, make_tokenizer, save_base
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from sempa_st.errors import SempaError
from sempa_st.utils.hub import download

pytestmark = pytest.mark.names_dtype

REVISION = "0123456789abcdef0123456789abcdef01234567"
READ = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM
from sentence_transformers import SentenceTransformer
import sempa_st

sentences = ["A cat sleeps", 'Who said "no"?']
native = SentenceTransformer("me/sempa-tiny", device="cpu").encode(sentences)
ours = sempa_st.load("me/sempa-tiny", dtype="float32", device="cpu").encode(sentences)
generator = AutoPeftModelForCausalLM.from_pretrained("me/sempa-tiny", dtype=torch.float32)
base = sempa_st.load("me/tiny-base", dtype="float32", device="cpu")
print(json.dumps({
    "difference": float(abs(native - ours).max()),
    "moved": float(abs(ours - base.encode(sentences)).max()),
    "vocabulary": generator(torch.tensor([[1, 5]])).logits.shape[-1],
}))
"""


def publish(cache: Path, name: str, folder: Path) -> None:
    repository = cache / ("models--" + name.replace("/", "--"))
    shutil.copytree(folder, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    # The cache also records which files the repository does not have, as it does after use online.
    missing = repository / ".no_exist" / REVISION
    missing.mkdir(parents=True)
    for file in ("config.json", "processor_config.json", "preprocessor_config.json", "adapter_config.json"):
        if not (folder / file).exists():
            (missing / file).touch()


def base_named_in(folder: Path) -> str:
    return str(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("hub")
    base = save_base(root / "base", make_llama(), make_tokenizer())
    publish(root / "cache", "me/tiny-base", base)
    folder = finish_adapter(root / "sempa", base, make_llama())
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "me/tiny-base"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    publish(root / "cache", "me/sempa-tiny", folder)
    return {**os.environ, "HF_HUB_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1"}


def test_all_three_readers_take_a_hub_id(hub: dict[str, str], tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, env=hub)
    assert result.returncode == 0, result.stderr
    read = json.loads(result.stdout.splitlines()[-1])
    assert read["difference"] < 1e-4
    assert read["moved"] > 1e-3
    assert read["vocabulary"] == 600


def test_a_folder_trained_on_a_hub_id_names_it(hub: dict[str, str], tmp_path: Path) -> None:
    command = (
        f"-m sempa_st train --base me/tiny-base --data sample --dev sample --max-triplets 8 --batch-size 4 "
        f"--gradient-accumulation 1 --device cpu --dtype float32 --output {tmp_path / 'model'}"
    )
    result = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, env=hub)
    assert result.returncode == 0, result.stderr
    assert base_named_in(tmp_path / "model") == "me/tiny-base"
    assert "base_model: me/tiny-base" in (tmp_path / "model" / "README.md").read_text()
    copy = f"-m sempa_st copy {tmp_path / 'model'} {tmp_path / 'copy'}"
    assert subprocess.run([sys.executable, *copy.split()], env=hub, capture_output=True).returncode == 0
    assert base_named_in(tmp_path / "copy") == "me/tiny-base"


@pytest.mark.parametrize("fault", HfHubHTTPError.__bases__)
def test_a_fault_of_the_network_is_one_clear_error(
    fault: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that refuses, or a connection that ends, is an error of the HTTP library, and none of the Hub's."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise fault("403 Forbidden")

    monkeypatch.setattr(HfApi, "model_info", refuse)
    with pytest.raises(SempaError, match="the Hub cannot be reached or denies access"):
        download("me/tiny", tmp_path)
