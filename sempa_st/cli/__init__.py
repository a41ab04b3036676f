"""The command line ``sempa``: the parser in ``main``, and one file a command."""

from sempa_st.cli.main import build_parser, main

__all__ = ["build_parser", "main"]
