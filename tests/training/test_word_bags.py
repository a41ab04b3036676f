from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sempa_st.data.nli import load_nli
from sempa_st.training.word_bags import (
    STOP_WORDS,
    WordBags,
    content_words,
    document_frequencies,
    without_shared,
)

pytestmark = pytest.mark.names_dtype

TRIPLETS = load_nli("sample").triplets[:8]


def test_bags_of_words(tokenizer: Any) -> None:
    def first(word: str) -> int:
        return int(tokenizer(word, add_special_tokens=False)["input_ids"][0])

    sentence = "The Children slept."
    assert content_words(sentence) == ["Children", "slept"]
    assert content_words(sentence, stop_words=False) == ["The", "Children", "slept"]
    assert content_words("It's not Dário's 70% snake_case") == ["It's", "Dário's", "70", "snake", "case"]
    assert {"not", "the"} <= STOP_WORDS
    assert WordBags(tokenizer, forms="written")(sentence) == {first("Children"): 0.5, first("slept"): 0.5}
    assert WordBags(tokenizer, forms="lower")(sentence) == {first("children"): 0.5, first("slept"): 0.5}
    spellings = ["children", "Children", "slept", "Slept"]
    both: dict[int, float] = {}
    for spelling in spellings:
        both[first(spelling)] = both.get(first(spelling), 0) + 1 / len(spellings)
    assert WordBags(tokenizer)(sentence) == pytest.approx(both)
    ids = tokenizer("Children", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    assert first("slept") not in ids
    whole = WordBags(tokenizer, forms="written", tokens="all")("Children slept")
    assert [whole[token] for token in ids] == pytest.approx([0.5 / len(ids)] * len(ids))  # a word's tokens share
    kept = WordBags(tokenizer, forms="written", stop_words=False)("the of")
    assert kept == WordBags(tokenizer, forms="written")("the of")  # nothing else is left of it
    assert set(kept) == {first("the"), first("of")}
    assert WordBags(tokenizer)("?!") == {first("?!"): 1.0}
    for settings in itertools.product(("first", "all"), ("written", "lower", "both"), (True, False)):
        bagger = WordBags(tokenizer, **dict(zip(("tokens", "forms", "stop_words"), settings, strict=True)))
        for triplet in TRIPLETS:
            assert sum(bagger(triplet.entailed).values()) == pytest.approx(1)


def test_rare_words_weigh_more_with_idf(tokenizer: Any) -> None:
    sentences = ["A cat sleeps", "The Cat sat: cat!", "dogs bark"]
    counts = document_frequencies(sentences)
    assert (counts["cat"], counts["the"], counts["dogs"], counts["bird"]) == (2, 1, 1, 0)
    bag = WordBags(tokenizer, forms="lower", frequencies=counts, num_sentences=3)("cat dogs bird")
    weights = [math.log(1 + 3 / (1 + count)) for count in (2, 1, 0)]
    firsts = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("cat", "dogs", "bird")]
    assert bag == pytest.approx({token: w / sum(weights) for token, w in zip(firsts, weights, strict=True)})


def test_shared_words_tell_nothing_apart() -> None:
    assert without_shared({1: 0.5, 2: 0.25, 3: 0.25}, {1: 0.2, 4: 0.8}) == ({2: 0.5, 3: 0.5}, {4: 1.0})
    assert without_shared({1: 1.0}, {1: 0.5, 2: 0.5}) == ({1: 1.0}, {2: 1.0})


def test_a_word_is_spelt_as_it_goes_on_after_a_quote() -> None:
    """Tokenizers that mark the start of a text as the start of a word would give a lone word another first token."""
    core = Tokenizer(models.WordLevel({"[UNK]": 0, '▁"': 1, "▁cat": 2, "cat": 3}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Split(Regex(r'▁?"|▁?\w+'), behavior="isolated"),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokenizer("cat")["input_ids"] == [2]
    assert WordBags(tokenizer, forms="lower")("A cat") == {3: 1.0}
