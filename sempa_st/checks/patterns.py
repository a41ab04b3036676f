"""Regular expressions of an adapter's settings, which PEFT matches against the name of every layer."""

from __future__ import annotations

import re

_LONGEST = 2000
_MOST_REPEATS = 4
_MOST_WAYS = 16
_LETTER = re.compile(r"(?:\\d|\[(?:\\d|0-9)\])\+|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]")
"""What stands for one letter, or for one number: of that a name holds so few digits that its repeat is none."""
_REPEAT = re.compile(r"[*+}][?+]?|(?<![(*+}])\?")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_INNERMOST = re.compile(r"\((?:\?(?:[:=!]|<[=!]|P<\w+>))?([^()]*)\)")
_LITERAL = re.compile(r"[\w/-]+")
_FLAGS = re.compile(r"\(\?[a-zA-Z-]*[:)]")
"""Verbose mode, for one, lets blanks and comments stand between a group and its repeat."""


def check_pattern(text: str, most_repeats: int = _MOST_REPEATS) -> str:
    """Return a regular expression, once it is sure that matching a name against it takes a time that stays small.

    A repeat inside another one takes time that doubles with each letter, as do groups in a row of which a name fits
    two alternatives; n repeats one after another take the n-th power.

    Args:
        text: The expression.
        most_repeats: How many repeats one after another it may have.

    Raises:
        ValueError: If it is no regular expression, or may take longer; the message says what was expected.
    """
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"a name or a regular expression ({error})") from error
    if any(found[0] != "(?:" for found in _FLAGS.finditer(text)):
        raise ValueError("a name, or a regular expression without flags")
    plain = _LETTER.sub(lambda found: "/" if found[0] == r"\." else "\0", text)
    if len(text) > _LONGEST or _REPEATED_GROUP.search(plain):
        raise ValueError(f"a name, or a regular expression of no repeated group and {_LONGEST} letters at most")
    repeats, ways = _counts(_REPEAT.sub("\1", plain))
    if repeats > most_repeats:
        raise ValueError(f"a name, or a regular expression of {most_repeats} repeat(s) in a row at most")
    if ways > _MOST_WAYS:
        raise ValueError("a name, or a regular expression whose groups choose between different words")
    return text


def _counts(text: str) -> tuple[int, int]:
    """Return how many repeats, each a control character 1, a name may meet, and in how many ways groups may fit it."""
    ways = 1
    while group := _INNERMOST.search(text):
        words = group[1].split("|")
        if all(map(_LITERAL.fullmatch, words)):
            ways *= max(sum(word.startswith(other) for other in words) for word in words)
        else:
            ways *= len(words)
        text = text[: group.start()] + "\0" + "\1" * _repeats(group[1]) + text[group.end() :]
    return _repeats(text), ways


def _repeats(alternatives: str) -> int:
    return max(words.count("\1") for words in alternatives.split("|"))
