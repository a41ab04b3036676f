from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sempa_st
from sempa_st.analysis import gar
from sempa_st.analysis.data import AnalysisData
from sempa_st.analysis.gar import AlignmentRate
from sempa_st.analysis.tokens import aligned_tokens
from sempa_st.errors import SempaError

pytestmark = pytest.mark.names_dtype

Cli = Callable[..., tuple[int, str, str]]
WORDS = ["the", "a", "cat", "dog", "sleeps", "runs", "rain", "animal", "quiet", "wet"]


def rate_of(corpus: dict[str, str]) -> AlignmentRate:
    """The rate of sentences over their aligned words, on a vocabulary made by hand."""
    rate = AlignmentRate()
    for sentence, aligned in corpus.items():
        rate.add(*([WORDS.index(word) for word in words.split()] for words in (sentence, aligned)))
    return rate


def test_a_vocabulary_made_by_hand() -> None:
    rate = rate_of(
        {
            "the cat sleeps": "cat animal quiet",  # hits cat
            "the dog runs": "cat animal runs",  # hits runs; cat stands in another sentence
            "the cat runs": "cat runs wet",  # both were hit before
            "a dog": "rain the",  # hits nothing; the stands in another sentence
        }
    )
    # surface: the, cat, sleeps, dog, runs, a
    assert rate.own == pytest.approx(2 / 6)
    assert rate.anywhere == pytest.approx(3 / 6)
    assert (len(rate.surface), len(rate.aligned)) == (6, 7)


def test_the_ends_of_the_scale() -> None:
    assert rate_of({"the cat": "the cat dog", "a dog": "dog a"}).own == 1
    assert rate_of({"the cat": "animal rain", "a dog": "wet quiet"}).anywhere == 0
    with pytest.raises(SempaError, match="no tokens"):
        _ = AlignmentRate().own


def test_the_part_against_brute_force(
    run_cli: Cli, tiny_base: Path, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEMPA_DATA_DIR", raising=False)
    monkeypatch.setattr(gar, "_BLOCK", 7)
    options = ("--only", "gar", "--sentences", 40, "--k", 5, "--dtype", "float32", "--device", "cpu")
    command = ("analyze", tiny_base, adapter_folder, f"prompteol:layer=1:{tiny_base}", *options)
    code, _, err = run_cli(*command, "--output", tmp_path / "out")
    assert code == 0, err
    values = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]["gar"]
    assert (values["sentences"], values["k"]) == (40, 5)
    assert list(values["models"]) == ["tiny-llama", "tiny-sempa"]
    sentences = AnalysisData().sentences(40, 0)
    for name, folder in (("tiny-llama", tiny_base), ("tiny-sempa", adapter_folder)):
        model = sempa_st.load(folder, dtype="float32", device="cpu")
        weight = model[0].causal_lm.lm_head.weight.detach()
        top = (torch.from_numpy(model.encode(sentences)) @ weight.T).argsort(dim=1, descending=True)[:, :5].tolist()
        own = [model.tokenizer(sentence, add_special_tokens=False)["input_ids"] for sentence in sentences]
        surface = {token for tokens in own for token in tokens}
        hit = {token for tokens, aligned in zip(own, top, strict=True) for token in aligned if token in tokens}
        anywhere = {token for aligned in top for token in aligned if token in surface}
        found = values["models"][name]
        assert found["GAR"] == pytest.approx(len(hit) / len(surface))
        assert found["GAR, any sentence"] == pytest.approx(len(anywhere) / len(surface))
        assert found["surface tokens"] == len(surface)
    report = (tmp_path / "out" / "report.html").read_text()
    assert "prompteol:layer=1:tiny-llama is left out." in report


def test_a_model_of_shortened_vectors_is_left_out(run_cli: Cli, adapter_folder: Path, tmp_path: Path) -> None:
    model = sempa_st.load(adapter_folder, dtype="float32", device="cpu")
    expected = aligned_tokens(model, ["A cat sleeps."])
    model.truncate_dim = 8
    assert aligned_tokens(model, ["A cat sleeps."]) == expected  # the head reads whole vectors
    model.save_pretrained(str(tmp_path / "cut"))
    options = ("--only", "gar,tokens", "--sentences", 20, "--dtype", "float32", "--device", "cpu")
    code, _, err = run_cli("analyze", tmp_path / "cut", *options, "--output", tmp_path / "out")
    assert code == 0, err
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count("cut is left out. Its embeddings are the first 8 numbers") == 2
    model.truncate_dim = 32  # all of them
    model.save_pretrained(str(tmp_path / "whole"))
    code, _, err = run_cli("analyze", tmp_path / "whole", *options, "--output", tmp_path / "out2")
    assert code == 0, err
    assert "is left out" not in (tmp_path / "out2" / "report.html").read_text()
