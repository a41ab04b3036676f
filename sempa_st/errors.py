"""The exception that the command line reports as a message with exit code 2, and a helper for messages."""

from __future__ import annotations

from collections.abc import Collection, Sequence


class SempaError(ValueError):
    """An error that the user can fix: the message names the bad value, what was expected and what to do."""


def is_panic(error: BaseException) -> bool:
    """Return whether an error is the panic of a library in Rust, such as tokenizers, which is no ``Exception``."""
    return type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def list_first(items: Sequence[object], most: int = 10) -> str:
    """Format items for an error message: the first few, then an ellipsis.

    >>> list_first(range(1, 13))
    '1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...'
    """
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")


def check_known(name: str, known: Collection[str], what: str) -> None:
    """Raise :class:`SempaError` unless ``name`` is one of the ``known`` names of a kind of thing, such as ``split``."""
    if name not in known:
        raise SempaError(f"Unknown {what} {name!r}. Expected one of: {', '.join(known) or 'none'}.")
