"""Regular expressions of an adapter's settings, which PEFT matches against the name of every layer."""

from __future__ import annotations

import re
from itertools import permutations

_LONGEST = 2000
_MOST_REPEATS = 5
_MOST_WAYS = 16
_DIGIT = re.compile(r"\[(?:\\d|0-9)\]")
_ESCAPE = re.compile(r"\\.")
_REPEAT = re.compile(r"[*+}][?+]?|(?<![(*+}])\?")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_INNERMOST = re.compile(r"\((?:\?(?:[:=!]|<[=!]|P<\w+>))?([^()]*)\)")
_LITERAL = re.compile(r"[\w/-]+")


def check_pattern(text: str) -> None:
    """Check that matching a name against a regular expression takes a time that stays small.

    A repeat inside another one takes time that doubles with each letter, as do groups in a row of which a name fits
    two alternatives; n repeats one after another take the n-th power.

    Raises:
        ValueError: If it is no regular expression, or may take longer; the message says what was expected.
    """
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"a name or a regular expression ({error})") from error
    plain = _ESCAPE.sub("\0", _DIGIT.sub("\0", text).replace(r"\.", "/"))
    repeats = len(_REPEAT.findall(plain))
    if len(text) > _LONGEST or "[" in plain or _REPEATED_GROUP.search(plain) or repeats > _MOST_REPEATS:
        raise ValueError(
            f"a name, or a regular expression of no classes of letters, no repeated group, {_MOST_REPEATS} repeats at "
            f"most and {_LONGEST} letters"
        )
    if _ways(plain) > _MOST_WAYS:
        raise ValueError("a name, or a regular expression whose groups choose between different words")


def _ways(text: str) -> int:
    """Return in how many ways the groups of an expression may fit the same name."""
    ways = 1
    while group := _INNERMOST.search(text):
        alternatives = group[1].split("|")
        differ = all(map(_LITERAL.fullmatch, alternatives)) and not any(
            second.startswith(first) for first, second in permutations(alternatives, 2)
        )
        ways *= 1 if differ else len(alternatives)
        text = text[: group.start()] + "\0" + text[group.end() :]
    return ways
