"""Embed and serve for a long time: the memory of a process does not grow.

Its resident memory is read every second. The first fifth is a warm-up. The rest is cut into ten blocks (fewer if it is
short), and a line is fitted to their means. Memory grows if the line rises by more than its noise and more than a
trifle: if the 95 % interval of the slope is above zero, and the line rises by 1 % of the process or more from the end
of the warm-up to the end. Caches of words and the allocator's own stores fill for some minutes and then stay as they
are; the quick form ends before that, and allows 5 %.
"""

from __future__ import annotations

import json
import random
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from helpers.server import load_float32, running_server
from helpers.tiny import sample_sentences
from scipy import stats

from benchmarks.attacks.world import Child, Outcome, World

_SECONDS, _QUICK_SECONDS = 3600, 20
_WORDS = " ".join(sample_sentences()).split()
_MOST_WORDS, _MOST_TEXTS = 400, 16
_MOST_REQUESTS = 1_000_000
_FIRST = 40
"""Batches and requests before the memory is read: what is loaded and kept on first use is there then."""
_WARM_UP = 0.2
_BLOCKS, _FEWEST = 10, 3
_SHARE, _QUICK_SHARE = 0.01, 0.05
_READY = "ready "
_START, _ANSWER = 600, 60
"""Seconds that a process may take to start, and a server to answer."""


@dataclass(frozen=True)
class Line:
    """A line through the memory of a process over time.

    Attributes:
        slope: Its rise, in units of the samples per sample.
        low: Lower end of the slope's 95 % interval.
        high: Upper end.
        share: Its rise from end to end, over the mean of the samples.
    """

    slope: float
    low: float
    high: float
    share: float

    def grows(self, trifle: float = _SHARE) -> bool:
        """Return whether the line rises by more than noise, and by no trifle, a share of the process."""
        return self.low > 0 and self.share >= trifle


def fit(samples: Sequence[float]) -> Line:
    """Fit a line to the block means of samples, after the warm-up."""
    kept = np.asarray(samples[round(_WARM_UP * len(samples)) :], dtype=float)
    blocks = np.array_split(np.arange(len(kept)), max(_FEWEST, min(_BLOCKS, len(kept) // 2)))
    found = stats.linregress([block.mean() for block in blocks], [kept[block].mean() for block in blocks])
    half = stats.t.ppf(0.975, len(blocks) - 2) * np.nan_to_num(found.stderr)  # of equal means it is NaN
    return Line(found.slope, found.slope - half, found.slope + half, found.slope * len(kept) / kept.mean())


def attack(world: World) -> Iterator[Outcome]:
    """Yield whether memory grows in a process that embeds, and in one that serves, both at once."""
    seconds, started = _QUICK_SECONDS if world.quick else _SECONDS, time.perf_counter()
    latest = time.monotonic() + 2 * _START + seconds
    stops = {name: Stop(world.folder("haul") / f"{name}.stop", latest) for name in ("ask", "encode", "serve")}
    logs = {name: world.root / f"{name}.txt" for name in stops}
    children = {
        "encode": Child.call(partial(_encode, world.root / "native", stops["encode"]), logs["encode"]),
        "serve": Child.call(partial(_serve, world.root / "activated", stops["serve"]), logs["serve"]),
    }
    url = [_ready(logs[name]) for name in children][-1]
    children["ask"] = Child.call(partial(_ask, url, stops["ask"]), logs["ask"])
    _ready(logs["ask"])
    memory = watch({name: children[name].process for name in ("encode", "serve")}, seconds)
    codes = {}
    for name, stop in stops.items():  # who asks is the first to end
        stop.file.touch()
        codes[name] = children[name].kill_after(_ANSWER, 9)
    said = {name: child.last_line for name, child in children.items()}
    for name, samples in memory.items():
        outcome = judge(name, samples, codes, said, _QUICK_SHARE if world.quick else _SHARE)
        outcome.seconds = time.perf_counter() - started
        yield outcome


@dataclass(frozen=True)
class Stop:
    """When a process ends.

    Attributes:
        file: File that tells it to.
        latest: Value of ``time.monotonic()`` at which it ends anyway.
    """

    file: Path
    latest: float

    @property
    def reached(self) -> bool:
        """Whether it is time."""
        return self.file.exists() or time.monotonic() > self.latest


def judge(
    name: str, samples: Sequence[float], codes: dict[str, int], said: dict[str, str], trifle: float = _SHARE
) -> Outcome:
    """Return whether a process has grown, and ended in order with those that it worked with."""
    outcome = Outcome(f"haul: {name} for {len(samples)} s")
    for each in (name,) if name == "encode" else (name, "ask"):
        outcome.check(codes[each] == 0, f"{each}: exit code {codes[each]}: {said[each]}")
    if len(samples) < 5 * _FEWEST:
        outcome.check(False, f"{len(samples)} samples are too few")
        return outcome
    line = fit(samples)
    hourly = [3600 * slope / 1024 for slope in (line.slope, line.low, line.high)]
    told = "{:+.2f} MiB an hour (95 %: {:+.2f} to {:+.2f})".format(*hourly) + f", {line.share:+.2%} of the process"
    print(f"{name}: {told}; {said['ask' if name == 'serve' else name]}", file=sys.stderr)
    outcome.check(not line.grows(trifle), f"memory grows by {told}")
    return outcome


def _ready(log: Path) -> str:
    """Wait until a process says that it is ready, and return what it says beside."""
    deadline = time.monotonic() + _START
    while time.monotonic() < deadline:
        text = log.read_text(encoding="utf-8") if log.exists() else ""
        if _READY in text:
            return text.partition(_READY)[2].split()[0]
        time.sleep(0.05)
    raise TimeoutError(f"nothing is ready: {text}")


def watch(processes: dict[str, int], seconds: float) -> dict[str, list[float]]:
    """Return the resident memory of processes in KiB, read every second, while they last."""
    found: dict[str, list[float]] = {name: [] for name in processes}
    start = time.monotonic()
    for second in range(int(seconds)):
        time.sleep(max(0.0, start + second - time.monotonic()))
        for name, process in processes.items():
            if resident := resident_kib(process):
                found[name].append(resident)
    return found


def resident_kib(process: int) -> float:
    """Return the resident memory of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return 0
    return next((float(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


def _texts(draw: random.Random) -> list[str]:
    """Return some texts of 1 to 400 words, most of them known to the tokenizer."""

    def word() -> str:
        return draw.choice(_WORDS) if draw.random() < 0.9 else f"{draw.getrandbits(40):x}"

    return [" ".join(word() for _ in range(draw.randint(1, _MOST_WORDS))) for _ in range(draw.randint(1, _MOST_TEXTS))]


def _encode(folder: Path, stop: Stop) -> None:
    model, draw = load_float32(folder), random.Random(0)
    count, batches = 0, 0
    while not stop.reached:
        texts, batches = _texts(draw), batches + 1
        if not np.isfinite(model.encode(texts, batch_size=draw.choice((1, 4, 32)))).all():
            raise AssertionError("a vector is not finite")
        count += len(texts)
        if batches == _FIRST:
            print(f"{_READY}.", flush=True)
    print(f"{count} texts were embedded", flush=True)


def _serve(folder: Path, stop: Stop) -> None:
    with running_server(load_float32(folder)) as server:
        print(f"{_READY}{server.url}", flush=True)
        while not stop.reached:
            time.sleep(0.2)


def _ask(url: str, stop: Stop) -> None:
    """Ask a server for vectors, and now and then for a short completion."""
    draw, count = random.Random(1), 0
    while count < _MOST_REQUESTS and not stop.reached:
        texts = _texts(draw)
        if draw.random() < 0.8:
            answer = _post(f"{url}/v1/embeddings", {"model": "tiny", "input": texts})
            complete = len(answer["data"]) == len(texts)
        else:
            prompt = {"model": "tiny", "prompt": texts[0][:200], "max_tokens": draw.randint(1, 8)}
            complete = len(_post(f"{url}/v1/completions", prompt)["choices"]) == 1
        if not complete:
            raise AssertionError("an answer is not complete")
        count += 1
        if count == _FIRST:
            print(f"{_READY}.", flush=True)
    print(f"{count} requests were answered", flush=True)


def _post(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=_ANSWER) as answer:
        return json.load(answer)
