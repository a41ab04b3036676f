"""Load a server with clients of one sentence each, ours beside others, in turns in one run.

    python -m benchmarks.speed.serve --data-dir DIR --output benchmarks/results/speed-serve.json

Each client sends its next request when it has its answer. Measured are requests a second and the 50th and 99th
percentile of the latency, beside a bare ``encode`` of one sentence and of all of them. Then 64 clients of embeddings
and two streams of text, alone and together. Everything runs on this machine, clients included, so they are aiohttp's:
a request costs them 0.2 ms, and with httpx 0.8.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import aiohttp
import httpx2
import numpy as np

import sempa_st
from sempa_st.data.sts import local_files, read_pairs
from sempa_st.utils.files import write_json
from sempa_st.utils.run_info import run_info
from sempa_st.utils.tables import table

_START_SECONDS = 240
_TIMEOUT = 300
_PROMPT = "The history of the city begins in the year"


def main() -> None:
    """Measure, write the figures and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sempa-gemma3-270m-activated")
    parser.add_argument("--data-dir", required=True, help="folder with sts/stsb.dev.parquet")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 64, 256])
    parser.add_argument("--requests", type=int, default=256, help="least requests of a measurement; 32 of one client")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each part of the mixed load; 0 to leave it out")
    parser.add_argument(
        "--systems", nargs="*", help="servers to measure (default: all); encode is measured in any case"
    )
    parser.add_argument("--infinity", metavar="COMMAND", help="infinity_emb of another environment")
    parser.add_argument("--native", metavar="FOLDER", help="the model as a native folder, for infinity_emb")
    parser.add_argument("--output", required=True, help="JSON file to write")
    args = parser.parse_args()
    pairs = read_pairs(local_files(args.data_dir, "STSBenchmark", "dev", "mteb"))
    texts = sorted({*pairs.first, *pairs.second})
    random.Random(0).shuffle(texts)
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(started(command, port))
            for name, command, port in commands(args)
            if not args.systems or name in args.systems
        }
        found = measure(args, servers, texts)
        if args.seconds and "sempa serve" in servers:
            found["mixed"] = asyncio.run(mixed(servers["sempa serve"], args.model, texts, args.seconds))
    write_json(args.output, {**run_info(), "model": args.model, **found})
    print(table(list(found["load"][0]), [list(row.values()) for row in found["load"]]))
    print(table(["mixed load", "value"], list(found.get("mixed", {}).items())))


def commands(args: argparse.Namespace) -> Iterator[tuple[str, list[str], int]]:
    """Yield name, command line and port of each server."""
    port = free_port()
    serve = [sys.executable, "-m", "sempa_st", "serve", args.model, "--dtype", "float32", "--device", "cpu"]
    yield "sempa serve", [*serve, "--port", str(port)], port
    port = free_port()
    yield "one encode a request", [sys.executable, "-m", "benchmarks.speed.naive_server", args.model, str(port)], port
    if args.infinity and args.native:
        port = free_port()
        names = ["--model-id", args.native, "--served-model-name", args.model]
        flags = ["v2", *names, "--device", "cpu", "--engine", "torch", "--url-prefix", "/v1"]
        yield "infinity-emb", [args.infinity, *flags, "--host", "127.0.0.1", "--port", str(port)], port


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def started(command: Sequence[str], port: int) -> Iterator[str]:
    """Run a server within the block; yields its address once it answers."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + _START_SECONDS
    try:
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The server did not start: {' '.join(command)}")
            try:
                if httpx2.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx2.HTTPError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def measure(args: argparse.Namespace, servers: dict[str, str], texts: Sequence[str]) -> dict[str, Any]:
    """Return the rows of all systems at all numbers of clients."""
    model = sempa_st.load(args.model, dtype="float32", device="cpu")
    rows = []
    for url in servers.values():  # what a first request pays
        asyncio.run(load(url, args.model, texts[:4], 2))
    model.encode(list(texts[:32]))
    for round_ in range(args.rounds):
        for clients in args.clients:
            count = max(32, 2 * clients) if clients == 1 else max(args.requests, 2 * clients)
            start = round_ * count % (len(texts) - count)
            batch = texts[start : start + count]
            for name, url in servers.items():
                rows.append(row(name, clients, *asyncio.run(load(url, args.model, batch, clients))))
                print(rows[-1], flush=True)
            begun = time.perf_counter()
            each: list[Any] = list(batch) if clients == 1 else [list(batch)]
            latencies = [_seconds(model.encode, part) for part in each]
            rows.append(row("encode", clients, latencies, time.perf_counter() - begun, count))
            print(rows[-1], flush=True)
    return {"load": rows}


def _seconds(run: Callable[..., Any], *args: Any) -> float:
    started = time.perf_counter()
    run(*args)
    return time.perf_counter() - started


def row(name: str, clients: int, latencies: list[float], wall: float, count: int = 0) -> dict[str, Any]:
    """Return a row of the table; seconds are shown in milliseconds."""
    median, tail = np.percentile(latencies, [50, 99]) * 1000
    rate = (count or len(latencies)) / wall
    return {"system": name, "clients": clients, "requests/s": rate, "p50 ms": float(median), "p99 ms": float(tail)}


async def load(url: str, model: str, texts: Sequence[str], clients: int) -> tuple[list[float], float]:
    """Send one request for each text from this many clients; return their latencies and the whole time."""
    waiting, latencies = iter(texts), []
    async with _session(clients) as session:

        async def client() -> None:
            for text in waiting:
                begun = time.perf_counter()
                await _embed(session, url, model, text)
                latencies.append(time.perf_counter() - begun)

        begun = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return latencies, time.perf_counter() - begun


def _session(connections: int) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections),
        timeout=aiohttp.ClientTimeout(_TIMEOUT),
        raise_for_status=True,
    )


async def _embed(session: aiohttp.ClientSession, url: str, model: str, text: str) -> None:
    async with session.post(f"{url}/v1/embeddings", json={"model": model, "input": text}) as answer:
        await answer.read()


async def mixed(url: str, model: str, texts: Sequence[str], seconds: float) -> dict[str, float]:
    """Return the rates of 64 embedding clients and of two streams, alone and together."""
    found: dict[str, float] = {}
    for name, clients, streams in (("embedding alone", 64, 0), ("streams alone", 0, 2), ("together", 64, 2)):
        embedded, written = await _both(url, model, texts, seconds, clients, streams)
        if clients:
            found[f"{name}: texts/s"] = embedded / seconds
        if streams:
            found[f"{name}: tokens/s"] = written / seconds
    found["texts, share"] = found["together: texts/s"] / found["embedding alone: texts/s"]
    found["tokens, share"] = found["together: tokens/s"] / found["streams alone: tokens/s"]
    return found


async def _both(
    url: str, model: str, texts: Sequence[str], seconds: float, clients: int, streams: int
) -> tuple[int, int]:
    """Return the texts embedded and the tokens written within some seconds."""
    done = [0, 0]
    deadline = time.perf_counter() + seconds
    async with _session(clients + streams) as session:

        async def embed(number: int) -> None:
            index = number
            while time.perf_counter() < deadline:
                await _embed(session, url, model, texts[index % len(texts)])
                done[0] += time.perf_counter() < deadline
                index += clients

        async def write() -> None:
            body = {"model": model, "prompt": _PROMPT, "max_tokens": 1000, "stream": True, "temperature": 1.0}
            while time.perf_counter() < deadline:
                async with session.post(f"{url}/v1/completions", json=body) as answer:
                    async for line in answer.content:
                        if time.perf_counter() >= deadline:
                            break
                        if line.startswith(b"data: {"):  # the last line is no JSON
                            done[1] += bool(json.loads(line[6:])["choices"][0]["text"])

        await asyncio.gather(*(embed(number) for number in range(clients)), *(write() for _ in range(streams)))
    return done[0], done[1]


if __name__ == "__main__":
    main()
