from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers.generation_data import PAGES, SUBJECTS, TRUTHS, question, write_generation_data
from helpers.tiny import make_tokenizer

import sempa_st
from sempa_st.errors import SempaError
from sempa_st.evaluation.generation import GenerationEvaluator, average_share, load_tasks
from sempa_st.evaluation.generation_data import check_local_files, parse_limits, read_splits, subset
from sempa_st.evaluation.shared_prefix import SharedPrefixLM
from sempa_st.model.tokenizer import own_chat_template

Choices = list[str]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_generation_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(adapter_folder: Path) -> Any:
    return sempa_st.load(adapter_folder, dtype="float32", device="cpu")


def log_likelihood(model: Any, prompt: str, answer: str) -> float:
    """The reference: one forward pass of the model over the whole text, as a reader of the logits would write it."""
    prompt_ids, ids = model.tokenizer(prompt)["input_ids"], model.tokenizer(prompt + answer)["input_ids"]
    count = len(ids) - len(prompt_ids)
    ids = ids[-513:]
    with torch.no_grad():
        logits = model[0].model(torch.tensor([ids])).logits[0]
    chances = logits[:-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    return float(chances[-count:].sum())


def best(model: Any, prompt: str, choices: Choices) -> int:
    return max(range(len(choices)), key=lambda index: log_likelihood(model, prompt, f" {choices[index]}"))


def asked(row: dict[str, Any]) -> str:
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    return f"{row['question'].strip()}{options}\nAnswer:"


def test_mmlu_equals_a_reading_of_the_logits(model: Any, data_dir: Path) -> None:
    task = load_tasks(["mmlu"], data_dir=str(data_dir))[0]
    (score,) = GenerationEvaluator(model[0], chat=False).score(task)
    right = []
    for subject, word in SUBJECTS.items():
        examples = "".join(f"{asked(row)} {'ABCD'[row['answer']]}\n\n" for row in (question(word, n) for n in range(5)))
        head = f"The following are multiple choice questions (with answers) about {subject}.\n\n{examples}"
        rows = [question(word, number) for number in range(5, 11)]
        right += [best(model, head + asked(row), list("ABCD")) == row["answer"] for row in rows]
    assert score.score == pytest.approx(100 * sum(right) / 12)
    assert (score.task, score.metric, score.n, score.shots) == ("mmlu", "accuracy", 12, 5)
    assert score.stderr is not None
    assert score.stderr > 0


def test_truthfulqa_equals_a_reading_of_the_logits(model: Any, data_dir: Path) -> None:
    task = load_tasks(["truthfulqa_mc1"], data_dir=str(data_dir))[0]
    (score,) = GenerationEvaluator(model[0], chat=False).score(task)
    prompts = [task.subtasks["truthfulqa_mc1"].doc_to_text({"question": row[0]}) for row in TRUTHS]
    assert prompts[0].endswith("The 1992 Olympics were held in Barcelona, Spain.\n\nQ: What do cats drink?\nA:")
    right = [best(model, prompt, row[1]) == row[2].index(1) for prompt, row in zip(prompts, TRUTHS, strict=True)]
    assert score.score == pytest.approx(100 * sum(right) / 3)
    assert score.n == 3


def test_hellaswag_equals_a_reading_of_the_logits(model: Any, data_dir: Path) -> None:
    (score,) = GenerationEvaluator(model[0], chat=False).score(load_tasks(["hellaswag"], data_dir=str(data_dir))[0])
    per_letter = [
        log_likelihood(model, "Baking: A man stands. He", f" {ending}") / len(ending)
        for ending in ("eats.", "flies away.")
    ]
    likelier = per_letter.index(max(per_letter))
    assert score.score == pytest.approx(100 * [0, 1, 0].count(likelier) / 3)


def test_perplexities_equal_a_reading_of_the_logits(model: Any, data_dir: Path) -> None:
    words, tokens = GenerationEvaluator(model[0]).score(load_tasks(["wikitext"], data_dir=str(data_dir))[0])
    texts = [
        "= The lamp =\n\nA lamp gives light, and it is old.\n\n== Use ==\n\nPeople read by it at night. ",
        '= The boat =\n\nA boat lies in the harbour-side, near "the pier".\n',
    ]
    total, count = 0.0, 0
    for text in texts:
        ids = model.tokenizer(f" {text}")["input_ids"]  # the harness keeps the first blank, and predicts BOS from BOS
        with torch.no_grad():
            logits = model[0].model(torch.tensor([[1, *ids]])).logits[0]
        total += float(logits[:-1].log_softmax(-1)[range(len(ids)), ids].sum())
        count += len(ids)
    pages = [row["page"] for row in read_splits(data_dir, "wikitext")["test"]]
    assert pages == [PAGES[0].removesuffix("\n"), PAGES[1]]
    in_pages = sum(len(page.replace("\n", " ").split()) + 2 for page in pages)  # with the empty strings at both ends
    assert words.score == pytest.approx(math.exp(-total / in_pages), rel=1e-4)
    assert tokens.score == pytest.approx(math.exp(-total / count), rel=1e-4)
    assert (words.n, words.percent, tokens.metric, tokens.stderr) == (2, False, "token perplexity", None)


def test_gsm8k_reads_the_answer_off_the_text(model: Any, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []

    def answer(self: Any, requests: list[Any], **_: Any) -> list[str]:
        prompts.extend(request.args[0] for request in requests)
        return ["Easy. The answer is 11.", "It is 1200."]

    monkeypatch.setattr(SharedPrefixLM, "generate_until", answer)
    task = load_tasks(["gsm8k"], data_dir=str(data_dir))[0]
    (score,) = GenerationEvaluator(model[0], chat=False).score(task)
    assert (score.score, score.n, score.shots) == (50, 2, 8)
    assert [prompt.count("\nA:") for prompt in prompts] == [9, 9]
    assert prompts[0].endswith("Q: What is 10 + 1?\nA:")


def test_a_chat_template_is_used_on_request(
    model: Any, tiny_gemma: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sempa_st.load(tiny_gemma, dtype="float32", device="cpu")
    assert "prompteol" in plain.tokenizer.chat_template  # for embedding; it is no chat template
    assert own_chat_template(plain.tokenizer) is None
    assert own_chat_template(make_tokenizer(chat=None)) is None
    assert own_chat_template(model.tokenizer) is not None
    prompts: list[str] = []

    def answer(self: Any, requests: list[Any], **_: Any) -> list[str]:
        prompts.extend(request.args[0] for request in requests)
        return ["" for _ in requests]

    monkeypatch.setattr(SharedPrefixLM, "generate_until", answer)
    for chat in (True, False):
        evaluator = GenerationEvaluator(model[0], chat=chat)
        assert evaluator.chat == chat
        evaluator.score(load_tasks(["gsm8k"], data_dir=str(data_dir), limits={"gsm8k": 1})[0])
    assert prompts[0].count("[assistant]") == 9
    assert "[assistant]" not in prompts[1]
    with pytest.raises(SempaError, match=r"no chat template of its own\. Leave out --chat"):
        GenerationEvaluator(plain[0], chat=True)


def test_subsets_are_fixed_nested_and_in_proportion() -> None:
    sizes = {"law": 150, "art": 90, "war": 60}
    small, large = subset(sizes, 30), subset(sizes, 120)
    assert {name: len(rows) for name, rows in small.items()} == {"law": 15, "art": 9, "war": 6}
    assert all(set(small[name]) < set(large[name]) for name in sizes)
    assert small == subset(dict(reversed(sizes.items())), 30)
    assert small["law"] != list(range(15))
    assert subset({"a": 100, "b": 2}, 3).keys() == {"a"}
    assert subset({"a": 3}, 9) == subset({"a": 3}, None) == {"a": [0, 1, 2]}


def test_only_chosen_documents_are_scored(model: Any, data_dir: Path) -> None:
    tasks = load_tasks(["mmlu", "truthfulqa_mc1"], data_dir=str(data_dir), limits={"mmlu": 1, "truthfulqa_mc1": 2})
    scores = [score for task in tasks for score in GenerationEvaluator(model[0]).score(task)]
    assert [score.n for score in scores] == [1, 2]
    assert scores[0].score in (0, 100)
    assert scores[0].stderr is None
    assert average_share(scores) == pytest.approx((scores[0].score + scores[1].score) / 2)
    assert average_share(scores[:1]) is None


def test_from_the_hub_all_subjects_are_asked_for(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = []

    def rows(path: str, name: str) -> DatasetDict:
        asked_for.append((path, name))
        return DatasetDict(
            {split: Dataset.from_list([question("x", n) for n in range(5)]) for split in ("dev", "test")}
        )

    monkeypatch.setattr(datasets, "load_dataset", rows)
    task = load_tasks(["mmlu"], limits={"mmlu": 2})[0]
    assert {path for path, _ in asked_for} == {"cais/mmlu"}
    assert len({name for _, name in asked_for}) == 57
    assert [score.n for score in GenerationEvaluator(model[0], chat=False).score(task)] == [2]


def test_local_data_is_checked(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "generation"
    folder.mkdir()

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")

    with pytest.raises(SempaError, match="there: none"):
        check_local_files(tmp_path, ["mmlu"])
    write("truthfulqa_mc1", [{"question": "?", "choices": ["a", "b"], "labels": [1, 1]}])
    with pytest.raises(SempaError, match="rows 1: expected a label for each choice, 1 for one"):
        read_splits(tmp_path, "truthfulqa_mc1")
    write("truthfulqa_mc1", [{"question": "?", "choices": ["a", "b"], "labels": None}])
    with pytest.raises(SempaError, match="rows 1: expected a value in each of question, choices, labels"):
        read_splits(tmp_path, "truthfulqa_mc1")
    write("gsm8k_test", [{"question": "?"}])
    with pytest.raises(SempaError, match=r"columns \(question\). Expected \(question, answer\)"):
        read_splits(tmp_path, "gsm8k")
    rows = [{"subject": "anatomy", **question("bone", number)} for number in range(4)]
    write("mmlu_dev", rows)
    write("mmlu_test", rows)
    with pytest.raises(SempaError, match=r"has 4 examples of 'anatomy'\. Expected 5"):
        load_tasks(["mmlu"], data_dir=str(tmp_path))
    write("mmlu_dev", [{**row, "subject": "baking"} for row in rows * 2])
    write("mmlu_test", [{**row, "subject": "baking"} for row in rows])
    with pytest.raises(SempaError, match="unknown subject 'baking'"):
        load_tasks(["mmlu"], data_dir=str(tmp_path))
    write("mmlu_test", [{**rows[0], "answer": 4}])
    with pytest.raises(SempaError, match="rows 1: expected four choices"):
        read_splits(tmp_path, "mmlu")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "wikitext2.test.txt").write_text(" \n")
    with pytest.raises(SempaError, match="is empty"):
        read_splits(tmp_path, "wikitext")


def test_limits() -> None:
    assert parse_limits(None, ["mmlu", "gsm8k"]) == {"mmlu": None, "gsm8k": None}
    assert parse_limits("7", ["mmlu", "gsm8k"]) == {"mmlu": 7, "gsm8k": 7}
    assert parse_limits("7, mmlu=9", ["mmlu", "gsm8k"]) == {"mmlu": 9, "gsm8k": 7}
