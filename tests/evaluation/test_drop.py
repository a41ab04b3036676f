from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.generation_data import DROP_VALIDATION, drop_answer, drop_row, write_drop_data, write_generation_data
from lm_eval.tasks.drop.utils import get_metrics

import sempa_st
from sempa_st.evaluation.drop import answers_of, documents, example_answer, examples, score_prediction
from sempa_st.evaluation.generation import GenerationEvaluator, load_tasks
from sempa_st.evaluation.shared_prefix import SharedPrefixLM

DATE = drop_answer(day="3", month="March", year="1990")
SCORES = [
    # Decimals: a full stop is part of the number, and 14.50 is 14.5.
    ([drop_answer(number="14.5")], "14.5", 1, 1),
    ([drop_answer(number="14.5")], " 14.50. ", 1, 1),
    ([drop_answer(number="14.5")], "14", 0, 0),
    ([drop_answer(number="14")], "14.0", 1, 1),
    ([drop_answer(number="1200")], "1,200", 1, 1),
    ([drop_answer(number="3")], "3 goals", 0, 0.67),  # precision 1/2, recall 1
    ([drop_answer(number="3")], "three goals", 0, 0),
    # One span: articles, case and punctuation do not count, and a hyphen parts words.
    ([drop_answer(spans=("the Bears",))], "Bears", 1, 1),
    ([drop_answer(spans=("24-yard goal",))], "a 24 yard field goal", 0, 0.86),  # 3 of 4, 3 of 3
    ([drop_answer(spans=("Chandler, Arizona",))], "Chandler, Arizona", 1, 1),
    ([drop_answer(spans=("24 yards",))], "25 yards", 0, 0),  # no number in common
    # Several spans: in any order; what is missing or too much counts as 0.
    ([drop_answer(spans=("Bears", "Jets"))], "Jets, Bears", 1, 1),
    ([drop_answer(spans=("Bears", "Jets"))], "Jets", 0, 0.5),
    ([drop_answer(spans=("Bears", "Jets"))], "Jets, Bears, Colts", 0, 0.67),
    ([drop_answer(spans=("Cody Ames", "Lee Ray"))], "Ames, Ray", 0, 0.67),
    # Dates
    ([DATE], "3 March 1990", 1, 1),
    ([DATE], "March 3, 1990", 0, 1),  # as one span, the same bag of words
    ([DATE], "March 1990", 0, 0.8),
    ([drop_answer(month="May", year="1991")], "May 1991.", 1, 1),
    # The best of several accepted answers; a blank one is none.
    ([drop_answer(number="5"), drop_answer(spans=("five goals",))], "five goals", 1, 1),
    ([drop_answer(number="5"), drop_answer()], "", 0, 0),
]


@pytest.mark.parametrize(("answers", "prediction", "exact", "f1"), SCORES)
def test_hand_made_scores(answers: list[Any], prediction: str, exact: float, f1: float) -> None:
    document = documents(Dataset.from_list([drop_row("?", *answers)]))[0]
    assert score_prediction(document, [prediction]) == {"em": exact, "f1": f1}


def brute_force_f1(predicted: list[set[str]], gold: list[set[str]]) -> float:
    """Try every alignment of bags of words, none of which holds a number."""
    size = max(len(predicted), len(gold))
    padded = [*predicted, *[None] * (size - len(predicted))]
    best = 0.0
    for order in itertools.permutations(padded):
        pairs = [(bag, other) for bag, other in zip(gold, order, strict=False) if other is not None]
        best = max(best, sum(2 * len(bag & other) / (len(bag) + len(other)) for bag, other in pairs) / size)
    return best


def test_f1_is_that_of_the_best_alignment() -> None:
    draw = random.Random(0)
    for _ in range(200):
        bags = [
            [set(draw.sample(["red", "blue", "tall", "cat", "dog"], draw.randint(1, 3))) for _ in range(count)]
            for count in (draw.randint(1, 4), draw.randint(1, 4))
        ]
        predicted, gold = ([" ".join(sorted(bag)) for bag in side] for side in bags)
        assert get_metrics(predicted, gold)[1] == pytest.approx(brute_force_f1(*bags), abs=0.005001)
        expected = max(brute_force_f1(bags[0], bags[1]), brute_force_f1([set.union(*bags[0])], bags[1]))
        scored = score_prediction({"answers": [gold]}, [", ".join(predicted)])
        assert scored["f1"] == pytest.approx(expected, abs=0.005001)  # the official score is rounded


def test_answers_are_read_from_both_layouts() -> None:
    row = DROP_VALIDATION[0]
    assert answers_of(row) == [["14.5"], ["14.5 metre"]]
    listed = [drop_answer(spans=("14.5 metre",)), drop_answer(number="14.5"), drop_answer()]
    assert answers_of({**row, "validated_answers": listed}) == [["14.5"], ["14.5 metre"]]
    assert answers_of({**row, "answer": {**drop_answer(), "spans": [None, "14.5 metre"]}})[0] == ["14.5 metre"]


def test_an_example_has_an_answer() -> None:
    rows = Dataset.from_list(
        [drop_row("A?", drop_answer()), drop_row("B?", drop_answer(), drop_answer(spans=("x", "y")))]
    )
    assert [example_answer(document) for document in documents(rows)] == ["", "x, y"]
    assert [document["question"] for document in examples(rows)] == ["B?"]


def test_the_task_is_scored_on_whole_predictions(
    adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the model writes, the harness keeps the line: neither less, up to a full stop, nor the next question."""
    written = {"longest": " 14.5\nPassage: x", "teams": " Jets, Bears\n\n", "move": " It was 1991"}

    def generate(self: Any, context: Any, **_: Any) -> Any:
        prompts = [self.tok_decode(row, skip_special_tokens=True) for row in context.tolist()]
        texts = [next(text for word, text in written.items() if word in prompt[-60:]) for prompt in prompts]
        ids = [self.tok_encode(text, add_special_tokens=False) for text in texts]
        width = max(map(len, ids))
        pad = self.tokenizer.pad_token_id
        return torch.cat([context, torch.tensor([[*row, *[pad] * (width - len(row))] for row in ids])], dim=1)

    monkeypatch.setattr(SharedPrefixLM, "_model_generate", generate)
    data_dir = write_drop_data(write_generation_data(tmp_path))
    evaluator = GenerationEvaluator(sempa_st.load(adapter_folder, dtype="float32", device="cpu")[0])
    (score,) = evaluator.score(load_tasks(["drop"], data_dir=str(data_dir))[0])
    # "It was 1991" against "May 1991": one of three words and one of two, 0.4
    assert score.score == pytest.approx(100 * (1 + 1 + 0.4) / 3)
    assert (score.n, score.shots, score.metric) == (3, 3, "F1")
    assert evaluator.lm.cut == 3  # the tiny model has room for 512 tokens, of which the answer may take 256
