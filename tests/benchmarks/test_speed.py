"""What the speed benchmark counts, and that every system embeds the same texts in the same order."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny import make_gemma
from scipy.stats import spearmanr
from torch import nn
from transformers import AutoModel

from benchmarks.speed import peers, training
from benchmarks.speed.run import linear_parameters, lowest_cosine, run_interleaved, spearman
from benchmarks.speed.stream import run_watched
from sempa_st.data.nli import NliData, load_nli
from sempa_st.errors import SempaError

pytestmark = pytest.mark.names_dtype


def test_the_linear_layers_are_counted() -> None:
    model = make_gemma()
    linear = [module for module in model.base_model.modules() if isinstance(module, nn.Linear)]
    assert linear_parameters(model.config.to_dict()) == sum(module.weight.numel() for module in linear)


def test_every_system_embeds_every_text_once_and_takes_its_turn() -> None:
    calls: list[tuple[str, list[str]]] = []

    def system(name: str) -> Any:
        def embed(texts: Sequence[str]) -> Any:
            calls.append((name, list(texts)))
            return np.array([[float(text)] for text in texts])

        return embed

    texts = [str(number) for number in range(40)]
    seconds, vectors = run_interleaved({"a": system("a"), "b": system("b")}, texts, rounds=2)
    assert calls[:2] == [("a", texts[:32]), ("b", texts[:32])]
    assert calls[2:] == [("a", texts), ("b", texts), ("b", texts), ("a", texts)]
    assert vectors["a"].ravel().tolist() == vectors["b"].ravel().tolist() == list(range(40))
    assert all(len(rounds) == 2 for rounds in seconds.values())


def test_figures() -> None:
    found = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [1.0, 0.9]])
    assert lowest_cosine(found, 3 * found) == "1.0000000"
    assert float(lowest_cosine(found, np.ones((4, 2)))) == pytest.approx(0.5**0.5, abs=1e-6)
    assert spearman(np.concatenate([found, found[[0, 2]]]), [1.0, 3.0, 2.0]) == pytest.approx(
        100 * spearmanr([0.0, 1.9 / 2**0.5 / 1.81**0.5, 0.5**0.5], [1.0, 3.0, 2.0]).statistic
    )


def test_another_environment_is_asked_line_by_line(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, sys, numpy\n"
        "print('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    request = json.loads(line)\n"
        "    if not request['texts']: sys.exit(3)\n"
        "    numpy.save(request['output'], [[len(text), int(sys.argv[3])] for text in request['texts']])\n"
        "    print('done', flush=True)\n"
    )
    monkeypatch.setattr(peers, "_WORKER", worker)
    embed = peers.in_other_environment(sys.executable, "onnx", tiny_base, tmp_path, 7, render="<{}>".format)
    assert embed(["a", "bcd"]).tolist() == [[3, 7], [5, 7]]
    assert embed(["ef"]).tolist() == [[4, 7]]
    assert AutoModel.from_pretrained(tmp_path / "decoder").config.model_type == "llama"
    with pytest.raises(SempaError, match=r"onnx backend of .* ended with status 3"):
        embed([])


def test_our_trainings_are_timed_on_the_same_triplets_as_trls(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "EMBEDDED_BASE", str(tiny_base))
    data = NliData(load_nli("sample").triplets[:16], "triplets.parquet")
    names = ["TRL dpo", "TRL dpo, reference before", "dpo", "one-word"]
    timed = {name: training.TRAININGS[name](data, tmp_path / name.replace(" ", "-")) for name in names}
    for before, steps, losses in timed.values():
        assert before > 0
        assert steps > 0
        assert len(losses) == 2
    for name in names[1:3]:
        assert timed[name][2] == pytest.approx(timed["TRL dpo"][2], abs=1e-5)
    second = {name: losses[1] for name, (_, _, losses) in timed.items()}
    assert second["dpo"] != pytest.approx(math.log(2), abs=1e-4)  # the first step has moved the model
    assert second["one-word"] != pytest.approx(second["dpo"], abs=1e-4)


def test_a_watched_process_tells_its_own_memory() -> None:
    _, little, _ = run_watched(["-c", "import time; time.sleep(0.3)"])
    seconds, peak, private = run_watched(["-c", "import time; held = b'x' * (64 << 20); time.sleep(0.3)"])
    assert seconds > 0.3
    assert 60 < peak - little < 70
    assert 64 <= private < peak
    with pytest.raises(RuntimeError, match="ended with status"):
        run_watched(["-c", "raise SystemExit(3)"])


def test_memory_is_measured_by_a_program_that_exists() -> None:
    seconds, peak, private = run_watched([*training._PROGRAM, "train", "--help"])
    assert seconds > 0
    assert peak >= private > 0
