"""Load NLI data, labelled pairs or triplets, from a file, the Hub or the shipped sample, and validate it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

from sempa_st.data.rows import MAX_COLUMNS, ROW_SUFFIXES, find_columns, read_rows
from sempa_st.errors import SempaError, list_first
from sempa_st.utils.assets import asset_path
from sempa_st.utils.files import is_text
from sempa_st.utils.options import split_list
from sempa_st.utils.run_info import fingerprint

_PAIR_COLUMNS = ("premise", "hypothesis", "label")
_LAYOUTS = (("sent0", "sent1", "hard_neg"), ("anchor", "positive", "negative"), _PAIR_COLUMNS)
_PAIRS_ALONE = (("sent0", "sent1"), ("anchor", "positive"))
_NAMES = (*dict.fromkeys(name for layout in _LAYOUTS for name in layout), "neutral")
_LABELS = ("entailment", "neutral", "contradiction")
"""Names of SNLI's integer labels 0, 1 and 2; -1 marks a pair without a gold label."""
_LABEL_OF: dict[Any, str] = {**dict.fromkeys(("", "-", None, -1), ""), **{name: name for name in _LABELS}}
_LABEL_OF |= enumerate(_LABELS)
"""Names by what stands for them. Where labels are missing, pandas writes the others as 0.0, 1.0, 2.0."""
_MAX_CHARACTERS = 1_000_000
"""Longest sentence in characters; tokenizers take hundreds of bytes for each, and training cuts it off far earlier."""
_NO_TEXT = f"sentences that are empty or null, hold a lone surrogate or are longer than {_MAX_CHARACTERS:,} characters"
_HUB_ARGUMENTS: dict[str, dict[str, str]] = {
    "princeton-nlp/datasets-for-simcse": {"data_files": "nli_for_simcse.csv"},
    "sentence-transformers/all-nli": {"name": "triplet"},
}


@dataclass(frozen=True, slots=True)
class Triplet:
    """A premise with one entailed, one contradicted and, if known, one neutral hypothesis.

    In a pair alone, ``contradicted`` is empty.
    """

    premise: str
    entailed: str
    contradicted: str
    neutral: str | None = None


@dataclass(frozen=True)
class NliData:
    """Validated triplets and their source.

    Args:
        triplets: The triplets, in the order of the source.
        source: File, Hub id or ``sample`` they were read from.
        skipped: Number of bad rows, or premises without a full triplet, that were skipped.
        too_long: Number of triplets dropped because their paraphrase prompt alone reaches the maximum length.
    """

    triplets: Sequence[Triplet]
    source: str
    skipped: int = 0
    too_long: int = 0

    @property
    def is_pairs(self) -> bool:
        """Whether the data is pairs alone, without contradicted sentences."""
        return not self.triplets[0].contradicted

    def fingerprint(self) -> str:
        """Return the SHA-256 digest (hex) of the triplets, order included."""
        return fingerprint(asdict(triplet) for triplet in self.triplets)


def load_nli(
    source: str, *, skip_bad_rows: bool = False, columns: Mapping[str, str] | None = None, pairs: bool = False
) -> NliData:
    """Load triplets from ``source``.

    Args:
        source: ``sample`` (the triplets shipped with this package), a csv, jsonl, json or parquet file, or a Hub data
            set id. ``owner/name:part`` selects one file or configuration of a data set. Columns are ``sent0, sent1,
            hard_neg`` or ``anchor, positive, negative`` (an extra column ``neutral`` is used if present), or
            ``premise, hypothesis, label``. Labels are names or SNLI's integers: 0 entailment, 1 neutral,
            2 contradiction, -1 or empty for none; floats such as 1.0 are accepted.
        skip_bad_rows: Skip and count bad rows instead of raising.
        columns: The data's own names of some of these columns, such as ``{"anchor": "question"}``.
        pairs: Accept pairs alone, with the columns ``anchor, positive`` or ``sent0, sent1``, as well.

    Raises:
        SempaError: On unknown columns or labels, empty sentences, a premise without an entailed or a contradicted
            hypothesis, or a source that cannot be read.
    """
    rows = _read_source(source)
    if not rows:
        raise SempaError(f"{source} holds no rows. Expected NLI triplets or labelled pairs.")
    rows = _renamed(rows, columns or {}, source)
    layouts = (*_LAYOUTS, *(_PAIRS_ALONE if pairs else ()))
    # Names that were given come before columns that happen to be called as another layout's.
    layouts = tuple(sorted(layouts, key=lambda names: len({*(columns or {})} - {*names, "neutral"})))
    layout = find_columns(rows, layouts, source, "Rename its columns" + (", or pass --columns." if pairs else "."))
    build = _from_pairs if layout == _PAIR_COLUMNS else _from_triplets
    triplets, skipped = build(rows, layout, source, skip_bad_rows)
    if not triplets:
        raise SempaError(
            f"{source} holds no usable triplet: {skipped} bad row(s) or premise(s) were skipped, and pairs without a "
            "label give none. Check the file."
        )
    return NliData(triplets, source, skipped)


def parse_columns(text: str) -> dict[str, str]:
    """Parse names of columns.

    Args:
        text: Comma-separated ``NAME=COLUMN``: a name that :func:`load_nli` knows, and the column that has its content.

    Raises:
        SempaError: If an entry has another form, or a name is unknown or given twice.

    >>> parse_columns("anchor=question, positive=answer")
    {'anchor': 'question', 'positive': 'answer'}
    """
    columns: dict[str, str] = {}
    for entry in split_list(text) if text else []:
        name, _, column = (part.strip() for part in entry.partition("="))
        if name not in _NAMES or name in columns or not column:
            raise SempaError(
                f"columns is {text!r:.200}, with the entry {entry!r:.80}. Expected NAME=COLUMN once for each name, "
                f"such as anchor=question,positive=answer. Names: {', '.join(_NAMES)}."
            )
        columns[name] = column
    return columns


def _renamed(rows: list[dict[str, Any]], columns: Mapping[str, str], source: str) -> list[dict[str, Any]]:
    """Return the rows with their columns under the names that :func:`load_nli` knows."""
    missing = [column for column in columns.values() if column not in rows[0]]
    if missing:
        raise SempaError(
            f"{source} has no column {missing[0]!r}, which --columns names. Expected one of: "
            f"{list_first(list(rows[0]), MAX_COLUMNS)}."
        )
    if not columns:
        return rows
    taken = set(columns.values())
    return [
        {name: value for name, value in row.items() if name not in taken}
        | {name: row.get(column) for name, column in columns.items()}
        for row in rows
    ]


def _read_source(source: str) -> list[dict[str, Any]]:
    if source == "sample":
        return read_rows(asset_path("nli_sample.jsonl"))
    if (Path(source).suffix.lower() in ROW_SUFFIXES and ":" not in source) or Path(source).exists():
        return read_rows(source)
    return _read_hub(source)


def _read_hub(source: str) -> list[dict[str, Any]]:
    name, _, part = source.partition(":")
    if name.count("/") != 1:
        raise SempaError(
            f"Unknown data {source!r}. Expected 'sample', a file with extension {', '.join(ROW_SUFFIXES)}, or a Hub "
            "data set as owner/name."
        )
    from sempa_st.utils.hub import hub_rows

    arguments = _HUB_ARGUMENTS.get(name, {})
    if part:
        arguments = {"data_files": part} if Path(part).suffix.lower() in ROW_SUFFIXES else {"name": part}
    return hub_rows(name, split="train", **arguments)


def _from_triplets(
    rows: list[dict[str, Any]], columns: tuple[str, ...], source: str, skip_bad_rows: bool
) -> tuple[list[Triplet], int]:
    triplets, bad_rows = [], []
    for number, row in enumerate(rows, 1):
        sentences: list[Any] = [row.get(column) for column in columns]
        neutral = row.get("neutral")
        broken = isinstance(neutral, str) and bool(neutral.strip()) and not _is_sentence(neutral)
        if all(map(_is_sentence, sentences)) and not broken:
            premise, entailed, contradicted = sentences if len(columns) > 2 else [*sentences, ""]
            triplets.append(Triplet(premise, entailed, contradicted, neutral if _is_sentence(neutral) else None))
        else:
            bad_rows.append(number)
    _report(bad_rows, f"{_NO_TEXT} in the columns ({', '.join(columns)})", source, skip_bad_rows)
    return triplets, len(bad_rows)


def _from_pairs(
    rows: list[dict[str, Any]], columns: tuple[str, ...], source: str, skip_bad_rows: bool
) -> tuple[list[Triplet], int]:
    by_premise: dict[str, dict[str, list[str]]] = {}
    first_row: dict[str, int] = {}
    empty, unknown = [], []
    for number, row in enumerate(rows, 1):
        premise, hypothesis, raw = (row.get(column) for column in columns)
        label = _label(raw)
        if not (_is_sentence(premise) and _is_sentence(hypothesis)):
            empty.append(number)
        elif label is None:
            unknown.append(number)
        elif label:
            first_row.setdefault(premise, number)
            by_premise.setdefault(premise, {known: [] for known in _LABELS})[label].append(hypothesis)
    _report(empty, f"{_NO_TEXT} in the columns (premise, hypothesis)", source, skip_bad_rows)
    _report(unknown, f"labels other than {', '.join(_LABELS)}, 0, 1, 2 or -1", source, skip_bad_rows)
    triplets, incomplete = [], []
    for premise, hypotheses in by_premise.items():
        combined = list(_combine(premise, **hypotheses))
        triplets += combined
        if not combined:
            incomplete.append(first_row[premise])
    _report(incomplete, "a premise with no entailed or no contradicted hypothesis", source, skip_bad_rows)
    return triplets, len(empty) + len(unknown) + len(incomplete)


def _is_sentence(value: Any) -> TypeGuard[str]:
    return is_text(value) and len(value) <= _MAX_CHARACTERS


def _label(raw: Any) -> str | None:
    """Return the label's name, ``""`` for a pair without a gold label, or None if the label is unknown."""
    if isinstance(raw, str):
        raw = raw.strip().lower()
        with suppress(ValueError):
            raw = float(raw)
    if isinstance(raw, float) and math.isnan(raw):
        return ""
    known = isinstance(raw, str | int | float | None) and not isinstance(raw, bool)
    return _LABEL_OF.get(raw) if known else None


def _combine(premise: str, entailment: list[str], neutral: list[str], contradiction: list[str]) -> Iterable[Triplet]:
    """Yield triplets of a premise that use each of its hypotheses; the shorter lists are repeated."""
    if not entailment or not contradiction:
        return
    for index in range(max(len(entailment), len(contradiction))):
        yield Triplet(
            premise,
            entailment[index % len(entailment)],
            contradiction[index % len(contradiction)],
            neutral[index % len(neutral)] if neutral else None,
        )


def _report(numbers: list[int], fault: str, source: str, skip_bad_rows: bool) -> None:
    """Raise :class:`SempaError` if there are bad rows that must not be skipped."""
    if not numbers or skip_bad_rows:
        return
    raise SempaError(
        f"{source} has {len(numbers)} bad row(s), counted from 1 without the header: {fault}, in row(s) "
        f"{list_first(numbers)}. Fix them, or pass --skip-bad-rows to skip them."
    )
