"""What the attacks on secrets, shared outputs and long runs count as a failure, with stand-ins for the commands."""

from __future__ import annotations

import gzip
import json
import os
import random
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.attacks import haul, kill, races, secrets, world
from benchmarks.attacks.races import Race
from benchmarks.attacks.world import Child, World, content

pytestmark = pytest.mark.names_dtype

CANARIES = secrets.make_canaries()
TOKEN, HOME = CANARIES["HF_TOKEN"], CANARIES["home"]


def written(folder: Path, kind: str, text: str) -> Path:
    """Write a file with a text in it, and a name that does not say how."""
    path = folder / kind
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("inner.gz", gzip.compress(text.encode()))
    elif kind == "parquet":
        pq.write_table(pa.table({"text": [text] * 9, "v": np.zeros(9, dtype=np.float32)}), path, compression="zstd")
    elif kind == "safetensors":
        save_file({"a": torch.zeros(2)}, path, metadata={"from": text})
    elif kind == "name":
        path = folder / f"{text.replace('/', '_')}.txt"
        path.touch()
    else:
        coded = text.encode("utf-16" if kind == "utf-16" else "utf-8")
        path.write_bytes(gzip.compress(coded) if kind == "gz" else coded)
    return path


@pytest.mark.parametrize("kind", ["plain", "utf-16", "gz", "zip", "parquet", "safetensors", "name"])
def test_a_canary_is_found_wherever_it_is(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, kind, f"x {TOKEN.upper()} and /{HOME}/b")
    assert secrets.leaks(path, tmp_path, CANARIES) == ["HF_TOKEN", "home"]
    assert secrets.leaks(written(tmp_path, kind, "nothing"), tmp_path, CANARIES) == []


def test_paths_stay_where_they_are_needed_and_tokens_nowhere(tmp_path: Path) -> None:
    for name in ("model.training", "model"):
        (tmp_path / name).mkdir()
    kept = written(tmp_path / "model.training", "plain", f"/{HOME}/b {TOKEN}")
    assert secrets.leaks(kept, tmp_path, CANARIES) == ["HF_TOKEN"]
    adapter = tmp_path / "model" / "adapter_config.json"
    adapter.write_text(json.dumps({"base_model_name_or_path": f"/{HOME}/base"}))
    assert secrets.leaks(adapter, tmp_path, CANARIES) == []
    adapter.write_text(json.dumps({"base_model_name_or_path": "b", "revision": f"/{HOME}/base"}))
    assert secrets.leaks(adapter, tmp_path, CANARIES) == ["home"]


@pytest.mark.parametrize(
    ("leak", "named"),
    [
        ("", ""),
        ("HF_TOKEN", "card.md holds: HF_TOKEN"),
        ("HOME", "card.md holds: home"),
        ("USER", "card.md holds: USER"),
        ("node", "card.md holds: host name"),
        ("screen", "the screen shows: WANDB_API_KEY"),
    ],
)
def test_what_a_command_leaks_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leak: str, named: str) -> None:
    def command(words: list[str]) -> int:
        import platform

        text = platform.node() if leak == "node" else os.environ.get(leak, "")
        Path(words[-1]).mkdir()
        Path(words[-1], "card.md").write_text(f"made by {text}")
        print(os.environ["HOME"], os.environ["WANDB_API_KEY"] if leak == "screen" else "")
        return 0

    monkeypatch.setattr(world, "main", command)
    home = tmp_path / HOME
    home.mkdir()
    outcome = secrets._job(World(home), kill.Job("x", "x --output OUT"), CANARIES)
    assert outcome.trials == 3
    assert [named in failure for failure in outcome.failures] == ([True] if named else [])


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("", ""),
        ("left", "left: .partial"),
        ("other", "other than alone: rows.json"),
        ("none", "0 succeeded: sempa: in use"),
        ("traceback", "exit code 1: ZeroDivisionError"),
        ("two", "2 succeeded"),
    ],
)
def test_each_fault_of_a_race_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, named: str) -> None:
    def command(words: list[str]) -> int:
        output = Path(words[-1])
        race = output.parent.name == "trial"
        try:
            (tmp_path / f"first-{output.parent.name}").mkdir()
        except FileExistsError:
            if fault == "traceback":
                raise ZeroDivisionError from None
            if fault != "two":
                print("sempa: in use")
                return 2
        if race and fault == "none":
            print("sempa: in use")
            return 2
        output.write_text(json.dumps([3 if fault == "other" and race else 1]))
        if race and fault == "left":
            (output.parent / ".partial").touch()
        return 0

    monkeypatch.setattr(world, "main", command)
    race = Race("x", "x --output OUT", "rows.json", count=2, other="y --output OUT" if fault == "two" else "")
    outcome = races.attack_race(World(tmp_path), race, trials=1)
    assert any(named in failure for failure in outcome.failures) if named else outcome.failures == []


def test_outputs_are_compared_without_times(tmp_path: Path) -> None:
    texts = {
        "a.md": "| run | seconds | score |\n|---|---|---|\n| x | {} | {} |\n",
        "a.csv": "system,score,sentences/s\nmean,{1},{0}.5\n",
        "a.html": "<p>2026-11-29T20:52:0{}+00:00 {}</p>",
        "a.json": '{{"date": {}, "score": {}}}',
        "journal.jsonl": '{{"datetime_start": {0}}}',
    }
    for name, numbers in (("one", (1, 80)), ("two", (2, 80)), ("three", (1, 81))):
        (tmp_path / name).mkdir()
        for file, text in texts.items():
            (tmp_path / name / file).write_text(text.format(*numbers))
    one, two, three = (content(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert {name for name in one if one[name] != three[name]} == texts.keys() - {"journal.jsonl"}


def test_a_hang_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    def hang() -> None:
        child = os.fork()
        (tmp_path / f"{os.getpid()}.{child}").touch()
        time.sleep(600)

    started = time.monotonic()
    assert Child.call(hang, tmp_path / "log.txt").wait_within(1) == -9
    assert time.monotonic() - started < 60
    (pair,) = (path.name for path in tmp_path.glob("*.[1-9]*"))
    deadline = time.monotonic() + 30
    while _lives(int(pair.partition(".")[2])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(int(pair.partition(".")[2]))


def _lives(process: int) -> bool:
    path = Path(f"/proc/{process}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_a_function_in_a_process_of_its_own_ends_with_its_fault(tmp_path: Path) -> None:
    child = Child.call(lambda: 1 // 0, tmp_path / "log.txt")
    assert (child.wait(), child.last_line) == (1, "ZeroDivisionError: integer division or modulo by zero")
    assert Child.call(lambda: print("done"), tmp_path / "log.txt").wait() == 0
    assert (tmp_path / "log.txt").read_text() == "done\n"


@pytest.mark.parametrize(
    ("growth", "jump", "grows"),
    [(0, 0, False), (0, 200_000, False), (100, 0, True), (1, 0, False), (-100, 0, False)],
    ids=["noise", "a warm-up", "a leak", "a trifle", "a fall"],
)
@pytest.mark.parametrize("seed", range(5))
def test_memory_that_grows_is_told_from_noise(growth: float, jump: float, grows: bool, seed: int) -> None:
    """Samples of a process of 800 MB over 20 minutes, in KiB; a leak of 100 KiB a second."""
    draw = random.Random(seed)
    samples = [800_000 - jump * (second < 200) + growth * second + draw.gauss(0, 2_000) for second in range(1200)]
    line = haul.fit(samples)
    assert line.grows() == grows
    assert not line.grows(trifle=0.5)
    assert abs(line.slope - growth) < 3
    outcome = haul.judge("encode", samples, {"encode": 0}, {"encode": "9 texts"})
    assert [failure.startswith("memory grows by +") for failure in outcome.failures] == [True] * grows


def test_a_process_that_grows_is_watched(tmp_path: Path) -> None:
    def grow() -> None:
        kept, start = [], time.monotonic()
        while time.monotonic() < start + 60:
            kept.append(np.ones(2**18))  # 2 MiB
            time.sleep(0.1)

    child = Child.call(grow, tmp_path / "log.txt")
    samples = haul.watch({"x": child.process}, 3)["x"]
    assert child.kill_after(0, 9) == -9
    assert len(samples) == 3
    assert samples[2] - samples[0] > 2**11
    assert haul.watch({"x": child.process}, 1) == {"x": []}
    early = haul.judge("encode", samples, {"encode": 1}, {"encode": "boom"})
    assert early.failures == ["encode: exit code 1: boom", "3 samples are too few"]
