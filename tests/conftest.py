"""Options and fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any Hugging Face import, in this and in child processes

from helpers.tiny import finish_adapter, make_gemma, make_llama, make_tokenizer, save_base
from transformers import (
    PreTrainedTokenizerFast,
)

collect_ignore = ["fixtures"]
"""The code in stored model folders is theirs, and holds no tests."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--auto-dtype",
        choices=("float32", "bfloat16"),
        help="type that --dtype auto means in this run, here and in child processes; the processor's choice by default",
    )


def pytest_configure(config: pytest.Config) -> None:
    if chosen := config.getoption("--auto-dtype"):
        os.environ["SEMPA_AUTO_DTYPE"] = chosen


@pytest.fixture(scope="module", autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests out of the user's cache, but for those that need the real base in it, and check their marks."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("integration") is None:
            patch.setenv("SEMPA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        if request.node.get_closest_marker("names_dtype"):
            patch.setenv("SEMPA_AUTO_DTYPE", "none, since these tests name their types")
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its own chat template."""
    return save_base(tmp_path_factory.mktemp("bases") / "tiny-llama", make_llama(), make_tokenizer())


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 (sliding and full attention) without a chat template."""
    return save_base(tmp_path_factory.mktemp("bases") / "tiny-gemma", make_gemma(), make_tokenizer(chat=None))


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A finished native folder with a random adapter on the tiny Llama."""
    return finish_adapter(tmp_path_factory.mktemp("models") / "tiny-sempa", tiny_base, make_llama())


@pytest.fixture
def prefix_pass(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let a pass over a shared prefix pay always, so that short sequences have one; returns what it costs otherwise."""
    from sempa_st.forward import packing

    cost = packing._PASS
    monkeypatch.setattr(packing, "_PASS", -1_000_000)
    return cost


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; returns exit code, standard output and standard error."""
    from sempa_st.cli.main import main

    def run(*argv: object) -> tuple[int, str, str]:
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as exit:  # argparse's own refusals
            code = int(exit.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
