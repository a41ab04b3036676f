"""The load that the server's benchmark makes, and what it counts."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.server import activated_adapter, load_float32, running_server

from benchmarks.speed import serve

pytestmark = pytest.mark.names_dtype


def test_a_row_holds_percentiles_in_milliseconds() -> None:
    latencies = [0.001 * n for n in range(1, 101)]
    found = serve.row("ours", 8, latencies, wall=4.0)
    assert found["requests/s"] == 25
    assert found["p50 ms"] == pytest.approx(np.percentile(np.arange(1, 101), 50))
    assert found["p99 ms"] == pytest.approx(np.percentile(np.arange(1, 101), 99))
    assert serve.row("encode", 8, [4.0], wall=4.0, count=200)["requests/s"] == 50


def test_every_text_is_asked_once_by_some_client_and_the_mixed_load_has_both_parts(
    tmp_path: Path, tiny_base: Path
) -> None:
    model = load_float32(activated_adapter(tmp_path / "tiny-activated", tiny_base))
    texts = [f"sentence number {n}" for n in range(20)]
    with running_server(model) as server:
        latencies, wall = asyncio.run(serve.load(server.url, "tiny", texts, clients=6))
        assert len(latencies) == 20 and max(latencies) <= wall
        mixed = asyncio.run(serve.mixed(server.url, "tiny", texts, seconds=3))
    assert mixed["together: texts/s"] > 0 and mixed["together: tokens/s"] > 0
    assert mixed["texts, share"] == mixed["together: texts/s"] / mixed["embedding alone: texts/s"]
    assert mixed["tokens, share"] == mixed["together: tokens/s"] / mixed["streams alone: tokens/s"]


def test_the_naive_server_starts_answers_and_is_ended(adapter_folder: Path) -> None:
    port = serve.free_port()
    command = [sys.executable, "-m", "benchmarks.speed.naive_server", str(adapter_folder), str(port)]
    with serve.started(command, port) as url:
        latencies, _ = asyncio.run(serve.load(url, "tiny", ["one sentence"], clients=1))
        assert len(latencies) == 1
    with pytest.raises(RuntimeError, match="did not start"), serve.started([sys.executable, "-c", ""], port):
        pass


def test_infinity_is_asked_for_by_name() -> None:
    args = argparse.Namespace(model="m", infinity=None, native=None)
    assert [name for name, *_ in serve.commands(args)] == ["sempa serve", "one encode a request"]
    args = argparse.Namespace(model="m", infinity="infinity_emb", native="folder")
    name, command, port = list(serve.commands(args))[-1]
    assert (
        name == "infinity-emb"
        and str(port) in command
        and command[:4] == ["infinity_emb", "v2", "--model-id", "folder"]
    )
