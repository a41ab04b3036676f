"""DROP (Dua et al. 2019), questions that need arithmetic over a passage, asked with solved examples.

The harness's task shows the names of the answer's fields as the answers of its examples, ends a prediction at the first
full stop ("14.5" becomes "14") and scores several spans as one: lm-evaluation-harness issue 2137. :data:`DROP_CHANGES`
mends this. The score is the official one, as the harness computes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SEPARATOR = ", "
"""Between the spans of an answer, in the examples and in predictions."""


def answers_of(row: Mapping[str, Any]) -> list[list[str]]:
    """Return the accepted answers to a question, without blank and repeated ones: each is a list of spans.

    A number or a date is one span. The first answer is the one that an example shows.

    >>> date = {"day": "", "month": "May", "year": "1990"}
    >>> no_date = dict.fromkeys(date, "")
    >>> checked = {"number": ["", "2"], "date": [no_date] * 2, "spans": [["Ann", "Bo"], []]}
    >>> answers_of({"answer": {"number": "", "date": date, "spans": []}, "validated_answers": checked})
    [['May 1990'], ['Ann', 'Bo'], ['2']]
    """
    answers = [_spans(answer) for answer in (row["answer"], *_validated(row["validated_answers"]))]
    return [list(spans) for spans in dict.fromkeys(answers) if any(spans)]


def _validated(answers: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the answers of further annotators; data sets store them as a list, or as one list per field."""
    if not isinstance(answers, Mapping):
        yield from answers
        return
    for number, date, spans in zip(answers["number"], answers["date"], answers["spans"], strict=True):
        yield {"number": number, "date": date, "spans": spans}


def _spans(answer: Mapping[str, Any]) -> tuple[str, ...]:
    if answer["number"] not in ("", None):
        return (str(answer["number"]),)
    if spans := [span for span in answer["spans"] or () if span is not None]:
        return tuple(" ".join(span.split()) for span in spans)
    date = answer["date"] or {}
    return (" ".join(filter(None, (date.get(part) for part in ("day", "month", "year")))),)


def documents(rows: Any) -> Any:
    """Turn rows of the data set into documents with ``passage``, ``question`` and ``answers``."""
    kept = ("passage", "question")
    return rows.map(
        lambda row: {**{name: row[name].strip() for name in kept}, "answers": answers_of(row)},
        remove_columns=[name for name in rows.column_names if name not in kept],
    )


def examples(rows: Any) -> Any:
    """Return the documents that an example can be made of: those with an answer."""
    return documents(rows).filter(lambda document: bool(document["answers"]))


def example_answer(document: Mapping[str, Any]) -> str:
    """Return the answer that an example shows."""
    return SEPARATOR.join(document["answers"][0]) if document["answers"] else ""


def score_prediction(document: Mapping[str, Any], predictions: Sequence[str]) -> dict[str, float]:
    """Score one prediction by DROP's official exact match and F1, the best over the accepted answers.

    F1 aligns the spans of prediction and answer one to one, compares each pair as bags of normalised words (0 if the
    answer has numbers and the prediction none of them), and averages over the larger number of spans. A prediction is
    read both as one span and as a list of spans; the better reading counts. A full stop at its end is ignored.

    >>> score_prediction({"answers": [["14.5"]]}, [" 14.50."])
    {'em': 1.0, 'f1': 1.0}
    >>> score_prediction({"answers": [["the Bears", "Jets"]]}, ["Jets, Bears, Colts"])
    {'em': 0.0, 'f1': 0.67}

    Args:
        document: One of :func:`documents`.
        predictions: The generated text, as a list of one.
    """
    from lm_eval.tasks.drop.utils import get_metrics

    text = predictions[0].strip().removesuffix(".")
    readings = [[text], text.split(SEPARATOR)]
    scores = [get_metrics(spans, answer) for spans in readings for answer in document["answers"]]
    exact, f1 = zip(*scores, strict=True) if scores else ((0.0,), (0.0,))
    return {"em": float(max(exact)), "f1": float(max(f1))}


DROP_CHANGES: dict[str, Any] = {
    "fewshot_split": "train",
    "fewshot_config": {"process_docs": examples},
    "process_docs": documents,
    "doc_to_text": "Passage: {{passage}}\nQuestion: {{question}}\nAnswer:",
    "doc_to_target": example_answer,
    "target_delimiter": " ",
    "generation_kwargs": {"until": ["\n"], "do_sample": False},
    "process_results": score_prediction,
}
"""Fields of the harness's definition of the task that are replaced."""
