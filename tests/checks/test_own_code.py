"""Remote code in a folder never runs, however the folder is opened, and the user is never prompted to allow it."""

from __future__ import annotations

import ast
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import finish_adapter, make_config, make_llama, make_tokenizer, save_base
from sentence_transformers import SentenceTransformer

import sempa_st
from sempa_st.checks.library_errors import readable
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model
from sempa_st.methods.module import MethodModule
from sempa_st.model.adapter import check_adapter, merged_model
from sempa_st.model.base_model import Base, load_causal_lm, load_config
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.tokenizer import load_tokenizer
from sempa_st.utils.files import read_json

pytestmark = pytest.mark.names_dtype

FLOAT32 = ("--dtype", "float32")
CODE = """
from pathlib import Path
Path({canary!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "of-its-own"
class OwnModel(LlamaModel):
    config_class = OwnConfig
class OwnLM(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
MAPS: dict[str, Any] = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel", "AutoModelForCausalLM": "own.OwnLM"}


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of a file that the folder's code would write; every prompt is answered with yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "canary"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**read_json(path), **values}))


def bring_code(folder: Path, canary: Path, part: str) -> Path:
    """Make the model or tokenizer of a folder need a class from the folder's own code."""
    (folder / "own.py").write_text(CODE.format(canary=str(canary)))
    if part == "model":
        change(folder / "config.json", model_type="of-its-own", auto_map=MAPS)
    else:
        names = {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}
        change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=names)
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own-code")
    base = save_base(root / "base", make_llama(), make_tokenizer())
    for format in ("native", "custom"):
        finish_adapter(root / format, base, make_llama(), format=format)
    return root


@pytest.fixture
def folders(sound: Path, tmp_path: Path) -> Path:
    root = shutil.copytree(sound, tmp_path / "given")
    for format in ("native", "custom"):
        change(root / format / "adapter_config.json", base_model_name_or_path=str(root / "base"))
    return root


def train(root: Path, folder: str, **settings: Any) -> None:
    from sempa_st.training.run import train as run

    run(make_config(root / folder, root / "trained", **settings))


def load(root: Path, folder: str, **options: Any) -> Any:
    return sempa_st.load(root / folder, dtype="float32", device="cpu", **options)


ROUTES: dict[str, Callable[[Path], Any]] = {
    "load a base": lambda root: load(root, "base"),
    "load a base by a method": lambda root: load(root, "base", method="mean"),
    "load an adapter": lambda root: load(root, "native"),
    "load an adapter natively": lambda root: load(root, "native", reader="native"),
    "load an adapter by a method": lambda root: load(root, "native", method="mean"),
    "load a custom folder": lambda root: load(root, "custom"),
    "load on another base": lambda root: load(root, "native", base=str(root / "base")),
    "int8": lambda root: load(root, "base", int8=True),
    "train": lambda root: train(root, "base"),
    "train in full": lambda root: train(root, "base", tuning="full"),
    "copy a base": lambda root: copy_model(str(root / "base"), root / "out"),
    "copy an adapter": lambda root: copy_model(str(root / "native"), root / "out"),
    "merge": lambda root: copy_model(str(root / "native"), root / "out", merge=True),
    "read the settings": lambda root: load_config(root / "base"),
    "read the model": lambda root: load_causal_lm(root / "base", torch.float32),
    "check an adapter": lambda root: check_adapter(Base("base", root / "base"), root / "native"),
    "merge an adapter": lambda root: merged_model(Base("base", root / "base"), root / "native", torch.float32),
}
OF_THE_TOKENIZER = [
    *("load an adapter", "load an adapter natively", "load an adapter by a method", "load a custom folder"),
    *("load on another base", "copy an adapter", "merge", "load a base", "load a base by a method", "train"),
    *("copy a base", "int8"),
]


@pytest.mark.parametrize("route", ROUTES)
def test_the_code_of_a_base_never_runs(folders: Path, canary: Path, route: str) -> None:
    bring_code(folders / "base", canary, "model")
    assert_refused(ROUTES[route], folders, canary)


@pytest.mark.parametrize("route", OF_THE_TOKENIZER)
def test_the_code_of_a_tokenizer_never_runs(folders: Path, canary: Path, route: str) -> None:
    for folder in ("base", "native", "custom"):
        bring_code(folders / folder, canary, "tokenizer")
    assert_refused(ROUTES[route], folders, canary)


def assert_refused(route: Callable[[Path], Any], folders: Path, canary: Path) -> None:
    with pytest.raises(SempaError, match=r"brings code of its own \(auto_map\), which is never run"):
        route(folders)
    assert not canary.exists()
    assert not (folders / "out").exists()
    assert not (folders / "trained").exists()


def test_another_fault_of_a_folder_with_code_is_told(folders: Path) -> None:
    """A model that transformers implements may come with code as well, which is not needed."""
    change(folders / "base" / "config.json", auto_map=MAPS)
    load(folders, "base")
    change(folders / "base" / "config.json", hidden_act="no-such-function")
    with pytest.raises(SempaError, match="no-such-function") as told:
        load(folders, "base")
    assert "auto_map" not in str(told.value)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("out of memory")])
def test_a_lack_of_memory_is_none_of_the_folder(folders: Path, error: Exception) -> None:
    change(folders / "base" / "config.json", auto_map=MAPS)
    with pytest.raises(type(error)) as raised, readable(folders / "base"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("command", ["encode", "copy", "train", "evaluate", "generation"])
def test_the_command_line_says_so(
    run_cli: Callable[..., tuple[int, str, str]], folders: Path, canary: Path, tmp_path: Path, command: str
) -> None:
    bring_code(folders / "base", canary, "model")
    (tmp_path / "in.txt").write_text("A cat.\n")
    out, base = tmp_path / "out", folders / "base"
    argv: dict[str, tuple[object, ...]] = {
        "encode": (base, tmp_path / "in.txt", "--output", tmp_path / "out.npy", *FLOAT32),
        "copy": (base, out),
        "train": ("--base", base, "--data", "sample", "--dev", "sample", "--output", out, *FLOAT32),
        "evaluate": (base, "--output", out, "--tasks", "STSBenchmark", *FLOAT32),
        "generation": (base, "--output", out, "--tasks", "wikitext", *FLOAT32),
    }
    code, _, error = run_cli(command, *argv[command])
    assert code == 2, error
    if command in ("encode", "copy", "train"):
        assert "brings code of its own (auto_map), which is never run" in error
    assert not canary.exists()


@pytest.mark.parametrize("trusting", [False, True])
@pytest.mark.parametrize("format", ["native", "custom"])
def test_trust_in_a_folder_is_none_in_its_base(folders: Path, canary: Path, format: str, trusting: bool) -> None:
    """Trust in the module of a folder does not extend to the code of the base that its adapter names."""
    bring_code(folders / "base", canary, "model")
    with pytest.raises(ValueError, match="trust_remote_code"):
        PromptEOL.load(str(folders / format), trust_remote_code=trusting)
    with pytest.raises(ValueError, match="trust_remote_code"):
        PromptEOL.load(str(folders / format), trust_remote_code=None)
    if format == "custom":
        with pytest.raises(ValueError, match="trust_remote_code"):
            SentenceTransformer(str(folders / format), trust_remote_code=trusting, device="cpu")
    assert not canary.exists()


def test_trust_in_a_base_can_be_said(folders: Path, canary: Path) -> None:
    bring_code(folders / "base", canary, "model")
    PromptEOL.load(str(folders / "native"), model_kwargs={"trust_remote_code": True})
    assert canary.exists()


def test_a_method_module_trusts_no_base(folders: Path, canary: Path, tmp_path: Path) -> None:
    MethodModule(load(folders, "native")[0].model, load_tokenizer(folders / "base"), "mean").save(
        str(tmp_path / "method")
    )
    bring_code(folders / "base", canary, "model")
    with pytest.raises(ValueError, match="trust_remote_code"):
        MethodModule.load(str(tmp_path / "method"), trust_remote_code=True)
    assert not canary.exists()


def test_what_transformers_knows_itself_is_read_without_the_code(folders: Path, canary: Path) -> None:
    """Like many models on the Hub that came with code before transformers implemented them."""
    expected = load(folders, "base").encode(["A cat"])
    bring_code(folders / "base", canary, "model")
    change(folders / "base" / "config.json", model_type="llama")
    assert load(folders, "base").encode(["A cat"]) == pytest.approx(expected)
    assert not canary.exists()


def calls_that_may_run_code() -> list[tuple[Path, ast.Call, ast.AST]]:
    found = []
    for path in sorted((*Path("sempa_st").rglob("*.py"), *Path("benchmarks").rglob("*.py"))):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr in ("from_pretrained", "from_config")
                    and ast.unparse(node.func.value) not in ("PeftConfig", "PeftModel")  # these read no code
                ):
                    found.append((path, node, function))
    return found


def test_every_call_says_what_it_trusts() -> None:
    calls = calls_that_may_run_code()
    assert len(calls) > 8
    for path, call, function in calls:
        said = {keyword.arg for keyword in call.keywords}
        # Arguments passed on as **arguments are assembled in the same function.
        passed_on = None in said and '"trust_remote_code"' in ast.unparse(function).replace("'", '"')
        assert "trust_remote_code" in said or passed_on, f"{path}:{call.lineno}"
