"""Infinite or NaN vectors are never returned, and lone surrogates never reach a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import make_llama, make_tokenizer, save_base, save_sts
from sentence_transformers import SentenceTransformer as PlainTransformer

import sempa_st
from sempa_st.data.sts import GradedPairs
from sempa_st.errors import SempaError
from sempa_st.evaluation.encode_cache import encode_cache
from sempa_st.folder.copying import copy_model
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.model.tokenizer import install_template
from sempa_st.training.dev_score import DevScorer
from sempa_st.utils.finite import check_finite, check_texts

Cli = Callable[..., tuple[int, str, str]]
TEXTS = ["A cat sleeps.", "Why?", "Snow"]


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a base whose weights fit into float16, and whose hidden states overflow."""
    model = make_llama()
    model.model.norm.weight.data.fill_(6e4)
    return save_base(tmp_path_factory.mktemp("bases") / "overflowing", model, make_tokenizer())


@pytest.fixture(scope="module")
def overflowing_norm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a base whose hidden states are finite, and whose vectors' norms are not."""
    model = make_llama()
    model.model.norm.weight.data.fill_(1e30)
    return save_base(tmp_path_factory.mktemp("bases") / "norms", model, make_tokenizer())


@pytest.mark.parametrize("options", [{}, {"convert_to_tensor": True}, {"batch_size": 1}, {"truncate_dim": 8}], ids=str)
def test_a_norm_that_overflows_is_an_error(overflowing_norm: Path, options: dict[str, Any]) -> None:
    """Divided by an infinite norm, a vector is all zeros, which is nothing infinite."""
    model = sempa_st.load(overflowing_norm, dtype="float32", device="cpu")
    with pytest.raises(SempaError, match=r"3 of 3 vector\(s\) are zero, .*: of text 0 \('A cat sleeps.'\).* damaged"):
        model.encode(TEXTS, normalize_embeddings=True, **options)


def test_encode_names_the_row_of_a_norm_that_overflows(overflowing_norm: Path, tmp_path: Path, run_cli: Cli) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    command = ("encode", overflowing_norm, tmp_path / "texts.txt", "--output", tmp_path / "out.npy", "--normalize")
    code, _, err = run_cli(*command, "--dtype", "float32", "--device", "cpu")
    assert code == 2
    assert "3 of 3 vector(s) are zero, as of a norm beyond the range of the type: of row 1 ('A cat sleeps.')" in err


def test_encode_names_the_rows(overflowing: Path, tmp_path: Path, run_cli: Cli) -> None:
    (tmp_path / "texts.csv").write_text('s\n""\n' + "\n".join(TEXTS) + "\n")
    command = ("encode", overflowing, tmp_path / "texts.csv", "--output", tmp_path / "out.npy", "--skip-bad-rows")
    code, _, err = run_cli(*command, "--dtype", "float16", "--device", "cpu")
    assert code == 2
    assert "3 of 3 vector(s) contain infinite or NaN values: of row 2 ('A cat sleeps.'), row 3" in err
    assert "choose dtype float32" in err
    assert [path.name for path in tmp_path.iterdir()] == ["texts.csv"]
    code, _, err = run_cli(*command, "--dtype", "float32", "--device", "cpu")
    assert code == 0, err


def test_evaluate_names_the_sentences(overflowing: Path, tmp_path: Path, run_cli: Cli) -> None:
    code, out, err = run_cli(
        "evaluate", overflowing, "--tasks", "STSBenchmark", "--split", "dev", "--data-dir", save_sts(tmp_path),
        "--output", tmp_path / "out", "--dtype", "float16", "--device", "cpu",
    )  # fmt: skip
    assert (code, out) == (2, "")
    assert "contain infinite or NaN values: of text 0 (" in err


def test_a_dev_score_of_no_numbers_is_refused() -> None:
    tokenizer = make_tokenizer()
    install_template(tokenizer, EMBEDDING_TEMPLATES["prompteol"])
    scorer = DevScorer(
        GradedPairs(["a", "b"], ["c", "d"], [1.0, 2.0]),
        tokenizer,
        template="prompteol",
        max_seq_length=64,
        batch_size=2,
    )
    model = make_llama()
    assert np.isfinite(scorer(model))
    model.model.norm.weight.data[0] = torch.inf
    with pytest.raises(
        SempaError, match=r"of text 0 \('a'\).*diverged, in the tensor model.norm.weight: lower the learning rate"
    ):
        scorer(model)


def test_plain_sentence_transformers_are_watched(adapter_folder: Path) -> None:
    model = sempa_st.load(adapter_folder, reader="native", dtype="float32", device="cpu")
    assert type(model) is PlainTransformer
    assert np.isfinite(model.encode(TEXTS)).all()
    embedding = model[0].auto_model.get_input_embeddings()
    token = model.tokenizer("Snow", add_special_tokens=False)["input_ids"][0]
    embedding.weight.data[token] = torch.nan
    with pytest.raises(SempaError, match=r"^1 of 3 vector.*Snow"):
        model.encode(TEXTS)


def test_in_a_pack_the_text_at_fault_is_named(adapter_folder: Path) -> None:
    """A pack runs several texts as one row, and its mask adds: NaN times 0 is NaN, in all of them."""
    model = sempa_st.load(adapter_folder, dtype="float32", device="cpu")
    token = model.tokenizer("Snow", add_special_tokens=False)["input_ids"][0]
    model[0].model.get_input_embeddings().weight.data[token] = torch.nan
    with pytest.raises(SempaError, match=r"^1 of 30 vector\(s\).*of text 7 \('Snow'\)"):
        model.encode(["A cat sleeps."] * 7 + ["Snow"] + ["Why?"] * 22)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", [lambda v: v, torch.from_numpy, lambda v: v.astype("float16")])
def test_vectors_that_are_no_numbers_are_named(form: Callable[[Any], Any], value: float) -> None:
    vectors = np.ones((3, 4), dtype="float32")
    check_finite(form(vectors), TEXTS)
    vectors[1, 2] = value
    with pytest.raises(SempaError, match=r"^1 of 3 vector\(s\).*of text 1 \('Why\?'\)\."):
        check_finite(form(vectors), TEXTS)


def test_large_numbers_are_numbers() -> None:
    check_finite(np.full((3, 4), 3e38, dtype="float32"), TEXTS)
    check_finite(np.full((3, 4), 6e4, dtype="float16"), TEXTS)
    check_finite(np.ones((3, 4), dtype="int8"), TEXTS)


def test_scores_of_no_numbers_are_not_remembered(overflowing: Path) -> None:
    model = sempa_st.load(overflowing, dtype="float16", device="cpu")
    with encode_cache(model) as tally:
        with pytest.raises(SempaError, match="contain infinite"):
            model.encode(TEXTS)
        assert tally.encoded == 0


def test_half_a_character_is_named_by_its_place() -> None:
    check_texts(["", "😀", 3])
    with pytest.raises(SempaError, match=r"^2 of 3 text\(s\) .*: text 0 \('\\ud800'\), text 2 \("):
        check_texts(["\ud800", "b", "c\udfff"])


@pytest.mark.parametrize("scale", [1e40, 1e300])
def test_a_scale_that_overflows_is_refused(adapter_folder: Path, tmp_path: Path, scale: float) -> None:
    with pytest.raises(SempaError, match=r"takes the tensor base_model\..* beyond what its type can hold"):
        copy_model(str(adapter_folder), tmp_path / "scaled", scale=scale)
    assert not (tmp_path / "scaled").exists()


def test_merged_weights_that_overflow_are_refused(adapter_folder: Path, tmp_path: Path) -> None:
    strong = copy_model(str(adapter_folder), tmp_path / "strong", scale=1e7)
    with pytest.raises(SempaError, match=r"infinite or NaN, in the tensor .*float16"):
        copy_model(str(strong), tmp_path / "merged", merge=True, dtype="float16")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("form", [list, tuple, lambda texts: np.array(texts, dtype=object)])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"convert_to_tensor": True}, {"convert_to_numpy": False}, {"precision": "binary"}, {"precision": "uint8"},
        {"output_value": "token_embeddings"}, {"output_value": None}, {"normalize_embeddings": True}, {"batch_size": 2},
    ],
)  # fmt: skip
def test_no_kind_of_vector_leaves_that_is_no_number(
    overflowing: Path, form: Callable[[Any], Any], options: dict[str, Any]
) -> None:
    model = sempa_st.load(overflowing, dtype="float16", device="cpu")
    with pytest.raises(SempaError, match=r"infinite or NaN values: of text 0 \('A cat sleeps.'\)"):
        model.encode(form(TEXTS), **options)
    with pytest.raises(SempaError, match="infinite or NaN values"):
        model.encode(TEXTS[0], **options)
    if "output_value" not in options:
        exact, plain = (kind.encode(form(TEXTS), **options) for kind in both(overflowing))
        assert type(exact) is type(plain)
        # Integers are quantised by the range of the batch.
        close = {"atol": 1 if "precision" in options else 1e-5}
        np.testing.assert_allclose(np.stack(list(exact)), np.stack(list(plain)), **close)


def both(base: Path) -> tuple[Any, Any]:
    """Return the model in float32, and the same module in the plain SentenceTransformer class."""
    model = sempa_st.load(base, dtype="float32", device="cpu")
    return model, PlainTransformer(modules=[*model], device="cpu")


@pytest.mark.parametrize("texts", [("ok", "\ud800"), [{"text": "\ud800"}], "\ud800", {"text": "\ud800"}])
def test_no_half_character_reaches_a_tokenizer(tiny_base: Path, texts: Any) -> None:
    model = sempa_st.load(tiny_base, dtype="float32", device="cpu")
    with pytest.raises(SempaError, match="contain a lone surrogate"):
        model.encode(texts)
    with pytest.raises(SempaError, match="contain a lone surrogate"):
        model.encode(["ok"], prompt="\ud800")
