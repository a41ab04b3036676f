"""Hooks of the documentation site: the help texts of the commands, and docstrings' cross-references as plain code."""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stdout, suppress
from typing import Any

from sempa_st.cli import main

_HELP = re.compile(r"<!-- help: ([a-z]+) -->")
_ROLE = re.compile(r":(?:func|class|data|meth|mod):(?=<code>)")
os.environ["COLUMNS"] = "100"  # the width to which argparse wraps


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put a command's help text where a page has ``<!-- help: NAME -->``."""
    return _HELP.sub(lambda found: f"```text\n{help_text(found[1])}```", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show Sphinx's cross-references (such as :func:`name`) as the name alone."""
    return _ROLE.sub("", html)


def help_text(command: str) -> str:
    """Return what ``sempa COMMAND --help`` prints."""
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):  # argparse ends the program after its help
        main([command, "--help"])
    return printed.getvalue()
