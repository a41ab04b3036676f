"""The one exception that the command line turns into a message and exit code 2."""

from __future__ import annotations


class SempaError(ValueError):
    """An error that the user can mend: the message names the bad value, what was expected and what to do."""
