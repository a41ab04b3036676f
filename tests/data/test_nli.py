from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.rows import LONE_SURROGATE, write_rows
from helpers.tiny import CHAT_TEMPLATE, make_tokenizer

from sempa_st.data.nli import Triplet, load_nli
from sempa_st.data.preferences import SYSTEM_PROMPT, preference_rows
from sempa_st.data.rows import ROW_SUFFIXES
from sempa_st.errors import SempaError

TRIPLETS = [
    {"sent0": "A dog runs.", "sent1": "An animal moves.", "hard_neg": "A dog sleeps."},
    {"sent0": 'He said "yes", twice.', "sent1": "He agreed.", "hard_neg": "He refused."},
]
PAIRS = [
    {"premise": "A dog runs.", "hypothesis": "An animal moves.", "label": 0},
    {"premise": "A dog runs.", "hypothesis": "A dog plays.", "label": 1},
    {"premise": "A dog runs.", "hypothesis": "A dog sleeps.", "label": 2},
    {"premise": "A dog runs.", "hypothesis": "A dog sits.", "label": 2},
    {"premise": "A dog runs.", "hypothesis": "Nobody agreed on this one.", "label": -1},
]
LABELLED = {"A person plays.": 0, "He plays a guitar.": 1, "Nobody plays.": 2, "Left out": -1}
NAMES = ["entailment", "neutral", "contradiction", "-"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_triplets_from_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    data = load_nli(write_rows(tmp_path / f"nli{suffix}", TRIPLETS))
    assert list(data.triplets) == [Triplet(*row.values()) for row in TRIPLETS]
    assert data.skipped == 0


def test_aliases_and_neutral(tmp_path: Path) -> None:
    row = {"anchor": "a", "positive": "b", "negative": "c", "neutral": "d", "source": "x"}
    assert load_nli(write_rows(tmp_path / "a.jsonl", [row])).triplets == [Triplet("a", "b", "c", "d")]


def test_columns_of_other_names(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "b", "wrong": "c", "anchor": "x"}]
    file = write_rows(tmp_path / "a.jsonl", rows)
    names = {"anchor": "question", "positive": "answer"}
    assert load_nli(file, columns=names, pairs=True).triplets == [Triplet("a", "b", "")]
    assert load_nli(file, columns={**names, "negative": "wrong"}).triplets == [Triplet("a", "b", "c")]
    with pytest.raises(SempaError, match=r"no column 'reply', which --columns names\. Expected one of: question, ans"):
        load_nli(file, columns={"anchor": "question", "positive": "reply"}, pairs=True)
    # What is renamed is gone: without a third column these are pairs, whatever else the file holds.
    file = write_rows(tmp_path / "b.jsonl", TRIPLETS)
    data = load_nli(file, columns={"anchor": "sent0", "positive": "sent1"}, pairs=True)
    assert data.triplets == [Triplet(row["sent0"], row["sent1"], "") for row in TRIPLETS]
    assert data.is_pairs


def test_pairs_alone_are_refused_unless_asked_for(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.csv", [{"anchor": "a", "positive": "b"}, {"anchor": "c", "positive": ""}])
    with pytest.raises(SempaError, match=r"has the columns \(anchor, positive\).*Rename its columns\.$"):
        load_nli(file)
    with pytest.raises(SempaError, match=r"1 bad row.*in the columns \(anchor, positive\), in row\(s\) 2"):
        load_nli(file, pairs=True)
    data = load_nli(file, pairs=True, skip_bad_rows=True)
    assert (data.triplets, data.skipped, data.is_pairs) == ([Triplet("a", "b", "")], 1, True)
    assert not load_nli("sample", pairs=True).is_pairs


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("as_text", [True, False])
def test_labelled_pairs_become_triplets_per_premise(tmp_path: Path, suffix: str, as_text: bool) -> None:
    rows = [{**row, "label": NAMES[row["label"]].upper() if as_text else row["label"]} for row in PAIRS]
    data = load_nli(write_rows(tmp_path / f"pairs{suffix}", rows))
    assert data.triplets == [
        Triplet("A dog runs.", "An animal moves.", "A dog sleeps.", "A dog plays."),
        Triplet("A dog runs.", "An animal moves.", "A dog sits.", "A dog plays."),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"sent0": "a", "sent_1": "b", "hard_neg": "c"}],
            r"columns \(sent0, sent_1, hard_neg\)\. Expected \(sent0, sent1, hard_neg\) or \(anchor, positive, "
            r"negative\) or \(premise, hypothesis, label\)",
        ),
        ([*TRIPLETS, {**TRIPLETS[0], "sent1": "  "}, {**TRIPLETS[0], "sent0": None}], r"2 bad row.*in row\(s\) 3, 4"),
        ([{**PAIRS[0], "label": "maybe"}], r"labels other than entailment.*in row\(s\) 1"),
        ([{**PAIRS[0], "label": 7}], r"labels other than"),
        (PAIRS[:2], r"no entailed or no contradicted hypothesis, in row\(s\) 1"),
        ([*PAIRS, {"premise": "x", "hypothesis": "", "label": 0}], r"empty or null.*in row\(s\) 6"),
    ],
)
def test_bad_rows_are_refused_or_skipped(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    path = write_rows(tmp_path / "nli.jsonl", rows)
    with pytest.raises(SempaError, match=message):
        load_nli(path)


def test_skipping_counts(tmp_path: Path) -> None:
    rows = [*TRIPLETS, {**TRIPLETS[0], "sent1": ""}]
    data = load_nli(write_rows(tmp_path / "nli.jsonl", rows), skip_bad_rows=True)
    assert (len(data.triplets), data.skipped) == (2, 1)
    lonely = [*PAIRS, {"premise": "x", "hypothesis": "y", "label": 0}, {"premise": "z", "hypothesis": "", "label": 0}]
    data = load_nli(write_rows(tmp_path / "pairs.jsonl", lonely), skip_bad_rows=True)
    assert (len(data.triplets), data.skipped) == (2, 2)
    with pytest.raises(SempaError, match="no usable triplet"):
        load_nli(write_rows(tmp_path / "none.jsonl", PAIRS[:1]), skip_bad_rows=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "does not exist"),
        ("a.tsv", "x", "Unknown data|the unknown extension"),
        ("a.jsonl", '{"sent0": ', "line 1 is not JSON"),
        ("a.csv", "sent0,sent1,hard_neg\na,b,c,d\n", "row 1 has more fields than the header"),
        ("a.parquet", "no parquet", "cannot be read as parquet"),
        ("a.json", '{"sent0": 1}', "does not hold a list of rows"),
        ("a.jsonl", "", "holds no rows"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SempaError, match=message):
        load_nli(str(tmp_path / name))


def test_hub_ids_reach_the_hub_door(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(dataset: str, /, **arguments: str) -> list[dict[str, Any]]:
        calls.append((dataset, arguments))
        return TRIPLETS

    monkeypatch.setattr("sempa_st.utils.hub.hub_rows", fake)
    for source in ("princeton-nlp/datasets-for-simcse", "sentence-transformers/all-nli", "me/nli:b.csv", "me/nli:b"):
        assert len(load_nli(source).triplets) == 2
    assert calls == [
        ("princeton-nlp/datasets-for-simcse", {"split": "train", "data_files": "nli_for_simcse.csv"}),
        ("sentence-transformers/all-nli", {"split": "train", "name": "triplet"}),
        ("me/nli", {"split": "train", "data_files": "b.csv"}),
        ("me/nli", {"split": "train", "name": "b"}),
    ]


def test_the_fingerprint_follows_content_and_order(tmp_path: Path) -> None:
    one = load_nli(write_rows(tmp_path / "a.jsonl", TRIPLETS)).fingerprint()
    same = load_nli(write_rows(tmp_path / "b.csv", TRIPLETS)).fingerprint()
    turned = load_nli(write_rows(tmp_path / "c.jsonl", TRIPLETS[::-1])).fingerprint()
    assert one == same != turned


def test_preferences_use_the_bases_chat_template() -> None:
    row = preference_rows([Triplet("A dog.", "An animal.", "A cat.")], make_tokenizer(), paraphrase="keep")[0]
    assert row == {
        "prompt": [
            {"role": "system", "content": "You are a helpful assistant"},
            {
                "role": "user",
                "content": 'Keep the same meaning of this sentence: "A dog.", while making some changes.',
            },
        ],
        "chosen": [{"role": "assistant", "content": "An animal."}],
        "rejected": [{"role": "assistant", "content": "A cat."}],
    }


def test_a_template_that_refuses_system_messages_gets_none() -> None:
    picky = make_tokenizer(
        chat="{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages }}"
    )
    row = preference_rows([Triplet("a", "b", "c")], picky, paraphrase="keep")[0]
    assert [message["role"] for message in row["prompt"]] == ["user"]


def test_a_template_that_leaves_out_the_answers_is_refused() -> None:
    deaf = make_tokenizer(chat="{{ messages[0]['content'] }}")
    with pytest.raises(SempaError, match="leaves out the answers"):
        preference_rows([Triplet("a", "b", "c")], deaf, paraphrase="keep")


def test_a_template_that_cannot_be_rendered_names_the_cause() -> None:
    broken = make_tokenizer(chat="{{ raise_exception('not today') }}")
    with pytest.raises(SempaError, match=r"cannot be rendered \(TemplateError: not today\)\. Fix it") as raised:
        preference_rows([Triplet("a", "b", "c")], broken, paraphrase="keep")
    assert "not today" in str(raised.value.__cause__)


def test_a_template_sees_the_roles_and_the_system_prompt() -> None:
    asked = [(f"system,user,assistant/{SYSTEM_PROMPT}", ["system", "user"]), ("user,assistant/?", ["user"])]
    for expected, kept in asked:
        strict = make_tokenizer(
            chat="{% set seen = messages | map(attribute='role') | join(',') + '/' + messages[0]['content'] %}"
            f"{{% if seen != '{expected}' %}}{{{{ raise_exception('no') }}}}{{% endif %}}"
            "{{ messages[-1]['content'] }}"
        )
        row = preference_rows([Triplet("a", "b", "c")], strict, paraphrase="keep")[0]
        assert [message["role"] for message in row["prompt"]] == kept


def test_the_contradicted_sentence_is_rejected_where_there_is_a_neutral_one() -> None:
    for chat in (CHAT_TEMPLATE, None):
        row = preference_rows([Triplet("a", "b", "c", "n")], make_tokenizer(chat=chat), paraphrase="keep")[0]
        both = [row["chosen"], row["rejected"]]
        assert [answer[0]["content"] if chat else answer for answer in both] == ["b", "c"]


def test_an_instruction_of_the_users_own() -> None:
    text = "Schreibe {sentence} um; {andere} Klammern bleiben."
    for chat, end in ((CHAT_TEMPLATE, ""), (None, "\n")):
        row = preference_rows([Triplet("{sentence}", "b", "c")], make_tokenizer(chat=chat), paraphrase=text)[0]
        prompt = row["prompt"][-1]["content"] if chat else row["prompt"]
        assert prompt == "Schreibe {sentence} um; {andere} Klammern bleiben." + end


def test_plain_text_prompts_end_in_a_newline() -> None:
    row = preference_rows([Triplet("a", "b", "c")], make_tokenizer(chat=None), paraphrase="keep")[0]
    assert row["prompt"].endswith("some changes.\n")
    assert (row["chosen"], row["rejected"]) == ("b", "c")


@pytest.mark.parametrize("suffix", ROW_SUFFIXES)
@pytest.mark.parametrize(
    "written",
    [
        lambda number: float(number),
        lambda number: f"{number}.0",
        lambda number: f" {number}.0 ",
        lambda number: str(number),
        lambda number: None if number < 0 else float(number),
    ],
)
def test_labels_as_other_programs_write_them(tmp_path: Path, suffix: str, written: Callable[[int], Any]) -> None:
    rows = [{"premise": "A man plays.", "hypothesis": text, "label": written(n)} for text, n in LABELLED.items()]
    data = load_nli(str(write_rows(tmp_path / f"pairs{suffix}", rows)))
    assert [(t.entailed, t.neutral, t.contradicted) for t in data.triplets] == [tuple(LABELLED)[:3]]


@pytest.mark.parametrize("label", [0.5, 3, "3.0", "yes", True, [0], 10**400, float("inf"), "-2"])
def test_other_labels_are_refused_with_their_row(tmp_path: Path, label: Any) -> None:
    rows = [{"premise": "a", "hypothesis": text, "label": n} for text, n in LABELLED.items()]
    path = write_rows(tmp_path / "pairs.jsonl", [*rows, {"premise": "a", "hypothesis": "b", "label": label}])
    with pytest.raises(SempaError, match=r"labels other than entailment.*in row\(s\) 5\.|line 5 is not JSON"):
        load_nli(str(path))


def test_pairs_without_any_label_say_so(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", [{"premise": "a", "hypothesis": "b", "label": None}])
    with pytest.raises(SempaError, match="pairs without a label give none"):
        load_nli(str(path))


@pytest.mark.parametrize("half", [LONE_SURROGATE, "A cat \udfff.", "ends in \ud83d"])
@pytest.mark.parametrize("place", ["sent0", "sent1", "hard_neg", "neutral"])
def test_half_a_character_makes_a_bad_row_of_training_data(tmp_path: Path, half: str, place: str) -> None:
    row = {"sent0": "a", "sent1": "b", "hard_neg": "c", "neutral": "d"}
    path = str(write_rows(tmp_path / "rows.jsonl", [row, {**row, place: half}, row]))
    with pytest.raises(SempaError, match=r"1 bad row.*lone surrogate.*in row\(s\) 2\."):
        load_nli(path)
    data = load_nli(path, skip_bad_rows=True)
    assert (len(data.triplets), data.skipped) == (2, 1)


@pytest.mark.parametrize("column", ["sent0", "hard_neg", "neutral"])
def test_a_sentence_of_megabytes_is_a_bad_row(tmp_path: Path, column: str) -> None:
    longest = {**TRIPLETS[0], column: "x" * 1_000_000}
    path = write_rows(tmp_path / "x.jsonl", [longest, {**longest, column: "x" * 1_000_001}])
    with pytest.raises(SempaError, match=r"longer than 1,000,000 characters .* in row\(s\) 2\. Fix them"):
        load_nli(str(path))
    data = load_nli(str(path), skip_bad_rows=True)
    assert (len(data.triplets), data.skipped) == (1, 1)


def test_columns_that_are_named_come_before_those_that_are_called_so(tmp_path: Path) -> None:
    row = {"sent0": "A", "sent1": "B", "hard_neg": "C", "q": "Q", "p": "P", "n": "N"}
    file = write_rows(tmp_path / "both.jsonl", [row])
    assert load_nli(str(file)).triplets == [Triplet("A", "B", "C")]
    names = {"anchor": "q", "positive": "p", "negative": "n"}
    assert load_nli(str(file), columns=names).triplets == [Triplet("Q", "P", "N")]
