"""NLI data: labelled pairs or triplets from a file, the Hub or the shipped sample, validated into records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sempa_st.data.rows import ROW_SUFFIXES, list_rows, read_rows
from sempa_st.errors import SempaError
from sempa_st.utils.assets import asset_path
from sempa_st.utils.files import is_text, lone_surrogates
from sempa_st.utils.run_info import fingerprint

_TRIPLET_COLUMNS = (("sent0", "sent1", "hard_neg"), ("anchor", "positive", "negative"))
_PAIR_COLUMNS = (("premise", "hypothesis", "label"),)
_LABELS = ("entailment", "neutral", "contradiction")
"""Names of SNLI's integer labels 0, 1 and 2; -1 marks a pair without a gold label."""
_NO_LABEL = ("", "-")
"""Texts that mark such a pair, too; where labels are missing, pandas writes the others as 0.0, 1.0 and 2.0."""
_NO_TEXT = "empty or null sentences, or ones with half a character (a lone surrogate),"
_HUB_ARGUMENTS: dict[str, dict[str, str]] = {
    "princeton-nlp/datasets-for-simcse": {"data_files": "nli_for_simcse.csv"},
    "sentence-transformers/all-nli": {"name": "triplet"},
}


@dataclass(frozen=True, slots=True)
class Triplet:
    """A premise with one entailed, one contradicted and, where known, one neutral hypothesis."""

    premise: str
    entailed: str
    contradicted: str
    neutral: str | None = None


@dataclass(frozen=True)
class NliData:
    """Validated triplets and where they came from.

    Args:
        triplets: The records, in the order of the source.
        source: The file, Hub id or ``sample`` that was read.
        skipped: Number of bad rows (or premises without a full triplet) left out.
        too_long: Number of triplets left out because their paraphrase request fills the longest training sequence.
    """

    triplets: Sequence[Triplet]
    source: str
    skipped: int = 0
    too_long: int = 0

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the triplets in order."""
        return fingerprint(asdict(triplet) for triplet in self.triplets)


def load_nli(source: str, *, skip_bad_rows: bool = False) -> NliData:
    """Load triplets from ``source``.

    Args:
        source: ``sample`` (the triplets that this package ships), a csv, jsonl, json or parquet file, or the id of a
            Hub data set, after a colon with a file or configuration name of it where it has several. Columns are
            either ``sent0, sent1, hard_neg`` (or ``anchor, positive, negative``; ``neutral`` is kept where present)
            or ``premise, hypothesis, label`` with labels as text or as SNLI's integers (0 entailment, 1 neutral,
            2 contradiction, -1 or nothing for no label; also as 0.0, 1.0, ...).
        skip_bad_rows: Leave out bad rows and count them, instead of raising.

    Raises:
        SempaError: On unknown columns or labels, empty sentences, a premise without an entailed or a contradicted
            hypothesis, or a source that cannot be read.
    """
    rows = _read_source(source)
    if not rows:
        raise SempaError(f"{source} holds no rows. Expected NLI triplets or labelled pairs.")
    columns = rows[0].keys()
    for names in _TRIPLET_COLUMNS:
        if set(names) <= set(columns):
            triplets, skipped = _from_triplets(rows, names, source, skip_bad_rows)
            break
    else:
        for names in _PAIR_COLUMNS:
            if set(names) <= set(columns):
                triplets, skipped = _from_pairs(rows, names, source, skip_bad_rows)
                break
        else:
            expected = " or ".join("(" + ", ".join(names) + ")" for names in (*_TRIPLET_COLUMNS, *_PAIR_COLUMNS))
            raise SempaError(
                f"{source} has the columns ({', '.join(map(str, columns))}). Expected {expected}. Rename its columns."
            )
    if not triplets:
        raise SempaError(
            f"{source} holds no usable triplet: {skipped} were skipped as bad, and pairs without a label give none. "
            "Check the file."
        )
    return NliData(triplets, source, skipped)


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
            f"Unknown data {source!r}. Expected 'sample', a file ending in {', '.join(ROW_SUFFIXES)}, or a Hub data "
            "set as owner/name."
        )
    from sempa_st.utils.hub import hub_rows

    arguments = _HUB_ARGUMENTS.get(name, {})
    if part:
        arguments = {"data_files": part} if Path(part).suffix.lower() in ROW_SUFFIXES else {"name": part}
    return hub_rows(name, split="train", **arguments)


def _from_triplets(
    rows: list[dict[str, Any]], names: tuple[str, str, str], source: str, skip_bad_rows: bool
) -> tuple[list[Triplet], int]:
    triplets, bad = [], []
    for number, row in enumerate(rows, 1):
        premise, entailed, contradicted = (row.get(name) for name in names)
        neutral = row.get("neutral")
        broken = isinstance(neutral, str) and lone_surrogates(neutral)
        if is_text(premise) and is_text(entailed) and is_text(contradicted) and not broken:
            triplets.append(Triplet(premise, entailed, contradicted, neutral if is_text(neutral) else None))
        else:
            bad.append(number)
    _report(bad, f"{_NO_TEXT} in ({', '.join(names)})", source, skip_bad_rows)
    return triplets, len(bad)


def _from_pairs(
    rows: list[dict[str, Any]], names: tuple[str, str, str], source: str, skip_bad_rows: bool
) -> tuple[list[Triplet], int]:
    by_premise: dict[str, dict[str, list[str]]] = {}
    first_row: dict[str, int] = {}
    empty, unknown = [], []
    for number, row in enumerate(rows, 1):
        premise, hypothesis, raw = (row.get(name) for name in names)
        label = _label(raw)
        if not (is_text(premise) and is_text(hypothesis)):
            empty.append(number)
        elif label is None:
            unknown.append(number)
        elif label:
            first_row.setdefault(premise, number)
            by_premise.setdefault(premise, {name: [] for name in _LABELS})[label].append(hypothesis)
    _report(empty, f"{_NO_TEXT} in (premise, hypothesis)", source, skip_bad_rows)
    _report(unknown, f"labels other than {', '.join(_LABELS)}, 0, 1, 2 or -1", source, skip_bad_rows)
    triplets, lacking = [], []
    for premise, hypotheses in by_premise.items():
        built = list(_combine(premise, **hypotheses))
        triplets += built
        if not built:
            lacking.append(first_row[premise])
    _report(lacking, "a premise with no entailed or no contradicted hypothesis", source, skip_bad_rows)
    return triplets, len(empty) + len(unknown) + len(lacking)


def _label(raw: Any) -> str | None:
    """Return the label's name, ``""`` for a pair without a gold label, or None for an unknown label."""
    if isinstance(raw, str):
        text = raw.strip().lower()
        if text in _LABELS:
            return text
        if text in _NO_LABEL:
            return ""
        try:
            raw = float(text)
        except ValueError:
            return None
    if raw is None or raw != raw:
        return ""
    if isinstance(raw, bool) or not isinstance(raw, int | float) or raw not in range(-1, len(_LABELS)):
        return None
    return _LABELS[int(raw)] if raw >= 0 else ""


def _combine(premise: str, entailment: list[str], neutral: list[str], contradiction: list[str]) -> Iterable[Triplet]:
    """Pair a premise's hypotheses in order, the shorter list repeating, so that every one of them is used."""
    if not entailment or not contradiction:
        return
    for index in range(max(len(entailment), len(contradiction))):
        yield Triplet(
            premise,
            entailment[index % len(entailment)],
            contradiction[index % len(contradiction)],
            neutral[index % len(neutral)] if neutral else None,
        )


def _report(numbers: list[int], what: str, source: str, skip_bad_rows: bool) -> None:
    if not numbers or skip_bad_rows:
        return
    raise SempaError(
        f"{source} has {len(numbers)} bad row(s), counted from 1 after any header: {what}, in row(s) "
        f"{list_rows(numbers)}. Mend them, or pass --skip-bad-rows to leave them out."
    )
