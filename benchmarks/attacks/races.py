"""Start several at once on one output or one model: one output that is whole, nothing beside it, no hang.

Of commands with one output at least one succeeds, and what is there in the end is what one alone would have written.
The others succeed too, or end with exit code 2 and one paragraph. Threads and processes that share a model each get the
vectors that they would get alone.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import finish_adapter, make_gemma, make_tokenizer, save_base

from benchmarks.attacks.sharing import WORKS
from benchmarks.attacks.world import CPU, TRAIN, Child, Outcome, World, content, unlike
from sempa_st.folder import shipped
from sempa_st.folder.shipped import pack_model
from sempa_st.model import embedded
from sempa_st.training.config import TrainConfig
from sempa_st.utils.files import write_json

_TRIALS, _QUICK_TRIALS = 5, 2
_LIMIT = 120
"""Seconds after which something hangs."""
_BAD_INPUT = 2


@dataclass(frozen=True)
class Race:
    """Commands that are started together.

    Attributes:
        name: Name in the table.
        command: Words of each; see :meth:`World.words`.
        other: Words of every second one, if they differ. Then one alone may succeed, unless it may overwrite.
        output: Name of the output that they share.
        count: How many there are.
        quick: Whether it is one of the quick form.
    """

    name: str
    command: str
    output: str = "out"
    count: int = 4
    quick: bool = False
    other: str = ""


_ENCODE = f"encode NATIVE TEXTS --output OUT --shard-size 16 {CPU}"
RACES = [
    Race("encode to npy", _ENCODE, "v.npy", quick=True),
    Race("encode to parquet, --overwrite", f"{_ENCODE} --overwrite", "v.parquet"),
    Race("encode to a folder", _ENCODE),
    Race("encode, with two models", _ENCODE, "v.npy", other=_ENCODE.replace("NATIVE", "OTHER")),
    Race("copy", "copy NATIVE OUT", quick=True),
    Race("copy, of two models", "copy NATIVE OUT", quick=True, other="copy OTHER OUT"),
    Race("copy --overwrite", "copy NATIVE OUT --overwrite"),
    Race("copy --overwrite, of two models", "copy NATIVE OUT --overwrite", other="copy OTHER OUT --overwrite"),
    Race("copy --merge", "copy NATIVE OUT --merge"),
    Race("average", "average NATIVE OTHER --output OUT"),
    Race("train", TRAIN, count=2),
    Race("train --overwrite", f"{TRAIN} --overwrite", count=2),
    Race("sweep", TRAIN.replace("train ", "sweep ", 1) + " --set lora_r=2,4", count=2),
    Race("table", f"table --base BASE --methods mean --data-dir DATA --output OUT {CPU}", count=3),
    Race("evaluate", f"evaluate NATIVE --tasks STSBenchmark --split dev --data-dir DATA --output OUT {CPU}"),
    Race("analyze", f"analyze BASE --only geometry --output OUT {CPU}", count=3),
]


def attack(world: World) -> Iterator[Outcome]:
    """Yield what became of commands with one output, of readers of one cache, and of what shares a model."""
    trials = _QUICK_TRIALS if world.quick else _TRIALS
    for race in RACES:
        if race.quick or not world.quick:
            yield attack_race(world, race, trials)
    yield _cache(world, trials)
    for name, work in WORKS.items():
        outcome, started = Outcome(f"races: {name}"), time.perf_counter()
        for model in ("native",) if world.quick else ("native", "activated"):
            child = Child.call(partial(work, world.root / model), world.root / "log.txt")
            code = child.wait_within(_LIMIT)
            outcome.check(code == 0, f"{model}: exit code {code}: {child.last_line}")
        outcome.seconds = time.perf_counter() - started
        yield outcome


def attack_race(world: World, race: Race, trials: int) -> Outcome:
    """Start the commands of a race together ``trials`` times: first at one moment, then at moments of their own."""
    outcome, started = Outcome(f"races: {race.count} x {race.name}"), time.perf_counter()
    commands = [race.command, race.other or race.command]
    expected, moments = [], random.Random(race.name)
    for command in dict.fromkeys(commands):
        alone = world.folder("races", "alone") / race.output
        code = Child.start(world.words(command, alone), world.root / "log.txt").wait()
        outcome.check(code == 0, f"alone: exit code {code}")
        expected.append(content(alone))
    seconds = (time.perf_counter() - started) / len(expected)
    winners = 1 if race.other and "--overwrite" not in race.command else race.count
    for number in range(trials):
        delays = [moments.uniform(0, 2 * seconds) if number else 0.0 for _ in range(race.count)]
        output = world.folder("races", "trial") / race.output
        words = [world.words(commands[turn % 2], output) for turn in range(race.count)]
        fault = _run(world, words, delays, range(1, winners + 1)) or unlike(output, expected, "alone")
        outcome.check(not fault, f"started after {', '.join(f'{delay:.2f}' for delay in delays)} s: {fault}")
    shutil.rmtree(world.root / "races")
    outcome.seconds = time.perf_counter() - started
    return outcome


def _run(world: World, commands: Sequence[Sequence[str]], delays: Sequence[float], winners: range) -> str:
    """Run commands at once, of which so many may succeed; return what is wrong with how they ended, if anything is."""
    start = time.monotonic() + 0.1 * len(commands)
    children = [
        Child.start(words, world.root / f"log{number}.txt", before=partial(_sleep_until, start + delay))
        for number, (words, delay) in enumerate(zip(commands, delays, strict=True))
    ]
    codes = [child.wait_within(_LIMIT + max(delays)) for child in children]
    for child, code in zip(children, codes, strict=True):
        text = child.log.read_text(encoding="utf-8", errors="replace")
        paragraph = child.last_line.startswith("sempa: ") and text.count("sempa: ") == 1 and "Traceback" not in text
        if code and (code != _BAD_INPUT or not paragraph):
            return f"exit code {code}: {child.last_line}"
    return "" if codes.count(0) in winners else f"{codes.count(0)} succeeded: {children[-1].last_line}"


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def _cache(world: World, trials: int) -> Outcome:
    """Start readers of one shipped model when neither it nor its base is in the cache."""
    outcome, started = Outcome("races: 4 first readers of a shipped model"), time.perf_counter()
    with pytest.MonkeyPatch.context() as patch:
        root = world.folder("races")
        patch.setattr(embedded, "_convert", _convert)
        patch.setattr(shipped, "SHIPPED_MODELS", root / "models")
        patch.setenv("SEMPA_CACHE_DIR", str(root / "packing"))
        trained = finish_adapter(root / "tiny", embedded.embedded_base(), make_gemma())
        write_json(trained / "sempa_run.json", _record())
        pack_model(trained, root / "models" / "sempa-tiny")
        patch.setenv("SEMPA_CACHE_DIR", str(root / "trial" / "cache"))  # the folder that models name
        commands = [["copy", "sempa-tiny", str(root / f"copy{number}")] for number in range(4)]
        expected: dict[str, str] = {}
        for number in range(trials + 1):
            for path in (root / "trial", *root.glob("copy?")):
                shutil.rmtree(path, ignore_errors=True)
            started_now = commands if number else commands[:1]
            count = len(started_now)
            fault = _run(world, started_now, [0.0] * count, range(count, count + 1))
            expected = expected or content(root / "copy0")
            copies = [content(path) for path in root.glob("copy?")]
            same = all(_same_but_card(found, expected) for found in copies)
            left = [path.name for path in (root / "trial" / "cache").rglob(".*")]
            outcome.check(not fault and same, f"trial {number}: {fault or 'copies differ'}")
            outcome.check(not left, f"trial {number}: left in the cache: {', '.join(left)}")
    shutil.rmtree(world.root / "races")
    outcome.seconds = time.perf_counter() - started
    return outcome


def _record() -> dict[str, Any]:
    """Return the record of a run, for the model that is shipped."""
    config = TrainConfig(base=embedded.EMBEDDED_BASE, data="sample", output="tiny", max_seq_length=160)
    return {
        "objective": config.objective,
        "base": config.base,
        "data": {"source": "sample", "triplets": 24, "skipped": 0, "sha256": "0" * 64},
        "config": vars(config),
        "dev": {"source": "sample", "pairs": 9, "scores": [{"step": 2, "samples": 24, "spearman": 70.0}]},
        "best_step": 2,
    }


def _same_but_card(found: dict[str, str], expected: dict[str, str]) -> bool:
    """Return whether two copies have the same files; the card has the folder's name in it."""
    return {**found, "README.md": ""} == {**expected, "README.md": ""}


def _convert(name: str, target: Path) -> None:
    """Stand in for the conversion of a base: write a tiny one, not at once."""
    save_base(target, make_gemma(), make_tokenizer(chat=None))
    time.sleep(0.5)
    (target / "GEMMA_TERMS.html").write_text("<p>terms</p>", encoding="utf-8")
