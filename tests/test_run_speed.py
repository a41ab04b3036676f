"""What the speed benchmark counts, and that every system embeds the same texts in the same order."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_gemma
from scipy.stats import spearmanr
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from run_speed import linear_parameters, lowest_cosine, run_interleaved, spearman


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

    texts = [str(number) for number in range(10)]
    seconds, vectors = run_interleaved({"a": system("a"), "b": system("b")}, texts, rounds=2)
    assert [(name, len(part)) for name, part in calls[2:]] == [("a", 6), ("b", 6), ("b", 4), ("a", 4)]
    assert vectors["a"].ravel().tolist() == vectors["b"].ravel().tolist() == list(range(10))
    assert all(len(parts) == 2 for parts in seconds.values())


def test_figures() -> None:
    found = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [1.0, 0.9]])
    assert lowest_cosine(found, 3 * found) == "1.0000000"
    assert float(lowest_cosine(found, np.ones((4, 2)))) == pytest.approx(0.5**0.5, abs=1e-6)
    assert spearman(np.concatenate([found, found[[0, 2]]]), [1.0, 3.0, 2.0]) == pytest.approx(
        100 * spearmanr([0.0, 1.9 / 2**0.5 / 1.81**0.5, 0.5**0.5], [1.0, 3.0, 2.0]).statistic
    )
