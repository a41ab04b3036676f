from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny import save_sts
from scipy.stats import bootstrap, spearmanr
from sentence_transformers.util import pairwise_cos_sim

import sempa_st
from sempa_st.data.sts import dev_pairs, read_pairs
from sempa_st.errors import SempaError
from sempa_st.evaluation import significance
from sempa_st.evaluation.significance import compare_cosines, sets_at_hand

Cli = Callable[..., tuple[int, str, str]]


def graded(pairs: int, seed: int, noises: tuple[float, float] = (2.0, 1.0)) -> tuple[Any, Any, Any]:
    """Return grades and the cosines of two models, with ties in all three."""
    rng = np.random.default_rng(seed)
    grades = rng.integers(0, 6, pairs).astype(float)
    return grades, *(np.round(grades + rng.normal(0, noise, pairs), 1) for noise in noises)


def spearman(values: Any, grades: Any) -> float:
    return 100 * float(spearmanr(values, grades).statistic)


def test_interval_and_p_value_equal_a_loop_and_scipys() -> None:
    grades, first, second = graded(60, 0, (1.5, 1.4))
    (result,) = compare_cosines({"a": grades}, [first], [second], resamples=150, seed=7)
    rng = np.random.default_rng([7, 0])
    draws = [rng.integers(0, 60, 60) for _ in range(150)]
    loop = [spearman(second[draw], grades[draw]) - spearman(first[draw], grades[draw]) for draw in draws]
    assert [result.low, result.high] == pytest.approx(np.percentile(loop, [2.5, 97.5]), abs=1e-9)
    below, above = sum(value <= 0 for value in loop), sum(value >= 0 for value in loop)
    assert 3 < min(below, above) < 72  # neither extreme
    assert result.p_value == pytest.approx(2 * (1 + min(below, above)) / 151)
    scipys = bootstrap(
        (first, second, grades),
        lambda one, other, given: spearman(other, given) - spearman(one, given),
        paired=True,
        vectorized=False,
        n_resamples=150,
        method="percentile",
        random_state=np.random.default_rng([7, 0]),
    )
    assert [result.low, result.high] == pytest.approx(list(scipys.confidence_interval), abs=1e-9)
    assert (result.first, result.second) == pytest.approx((spearman(first, grades), spearman(second, grades)))
    assert result.difference == pytest.approx(result.second - result.first)


def test_the_mean_is_over_sets_that_are_resampled_independently(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {name: graded(size, seed) for seed, (name, size) in enumerate({"a": 40, "b": 90}.items())}
    grades = {name: values[0] for name, values in sets.items()}
    cosines = [[values[model] for values in sets.values()] for model in (1, 2)]
    *each, mean = compare_cosines(grades, *cosines, resamples=200, seed=1)
    differences = np.zeros(200)
    for number, (given, first, second) in enumerate(sets.values()):
        rng = np.random.default_rng([1, number])
        for index in range(200):
            draw = rng.integers(0, len(given), len(given))
            differences[index] += (spearman(second[draw], given[draw]) - spearman(first[draw], given[draw])) / 2
    assert (mean.task, mean.pairs) == ("mean", 130)
    assert mean.difference == pytest.approx(np.mean([result.difference for result in each]))
    assert [mean.low, mean.high] == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=1e-9)
    monkeypatch.setattr(significance, "_CELLS", 500)  # in chunks, the same numbers
    assert compare_cosines(grades, *cosines, resamples=200, seed=1)[-1] == mean
    assert compare_cosines(grades, *cosines, resamples=200, seed=2)[-1] != mean


def test_p_values_of_equal_models_and_of_clear_differences() -> None:
    grades, first, second = graded(300, 3, (4.0, 0.5))
    equal, clear = (compare_cosines({"a": grades}, [first], [o], resamples=99, seed=0)[0] for o in (first, second))
    assert (equal.difference, equal.low, equal.high, equal.p_value) == (0, 0, 0, 1)
    assert clear.low > 0
    assert clear.p_value == pytest.approx(2 / 100)
    turned = compare_cosines({"a": grades}, [second], [first], resamples=99, seed=0)[0]
    assert (turned.low, turned.high, turned.p_value) == pytest.approx((-clear.high, -clear.low, clear.p_value))


def test_p_values_of_models_of_one_quality_are_spread_evenly() -> None:
    """Under the null hypothesis, about one comparison in five has p below 0.2."""
    results = [
        compare_cosines({"a": given}, [first], [second], resamples=200, seed=0)[0].p_value
        for given, first, second in (graded(150, seed, (1.5, 1.5)) for seed in range(150))
    ]
    assert 0.1 < np.mean(np.array(results) < 0.2) < 0.3  # 0.2, with a standard deviation of 0.033


def test_pairs_that_cannot_be_resampled_are_refused() -> None:
    with pytest.raises(SempaError, match="a cannot be compared: in some resample of its 3 pairs"):
        compare_cosines({"a": np.array([1.0, 2, 3])}, [np.arange(3.0)], [np.arange(3.0)], resamples=500, seed=0)
    grades, first, _ = graded(50, 0)
    with pytest.raises(SempaError, match="all cosines are equal"):
        compare_cosines({"a": grades}, [first], [np.ones(50)], resamples=5, seed=0)


def test_the_sets_at_hand(tmp_path: Path) -> None:
    data_dir = str(save_sts(tmp_path))
    assert list(sets_at_hand(None, "dev", data_dir)) == ["STSBenchmark", "SICK-R"]
    assert len(sets_at_hand(None, "test", data_dir)) == 7
    assert list(sets_at_hand("SICK-R, STS12", "test", data_dir)) == ["SICK-R", "STS12"]
    assert len(sets_at_hand("SICK-R", "test", data_dir)["SICK-R"]) == len(
        read_pairs([tmp_path / "sts" / "sickr.test.parquet"])  # SentEval's rows, not MTEB's
    )
    assert list(sets_at_hand(None, "test", None)) == ["sample"]
    with pytest.raises(SempaError, match="no test split of any STS set in /nowhere"):
        sets_at_hand(None, "test", "/nowhere")
    with pytest.raises(SempaError, match="cannot hold the task 'STS99'"):
        sets_at_hand("STS99", "test", data_dir)
    with pytest.raises(SempaError, match="STS12 are in no data folder"):
        sets_at_hand("STS12", "test", None)
    with pytest.raises(SempaError, match="Unknown split 'train'"):
        sets_at_hand(None, "train", data_dir)


def test_the_command_compares_two_models(
    run_cli: Cli, tiny_base: Path, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEMPA_DATA_DIR", raising=False)
    command = ("compare", tiny_base, adapter_folder, "--resamples", 50, "--dtype", "float32", "--device", "cpu")
    code, out, err = run_cli(*command)
    assert code == 0, err
    header, _, row, note = out.splitlines()
    assert header.split() == ["set", "pairs", "tiny-llama", "tiny-sempa", "difference", "95%", "interval", "p"]
    pairs = dev_pairs("sample", None)
    expected = []
    for model in (tiny_base, adapter_folder):
        loaded = sempa_st.load(model, dtype="float32", device="cpu")
        sides = (loaded.encode(list(side), convert_to_tensor=True) for side in (pairs.first, pairs.second))
        expected.append(spearman(pairwise_cos_sim(*sides), pairs.scores))
    assert row.split()[:5] == ["sample", str(len(pairs)), *(f"{v:.2f}" for v in (*expected, expected[1] - expected[0]))]
    assert "50 resamples, seed 0" in note
    code, out, err = run_cli(*command, "--json")
    assert code == 0, err
    assert str(tiny_base.parent) not in out
    (result,) = json.loads(out)["results"]
    assert result["difference"] == pytest.approx(expected[1] - expected[0], abs=1e-4)
    assert sempa_st.compare is significance.compare


def test_bad_requests(run_cli: Cli, tiny_base: Path) -> None:
    for flags, message in (
        (["no-such-model"], "no-such-model"),
        ([tiny_base, "--resamples", "0"], "not a number above 0"),
        ([tiny_base, "--seed", "-1"], "--seed is -1. Expected 0 or more"),
        ([tiny_base, "--data-dir", "/nowhere"], "no test split of any STS set in /nowhere"),
    ):
        code, _, err = run_cli("compare", tiny_base, *flags)
        assert code == 2
        assert message in err
        assert "Traceback" not in err
