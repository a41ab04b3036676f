"""The one exception that the command line turns into a message and exit code 2."""


class SempaError(ValueError):
    """An error that the user can mend: the message names the bad value, what was expected and what to do."""
