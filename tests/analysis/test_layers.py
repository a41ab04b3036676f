from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import naive
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

from sempa_st.analysis import layers
from sempa_st.analysis.layers import LayerCurve, layer_cosines, layer_curve, without_adapter
from sempa_st.data.sts import GradedPairs, read_pairs
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model
from sempa_st.forward.sentence_transformers import hidden_states
from sempa_st.loading import load
from sempa_st.methods.module import MethodModule
from sempa_st.utils.assets import asset_path

pytestmark = [pytest.mark.names_dtype, pytest.mark.usefixtures("prefix_pass")]


@pytest.fixture(scope="module")
def pairs() -> GradedPairs:
    sample = read_pairs([asset_path("sts_sample.jsonl")])
    return GradedPairs(*(getattr(sample, field.name)[:16] for field in dataclasses.fields(sample)))


def cosines_of(model: Any, pairs: GradedPairs) -> np.ndarray:
    first, second = (model.encode(list(side)).astype(np.float64) for side in (pairs.first, pairs.second))
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(axis=1) / norms


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Any:
    return load(tiny_base, dtype="float32")


@pytest.fixture(scope="module")
def adapted(adapter_folder: Path) -> Any:
    return load(adapter_folder, dtype="float32")


@pytest.fixture(scope="module")
def gemma(tiny_gemma: Path) -> Any:
    return load(tiny_gemma, dtype="float32")


@pytest.mark.parametrize("name", ["base", "gemma", "adapted"])
def test_layers_are_those_of_a_manual_forward_and_the_last_is_the_embedding(
    name: str, pairs: GradedPairs, request: pytest.FixtureRequest
) -> None:
    """The manual forward runs one sentence at a time, without padding."""
    model = request.getfixturevalue(name)
    found = layer_cosines(model, pairs)
    assert found.shape == (3, len(pairs))
    np.testing.assert_allclose(found[-1], cosines_of(model, pairs), atol=1e-5)
    for score, row in zip(layer_curve("m", model, pairs).scores, found, strict=True):
        assert score == pytest.approx(100 * spearmanr(row, pairs.scores).statistic)
    states = []
    for sentence in (pairs.first[0], pairs.second[0]):
        (ids,) = model[0].token_rows([sentence])
        with torch.no_grad():
            states.append([layer[-1].double() for layer in naive.hidden_states(model[0].decoder, ids)[1:]])
    expected = [float(torch.dot(a, b) / a.norm() / b.norm()) for a, b in zip(*states, strict=True)]
    assert found[:, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_embeddings_are_kept(pairs: GradedPairs, gemma: Any) -> None:
    kept: dict[str, Any] = {}
    layer_curve("m", gemma, pairs, keep=lambda sentences, vectors: kept.update(zip(sentences, vectors, strict=True)))
    assert set(kept) == set(pairs.sentences)
    np.testing.assert_allclose(list(kept.values()), hidden_states(gemma).encode(list(kept)), atol=1e-5)


def test_an_activated_adapter_acts_on_all_of_the_template(
    pairs: GradedPairs, adapter_folder: Path, adapted: Any, tmp_path: Path
) -> None:
    activated = load(copy_model(str(adapter_folder), tmp_path / "activated", activate=True), dtype="float32")
    np.testing.assert_allclose(layer_cosines(activated, pairs), layer_cosines(adapted, pairs), atol=1e-5)


def test_inner_layers_are_those_of_the_method(pairs: GradedPairs, gemma: Any) -> None:
    found = layer_cosines(gemma, pairs)
    for layer in (1, 2, 3):
        module = MethodModule(gemma[0].model, gemma[0].tokenizer, f"prompteol:layer={layer}")
        np.testing.assert_allclose(
            found[layer - 1], cosines_of(SentenceTransformer(modules=[module]), pairs), atol=1e-5
        )


def test_without_its_adapter_a_model_is_its_base(pairs: GradedPairs, adapted: Any, base: Any) -> None:
    with_adapter, expected = layer_cosines(adapted, pairs), layer_cosines(base, pairs)
    off = without_adapter(adapted)
    assert off is not None
    with off:
        np.testing.assert_allclose(layer_cosines(adapted, pairs), expected, atol=1e-6)
    assert np.abs(with_adapter - expected).max() > 0.01
    np.testing.assert_array_equal(layer_cosines(adapted, pairs), with_adapter)
    assert without_adapter(base) is None


def test_batches_change_nothing_but_the_memory(pairs: GradedPairs, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = base
    sizes: list[int] = []
    whole = layer_cosines(model, pairs, report=sizes.append)
    assert sizes == [len(pairs)]
    monkeypatch.setattr(layers, "_BATCH_BYTES", 4 * 32 * 4 * 300)  # 300 tokens of 32 floats in 4 states
    parts: list[int] = []
    shapes: list[torch.Size] = []

    def pad_rows(*args: Any) -> Any:
        rows = real(*args)
        shapes.append(rows["input_ids"].shape)
        return rows

    monkeypatch.setattr(layers, "pad_rows", pad_rows)
    np.testing.assert_allclose(layer_cosines(model, pairs, report=parts.append), whole, atol=1e-6)
    assert sum(parts) == len(pairs)
    assert max(math.prod(shape) for shape in shapes) <= 300


real = layers.pad_rows


@pytest.mark.parametrize("name", ["base", "gemma", "adapted"])
def test_packs_change_nothing(
    name: str, pairs: GradedPairs, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = request.getfixturevalue(name)
    packed = layer_cosines(model, pairs)
    monkeypatch.setattr(layers, "can_pack_rows", lambda *args: False)
    np.testing.assert_allclose(layer_cosines(model, pairs), packed, atol=1e-5)


def test_settings_of_the_model_count(pairs: GradedPairs, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = base
    plain = layer_cosines(model, pairs)[-1]
    for name, value in (("prompts", {"q": "Question: "}), ("default_prompt_name", "q"), ("truncate_dim", 8)):
        monkeypatch.setattr(model, name, value)
    changed = layer_cosines(model, pairs)[-1]
    np.testing.assert_allclose(changed, cosines_of(model, pairs), atol=1e-5)
    assert np.abs(changed - plain).max() > 0.01


def test_the_best_layer_passes_over_those_without_a_score() -> None:
    assert LayerCurve("m", [math.nan, 30.0, 50.0, 50.0, 40.0]).best == 4


def test_a_model_of_another_kind_or_with_broken_vectors_is_refused(pairs: GradedPairs, gemma: Any) -> None:
    model = gemma  # of this module alone: the next lines break it
    method = MethodModule(model[0].model, model[0].tokenizer, "mean")
    with pytest.raises(SempaError, match="without --method"):
        layer_cosines(SentenceTransformer(modules=[method]), pairs)
    with pytest.raises(SempaError, match="too few pairs to correlate: 1"):
        layer_curve("m", model, GradedPairs(pairs.first[:1], pairs.second[:1], pairs.scores[:1]))
    with pytest.raises(SempaError, match="Every gold score is 2"):
        layer_curve("m", model, GradedPairs(pairs.first, pairs.second, [2.0] * len(pairs)))
    with torch.no_grad():
        model[0].decoder.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(SempaError, match=r"m: the cosine of pair 1 at layer 2 is nan"):
        layer_curve("m", model, pairs)
