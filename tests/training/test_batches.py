from __future__ import annotations

import pytest
import torch
from helpers.tiny import make_llama, make_tokenizer

from sempa_st.data.nli import Triplet
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.model.tokenizer import install_template
from sempa_st.training.batches import AnswerInputs, EmbeddingInputs
from sempa_st.training.word_bags import (
    WordBags,
    without_shared,
)

pytestmark = pytest.mark.names_dtype


def test_embedding_inputs_hold_what_their_names_say() -> None:
    tokenizer = make_tokenizer()
    install_template(tokenizer, EMBEDDING_TEMPLATES["prompteol"])
    module = PromptEOL(make_llama(), tokenizer)
    triplets = [
        Triplet("A cat sleeps.", "A cat rests.", "A cat runs.", "A big cat."),
        Triplet("A dog barks.", "A dog is loud.", "A dog is silent."),
        Triplet("A cat sleeps.", "An animal sleeps.", "A cat eats."),
    ]
    bagger = WordBags(tokenizer)
    candidates = ("entailed", "contradicted", "neutral")
    make = EmbeddingInputs(module, ("premise", "entailed"), candidates, bagger, pairwise=True)
    batch = make(triplets)
    assert batch["same_premise"].int().tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert batch["has_neutral"].tolist() == [True, False, False]
    read = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert read == module.token_rows([t.premise for t in triplets] + [t.entailed for t in triplets])

    def bags(name: str) -> list[dict[int, float]]:
        return [
            {int(word): float(w) for word, w in zip(batch["words"], weights, strict=True) if w}
            for weights in batch[name]
        ]

    found = bags("bags")
    expected = [bagger(t.entailed) for t in triplets] + [bagger(t.contradicted) for t in triplets]
    assert found[:6] == [pytest.approx(bag) for bag in expected]
    assert found[6] == pytest.approx(bagger("A big cat."))
    pairs = bags("pair_bags")
    assert not any(pairs[row].keys() & pairs[3 + row].keys() for row in range(3))
    assert pairs[3] == pytest.approx(without_shared(bagger("A cat rests."), bagger("A cat runs."))[1])


def test_answer_inputs_repeat_the_last_answer_of_a_shorter_ranking() -> None:
    three, two = ["A cat rests.", "A big cat.", "A cat runs."], ["A dog.", "Cats."]
    make = AnswerInputs(make_tokenizer(), [("A cat.\n", three), ("A dog.\n", two)], num_answers=3, max_length=100)
    batch = make([0, 1])
    assert batch["answer_counts"].tolist() == [3, 2]
    tokens, mask = batch["answer_input_ids"], batch["answer_mask"]
    assert len(tokens) == 6
    assert tokens[4].tolist() == tokens[5].tolist() != tokens[3].tolist()
    answers = [
        make.tokenizer.decode(row[shown], skip_special_tokens=True) for row, shown in zip(tokens, mask, strict=True)
    ]
    assert [answer.strip() for answer in answers] == [*three, *two, two[-1]]


def test_answer_inputs_for_two_answers_take_the_first_and_the_last() -> None:
    ranked = ["A cat rests.", "A big cat.", "A cat runs."]
    tokenizer = make_tokenizer()
    batch = AnswerInputs(tokenizer, [("A cat sleeps.\n", ranked)], num_answers=2, max_length=100)([0])
    expected = AnswerInputs(tokenizer, [("A cat sleeps.\n", [ranked[0], ranked[2]])], num_answers=2, max_length=100)(
        [0]
    )
    assert batch["answer_counts"].tolist() == [2]
    assert torch.equal(batch["answer_input_ids"], expected["answer_input_ids"])
