"""Put canaries where secrets are, and search all that the commands write for them.

The rule. A token, a key, the name of the user and that of the machine are nowhere: in no output, in no log, and on no
screen, a traceback included. The user's folders may stand on the screen and in what a run keeps for the next one on
this machine (``PRIVATE``), but in nothing that is shared: not in vectors, model folders with their cards and records,
scores, tables and reports, nor in what is served or pushed. One setting is excepted: an adapter over a base in a local
folder names that folder, or nobody could open it on this machine. A push refuses such an adapter.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import platform
import secrets
import shutil
import socket
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers import hub as stand_in
from helpers.generation_data import write_generation_data
from helpers.hub import Hub, running_hub, talk_to

from benchmarks.attacks.kill import JOBS, Job
from benchmarks.attacks.push import BASE, sources
from benchmarks.attacks.world import CPU, Child, Outcome, World, files_of

_HOME = "home"
_VARIABLES = ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "SEMPA_API_KEY")
_NAMES = ("USER", "LOGNAME", "USERNAME")
_HOST, _KEY = "host name", "--api-key"
_REFERENCE = "base_model_name_or_path"
PRIVATE = ("*.training", "*.encoding", "*.logs", "journal*")
"""Parts of paths that a run keeps for the next one on this machine."""
_ADDED = [
    Job("copy", "copy NATIVE OUT"),
    Job("copy --activate", "copy NATIVE OUT --activate"),
    Job("table of models", f"table --base BASE --methods --models NATIVE --data-dir DATA --output OUT {CPU}"),
    Job("evaluate --method", f"evaluate BASE --method mean --tasks STS12 --data-dir DATA --output OUT {CPU}"),
    Job("analyze two", f"analyze BASE NATIVE --only geometry,layers --output OUT {CPU}"),
    Job(
        "generation", f"generation BASE NATIVE --tasks mmlu,wikitext --data-dir DATA --output OUT {CPU}", "scores.json"
    ),
]
_FAILING = {
    "encode": f"encode MISSING TEXTS --output OUT {CPU} --debug",
    "train": f"train --base MISSING --data sample --dev sample --output OUT {CPU} --debug",
    "copy": "copy MISSING OUT --merge --debug",
    "evaluate": f"evaluate MISSING --data-dir DATA --output OUT {CPU} --debug",
    "serve": f"serve MISSING {_KEY} KEY {CPU} --debug",
    "push": "push MISSING me/tiny --debug",
    "pull": "pull me/missing OUT --debug",
}
_PAGES = {
    **dict.fromkeys(("/health", "/metrics", "/v1/models", "/openapi.json", "/missing")),
    "/v1/embeddings": {"model": "activated", "input": "A cat."},
    "/v1/completions": {"model": "activated", "prompt": "A cat", "max_tokens": 2},
}
"""What a server is asked, with the body of the request."""
Canaries = Mapping[str, str]


def make_canaries() -> dict[str, str]:
    """Return a canary by the name of its place."""
    named = {name: f"{name.lower()}{secrets.token_hex(8)}" for name in (_HOME, *_NAMES)}
    keys = {name: f"hf_{secrets.token_hex(16)}" for name in (*_VARIABLES, _KEY)}
    return {**named, **keys, _HOST: f"host{secrets.token_hex(8)}"}


def attack(world: World) -> Iterator[Outcome]:
    """Yield what the outputs of each command tell, and a server, a push, and commands that fail."""
    canaries = make_canaries()
    before = os.environ["SEMPA_CACHE_DIR"]
    try:
        private = World.build(world.folder("secrets", canaries[_HOME]), quick=world.quick)
        write_generation_data(private.root / "data")
        for job in [*JOBS, *_ADDED]:
            if job.quick or not world.quick:
                yield _job(private, job, canaries)
        yield _failures(private, canaries)
        yield _served(private, canaries)
        yield _pushed(private, canaries)
    finally:
        os.environ["SEMPA_CACHE_DIR"] = before
        shutil.rmtree(world.root / "secrets")


def _job(world: World, job: Job, canaries: Canaries) -> Outcome:
    outcome, started = Outcome(f"secrets: {job.name}"), time.perf_counter()
    folder, log = world.folder("out"), world.root / "log.txt"
    words = world.words(job.command, folder / job.output)
    code = Child.start(words, log, before=partial(_disguise, canaries, world.root)).wait()
    outcome.check(code == 0, f"exit code {code}: {_last_line(log)}")
    _search(outcome, folder, canaries)
    _search_screen(outcome, log, canaries)
    outcome.seconds = time.perf_counter() - started
    return outcome


def _disguise(canaries: Canaries, home: Path) -> None:
    """Put the canaries into this process."""
    os.environ.update({name: canaries[name] for name in (*_VARIABLES, *_NAMES)}, HOME=str(home))
    name = canaries[_HOST]
    socket.gethostname = lambda: name
    socket.getfqdn = lambda *_: name
    platform.node = lambda: name
    os.environ.update(HOSTNAME=name)


def _search(outcome: Outcome, folder: Path, canaries: Canaries) -> None:
    """Check each file of an output for the canaries that it must not hold."""
    for file in files_of(folder):
        found = leaks(file, folder, canaries)
        outcome.check(not found, f"{file.relative_to(folder)} holds: {', '.join(found)}")


def _search_screen(outcome: Outcome, log: Path, canaries: Canaries) -> None:
    found = [name for name in holds(log.read_bytes(), canaries) if name != _HOME]
    outcome.check(not found, f"the screen shows: {', '.join(found)}")


def leaks(file: Path, folder: Path, canaries: Canaries) -> list[str]:
    """Return the names of the canaries that a file of ``folder`` holds, in its name too, and must not."""
    path = file.relative_to(folder)
    raw = file.read_bytes()
    if file.name == "adapter_config.json":
        raw = json.dumps({**json.loads(raw), _REFERENCE: None}).encode()
    kept = any(Path(part).match(pattern) for part in path.parts for pattern in PRIVATE)
    found = [*holds(str(path).encode(), canaries), *holds(raw, canaries)]
    return sorted({name for name in found if not (kept and name == _HOME)})


def holds(raw: bytes, canaries: Canaries) -> list[str]:
    """Return the names of the canaries in bytes, and in what they pack: gzip, zip, Parquet."""
    found = []
    for part in _unpacked(raw):
        plain = part.lower()
        wide = plain.replace(b"\0", b"")  # UTF-16 and UTF-32
        found += [name for name, canary in canaries.items() if canary.encode() in plain or canary.encode() in wide]
    return found


def _unpacked(raw: bytes) -> Iterator[bytes]:
    yield raw
    if raw.startswith(b"\x1f\x8b"):
        yield from _unpacked(gzip.decompress(raw))
    elif raw.startswith(b"PK") and zipfile.is_zipfile(io.BytesIO(raw)):
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            for name in archive.namelist():
                yield name.encode()
                yield from _unpacked(archive.read(name))
    elif raw.startswith(b"PAR1"):
        table = pq.read_table(io.BytesIO(raw))
        names = [name for name in table.column_names if "float" not in str(table.schema.field(name).type)]
        yield repr([table.schema.metadata, table.select(names).to_pylist()]).encode()


def _failures(world: World, canaries: Canaries) -> Outcome:
    """Let commands fail with a traceback on the screen."""
    outcome, started = Outcome("secrets: commands that fail, with --debug"), time.perf_counter()
    log = world.root / "log.txt"
    for name, command in _FAILING.items():
        folder = world.folder("out")
        named = {"MISSING": str(world.root / "missing"), "KEY": canaries[_KEY]}
        words = [named.get(word, word) for word in world.words(command, folder / "v.npy")]
        code = Child.start(words, log, before=partial(_disguise, canaries, world.root)).wait()
        shown = "Traceback" in log.read_text(encoding="utf-8")
        outcome.check(code == 1 and shown, f"{name}: exit code {code}: {_last_line(log)}")
        _search(outcome, folder, canaries)
        _search_screen(outcome, log, canaries)
    outcome.seconds = time.perf_counter() - started
    return outcome


def _served(world: World, canaries: Canaries) -> Outcome:
    """Read each page of a server, with its key, without, and with another."""
    outcome, started = Outcome("secrets: serve"), time.perf_counter()
    log = world.root / "log.txt"
    words = world.words(f"serve ACTIVATED --port 0 {_KEY} KEY {CPU}", world.root)
    words[words.index("KEY")] = canaries[_KEY]
    child = Child.start(words, log, before=partial(_disguise, canaries, world.root))
    try:
        while "Serving" not in log.read_text(encoding="utf-8") and time.perf_counter() < started + 120:
            time.sleep(0.1)
        url = _last_line(log).partition(" on ")[2].partition(" ")[0]
        right = 0
        for page, body in _PAGES.items():
            for key in (canaries[_KEY], "", "wrong"):
                status, answer = _ask(f"{url}{page}", key, body)
                right += status == 200
                found = holds(answer, canaries)
                outcome.check(not found, f"{page} answers with: {', '.join(found)}")
        outcome.check(right > 2, f"{right} answers were given")
    finally:
        code = child.kill_after(0, 15)
    outcome.check(code == 0, f"exit code {code}: {_last_line(log)}")
    _search_screen(outcome, log, canaries)
    outcome.seconds = time.perf_counter() - started
    return outcome


def _ask(url: str, key: str, body: Any) -> tuple[int, bytes]:
    data = json.dumps(body).encode() if body else None
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(url, data, headers), timeout=60) as answer:
            return answer.status, bytes(str(answer.headers), "utf-8") + answer.read()
    except urllib.error.HTTPError as error:
        return error.code, bytes(str(error.headers), "utf-8") + error.read()


def _pushed(world: World, canaries: Canaries) -> Outcome:
    """Push a model to a stand-in for the Hub: with its token, with a wrong one, and over a base of this machine."""
    outcome, started = Outcome("secrets: push"), time.perf_counter()
    source, base = sources(world)
    folder, log = source.parent, world.root / "log.txt"
    with pytest.MonkeyPatch.context() as patch, running_hub() as hub:
        patch.setattr(stand_in, "TOKEN", canaries["HF_TOKEN"])
        hub.publish(BASE, base)
        trials: list[tuple[str, int, dict[str, str]]] = [
            (f"copy {source} {folder / 'model'}", 0, {}),
            (f"push {folder / 'model'} me/tiny", 0, {}),
            (f"push {folder / 'model'} me/whole --merged", 0, {}),
            (f"push {folder / 'model'} me/other", 2, {"HF_TOKEN": canaries[_KEY]}),
            (f"push {world.root / 'native'} me/local", 2, {}),
        ]
        for command, expected, variables in trials:
            talk = partial(_talk, hub, folder / "cache", {**canaries, **variables}, world.root)
            code = Child.start(command.split(), log, before=talk).wait()
            outcome.check(code == expected, f"{command}: exit code {code}: {_last_line(log)}")
            _search_screen(outcome, log, canaries)
        outcome.check({"me/tiny", "me/whole"} <= hub.repositories.keys(), "nothing was pushed")
        outcome.check("me/local" not in hub.repositories, "a base of this machine was pushed")
        for name, repository in hub.repositories.items():
            for path, raw in repository.files.items():
                found = [*holds(path.encode(), canaries), *holds(raw, canaries)]
                outcome.check(not found, f"{name}/{path} holds: {', '.join(found)}")
        found = holds(repr(hub.requests).encode(), canaries)
        outcome.check(not found, f"addresses hold: {', '.join(found)}")
    outcome.seconds = time.perf_counter() - started
    return outcome


def _talk(hub: Hub, cache: Path, canaries: Canaries, home: Path) -> None:
    """Put the canaries into this process, and let it talk to a stand-in."""
    _disguise(canaries, home)
    talk_to(hub, pytest.MonkeyPatch(), cache)


def _last_line(log: Path) -> str:
    return Child(0, log).last_line
