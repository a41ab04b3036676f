"""Workers of Ray Data, on a cluster of this machine alone; one of them is killed."""

from __future__ import annotations

import csv
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from helpers.tiny import sample_sentences

from sempa_st.encoding import encode_file
from sempa_st.encoding.on_ray import RayWorkers
from sempa_st.encoding.sentences import read_sentences
from sempa_st.encoding.shard_writer import ShardWriter
from sempa_st.encoding.tables import input_schema
from sempa_st.encoding.vectors import VectorSettings
from sempa_st.errors import SempaError

pytestmark = pytest.mark.names_dtype

ROOT = Path(__file__).resolve().parents[2]
SENTENCES = sample_sentences()[:240]
SHARD = 4
FLOAT32 = {"dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", str(ROOT))  # of the workers, which import this package
        import ray

        earlier = set(psutil.Process().children(recursive=True))  # of other tests in this process
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
        started = set(psutil.Process().children(recursive=True)) - earlier
        # Python's own tracker of shared memory ends with this process.
        processes = [process for process in started if "resource_tracker" not in " ".join(process.cmdline())]
        yield
        ray.shutdown()
        _, alive = psutil.wait_procs(processes, timeout=20)
        assert alive == []


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, part in {"a.csv": SENTENCES[:90], "b.csv": SENTENCES[90:]}.items():
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["text", "id"], *([text, SENTENCES.index(text)] for text in part)])
    return folder


def kill_a_worker_in_mid_run(shards: Path, killed: list[int]) -> None:
    """Kill the first worker that there is once some shards, but not all, are written."""
    while not killed:
        if len(list(shards.glob("part-*"))) >= 3:
            workers = [
                process
                for process in psutil.Process().children(recursive=True)
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::MapWorker")
            ]
            assert workers
            os.kill(workers[0].pid, signal.SIGKILL)
            killed += [workers[0].pid, len(list(shards.glob("part-*")))]
        time.sleep(0.01)


def test_two_workers_of_which_one_is_killed_write_what_one_process_writes(
    cluster: None, adapter_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"column": "text", "shard_size": SHARD, "normalize": True, **FLOAT32}
    killed: list[int] = []
    output = tmp_path / "out"
    killer = threading.Thread(target=kill_a_worker_in_mid_run, args=(tmp_path / "out.encoding", killed), daemon=True)
    killer.start()
    assert encode_file(str(adapter_folder), corpus, output, engine="ray", workers=2, **asked) == (240, 32)
    killer.join(timeout=1)
    assert killed
    assert killed[1] < 240 / SHARD
    assert encode_file(str(adapter_folder), corpus, tmp_path / "one", **asked) == (240, 32)
    table = pq.read_table(output)
    assert table["row"].to_pylist() == list(range(1, 241))  # none lost, none doubled
    assert table["text"].to_pylist() == SENTENCES
    assert table.equals(pq.read_table(tmp_path / "one"))
    assert [path.name for path in sorted(tmp_path.glob("*out*"))] == ["out"]


def test_a_worker_returns_what_a_user_can_mend(adapter_folder: Path, corpus: Path, tmp_path: Path) -> None:
    from dataclasses import asdict

    from sempa_st.encoding.on_ray import ShardActor

    sentences = read_sentences(corpus, column="text", shard_size=SHARD)
    (tmp_path / "v.encoding").mkdir()
    settings = VectorSettings(truncate_dim=64)
    write = ShardWriter(tmp_path / "v", "text", input_schema(sentences), settings, 32)
    row = {
        **asdict(sentences.shards[1]),
        "path": str(sentences.shards[1].path),
        "start": str(sentences.shards[1].start),
    }
    actor = ShardActor({"model": str(adapter_folder), **FLOAT32}, write)
    assert actor(row) == {"count": 0, "error": "truncate_dim is 64. The model's vectors have 32 numbers."}
    (corpus / "a.csv").write_text("text,id\nA cat.,1\n")
    assert "changed while it was read" in actor(row)["error"]
    assert list((tmp_path / "v.encoding").iterdir()) == []


def test_ray_needs_a_model_that_is_there(cluster: None, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(SempaError, match="Unknown model"):
        encode_file("no/such", corpus, tmp_path / "v", column="text", engine="ray", **FLOAT32)
    assert not (tmp_path / "v.encoding").exists()


def test_sigterm_does_what_it_did_before_ray_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def handler(*_: Any) -> None:
        """Stands for the command line's own handler."""

    def start(**_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise RuntimeError("started")

    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(RuntimeError, match="started"):
            RayWorkers("gemma3-270m", {}, None)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("returns", [True, False])
def test_sigterm_while_ray_starts_is_the_program_s(monkeypatch: pytest.MonkeyPatch, returns: bool) -> None:
    """Ray's handler, which it sets first, makes it an exit with the code 15."""

    class OwnError(Exception):
        pass

    def handler(*_: Any) -> None:
        if not returns:
            raise OwnError

    def start(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        signal.raise_signal(signal.SIGTERM)

    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(SempaError if returns else OwnError):
            RayWorkers("gemma3-270m", {}, None)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
