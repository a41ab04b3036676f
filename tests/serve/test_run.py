"""``sempa serve`` as a process: its start, its end, and what stops it from starting."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.tiny import sample_sentences

from sempa_st.errors import SempaError
from sempa_st.serve.config import ServeConfig
from sempa_st.serve.run import _listening

pytestmark = pytest.mark.names_dtype


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the command; yields the process and its address."""
    command = [sys.executable, "-m", "sempa_st", "serve", str(folder), "--dtype", "float32", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--port", "0", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(
            r"Serving tiny-activated on (http://127\.0\.0\.1:\d+) \(embeddings, completions, chat\)", line
        )
        assert found, (line, process.stderr.read() if process.stderr and process.poll() is not None else "")
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def embed(url: str, text: str) -> list[float]:
    request = urllib.request.Request(
        f"{url}/v1/embeddings",
        json.dumps({"model": "tiny-activated", "input": text}).encode(),
        {"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as answer:
        return list(json.load(answer)["data"][0]["embedding"])


def test_connections_do_not_wait_for_acknowledgements() -> None:
    with _listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_loses_no_accepted_request(folder: Path, number: signal.Signals) -> None:
    answers: list[object] = []
    with serving(folder) as (process, url):
        assert len(embed(url, "A cat.")) == 32

        def work(text: str) -> None:
            try:
                answers.append(embed(url, text))
            except OSError as error:
                answers.append(error)

        threads = [threading.Thread(target=work, args=(text * 20,)) for text in sample_sentences()[:40]]
        for thread in threads:
            thread.start()
        while not answers:
            time.sleep(0.001)
        process.send_signal(number)
        for thread in threads:
            thread.join(60)
        assert process.wait(60) == 0
        assert process.stderr is not None and process.stderr.read() == ""
    # What the server counted as answered, each client got; the others were never accepted.
    lost = [answer for answer in answers if not isinstance(answer, list)]
    assert len(answers) == 40 and all(isinstance(error, OSError) for error in lost)
    assert len(answers) > len(lost)


def test_a_client_that_sends_half_a_request_does_not_keep_the_server(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(folder, "--timeout", "1") as (process, url):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as half:
            half.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


def test_a_taken_port_is_one_paragraph(folder: Path, run_cli: Callable[..., tuple[int, str, str]]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, error = run_cli("serve", folder, "--dtype", "float32", "--device", "cpu", "--port", port)
    assert code == 2 and error.count("\n") == 1
    assert f"127.0.0.1:{port} cannot be listened on" in error


def test_a_model_that_cannot_be_loaded_is_one_paragraph(
    tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, error = run_cli("serve", tmp_path / "nothing", "--dtype", "float32")
    assert code == 2 and error.count("\n") == 1 and not out
    assert "nothing" in error


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ServeConfig().api_key == ""
    monkeypatch.setenv("SEMPA_API_KEY", "secret")
    assert ServeConfig().api_key == "secret"
    assert ServeConfig(api_key="other").api_key == "other"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70000}, "port is 70000"),
        ({"max_queue": 0}, "max_queue is 0"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"max_wait": 2.0}, "max_wait is 2.0"),
        ({"api_key": "käse"}, "no HTTP header can carry"),
        ({"dtype": "int4"}, "Unknown dtype 'int4'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SempaError, match=re.escape(message)):
        ServeConfig(**settings)  # type: ignore[arg-type]
