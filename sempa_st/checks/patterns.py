"""Reject regular expressions in an adapter's settings that could take exponential time.

PEFT matches these expressions against the name of every layer.
"""

from __future__ import annotations

import re

_MAX_LENGTH = 2000
_MAX_REPEATS = 4
_MAX_WAYS = 16
_CHARACTER = re.compile(r"(?:\\d|\[(?:\\d|0-9)\])\+|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]")
"""One character, escape or character class, or a repeated digit: layer numbers are too short for it to matter."""
_REPEAT = re.compile(r"[*+}][?+]?|(?<![(*+}])\?")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_INNERMOST = re.compile(r"\((?:\?(?:[:=!]|<[=!]|P<\w+>))?([^()]*)\)")
_LITERAL = re.compile(r"[\w/-]+")
_FLAGS = re.compile(r"\(\?[a-zA-Z-]*[:)]")
"""Flags are refused: verbose mode, for example, allows whitespace and comments between a group and its quantifier."""


def check_pattern(text: str, max_repeats: int = _MAX_REPEATS) -> str:
    """Return a regular expression if matching it takes little time for every name.

    For names of length L, the time grows

    - exponentially with L for nested quantifiers, such as ``(a+)+``;
    - exponentially with the number of groups whose alternatives overlap, such as ``(a|ab)(a|ab)``;
    - as L^n for n quantifiers in sequence, such as ``.*a.*b``.

    Args:
        text: The expression.
        max_repeats: Maximum number of quantifiers in sequence.

    Raises:
        ValueError: If it is not a regular expression, or might take too long; the message says what was expected.
    """
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"a name or a regular expression ({error})") from error
    if any(match[0] != "(?:" for match in _FLAGS.finditer(text)):
        raise ValueError("a name, or a regular expression without flags")
    plain = _CHARACTER.sub(lambda match: "/" if match[0] == r"\." else "\0", text)
    if len(text) > _MAX_LENGTH or _REPEATED_GROUP.search(plain):
        raise ValueError(f"a name, or a regular expression of at most {_MAX_LENGTH} characters without repeated groups")
    repeats, ways = _count_repeats_and_ways(_REPEAT.sub("\1", plain))
    if repeats > max_repeats:
        raise ValueError(f"a name, or a regular expression with at most {max_repeats} quantifier(s) in sequence")
    if ways > _MAX_WAYS:
        raise ValueError("a name, or a regular expression whose groups have non-overlapping alternatives")
    return text


def _count_repeats_and_ways(text: str) -> tuple[int, int]:
    r"""Bound how many quantifiers one match can pass, and in how many ways the groups can match the same name.

    Groups are replaced from the innermost outwards by ``\0`` and the quantifiers that they contain.

    Args:
        text: The expression, with ``\1`` for each quantifier and ``\0`` for each character class.
    """
    ways = 1
    while group := _INNERMOST.search(text):
        alternatives = group[1].split("|")
        if all(map(_LITERAL.fullmatch, alternatives)):
            ways *= max(sum(one.startswith(other) for other in alternatives) for one in alternatives)
        else:
            ways *= len(alternatives)
        text = text[: group.start()] + "\0" + "\1" * _count_repeats(group[1]) + text[group.end() :]
    return _count_repeats(text), ways


def _count_repeats(text: str) -> int:
    return max(alternative.count("\1") for alternative in text.split("|"))
