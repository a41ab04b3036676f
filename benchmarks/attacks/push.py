"""Kill a push at a random moment and run it again: a repository holds nothing, or the whole model of one push."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.hub import TOKEN, Hub, running_hub, talk_to
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from benchmarks.attacks.world import Child, Outcome, World, content

_TRIALS, _QUICK_TRIALS = 20, 1
_REPOSITORY = "me/tiny"
BASE = "acme/tiny"
"""Name on the Hub of the base of what is pushed."""


def attack(world: World) -> Iterator[Outcome]:
    """Yield what became of the repository of a push that was killed, and of one that SIGTERM ended."""
    outcome, started = Outcome("kill: push"), time.perf_counter()
    adapter, base = sources(world)
    model, moments = adapter.with_name("model"), random.Random(0)
    with hub(world, base) as url:
        code = _start(world, url, "copy", str(adapter), str(model)).wait()
        outcome.check(code == 0, f"copy: exit code {code}")
        began = time.perf_counter()
        code = _start(world, url, "push", str(model), _REPOSITORY).wait()
        seconds = time.perf_counter() - began
        expected = _published(world, url)
        outcome.check(code == 0 and bool(expected), f"undisturbed: exit code {code}")
    numbers = [signal.SIGKILL] * (_QUICK_TRIALS if world.quick else _TRIALS) + [signal.SIGTERM]
    for number in numbers:
        moment = moments.uniform(0, seconds)
        with hub(world, base) as url:
            _start(world, url, "push", str(model), _REPOSITORY).kill_after(moment, number)
            when, left = f"{number.name} after {moment:.2f} of {seconds:.2f} s", _published(world, url)
            outcome.check(left in ({}, expected), f"{when}: a part of the model is in the repository: {sorted(left)}")
            child = _start(world, url, "push", str(model), _REPOSITORY)
            code = child.wait()
            whole = code == 0 and _published(world, url) == expected
            outcome.check(whole, f"{when}, run again: exit code {code}: {child.last_line}")
    outcome.seconds = time.perf_counter() - started
    yield outcome


def sources(world: World) -> tuple[Path, Path]:
    """Return an adapter folder that names its base on the Hub, and the folder to publish as that base."""
    folder = world.folder("push")
    base = shutil.copytree(world.root / "base", folder / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n", encoding="utf-8")
    (base / "LICENSE").write_text("Apache License", encoding="utf-8")
    adapter = shutil.copytree(world.root / "native", folder / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = BASE
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return adapter, base


@contextmanager
def hub(world: World, base: Path) -> Iterator[str]:
    """Run the tests' stand-in for the Hub, which holds ``base``, in a process of its own; yields its address."""
    address = world.root / "hub.txt"
    address.unlink(missing_ok=True)
    process = os.fork()
    if not process:
        with running_hub() as stand_in:
            stand_in.publish(BASE, base)
            partial = address.with_suffix(".partial")
            partial.write_text(stand_in.url, encoding="utf-8")
            partial.replace(address)
            while True:
                signal.pause()
    try:
        deadline = time.monotonic() + 30
        while not address.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        yield address.read_text(encoding="utf-8")
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _start(world: World, url: str, *words: str) -> Child:
    """Start a command that talks to a stand-in, with a cache of its own."""
    cache = world.folder("push-cache")

    def before() -> None:
        patch = pytest.MonkeyPatch()
        patch.setenv("HF_TOKEN", TOKEN)
        talk_to(Hub(url), patch, cache)

    return Child.start(words, world.root / "log.txt", before)


def _published(world: World, url: str) -> dict[str, str]:
    """Return a SHA-256 of each file that a stranger gets; nothing if there is no repository or it is empty."""
    folder = world.folder("pulled")
    with pytest.MonkeyPatch.context() as patch:
        talk_to(Hub(url), patch, world.folder("pulled-cache"))
        try:
            if not HfApi(endpoint=url, token=TOKEN).list_repo_files(_REPOSITORY):
                return {}
        except RepositoryNotFoundError:
            return {}
        snapshot_download(_REPOSITORY, endpoint=url, token=TOKEN, local_dir=folder)
    shutil.rmtree(folder / ".cache")
    return content(folder)
