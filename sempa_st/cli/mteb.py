"""The command ``sempa mteb``: MTEB's own command line, which knows this package's models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sempa_st.cli.arguments import add_command


def add(commands: Any) -> None:
    """Add ``sempa mteb``."""
    parser = add_command(
        commands,
        "mteb",
        _mteb,
        "MTEB's own command line, with the shipped models (sempa-st/NAME) and model folders in its registry.",
        examples=(
            "run -m sempa-st/sempa-gemma3-270m -t STSBenchmark --output-folder results",
            "run -m runs/best -b 'MTEB(eng, v2)' --output-folder results",
            "available-tasks --task-types Clustering",
            "run --help",
        ),
        kept=lambda args: "MTEB keeps the results of finished tasks; run the same command to go on.",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of mteb: a command and its options")


def _mteb(args: argparse.Namespace) -> None:
    import sys

    from sempa_st.errors import SempaError, first_line
    from sempa_st.utils.extras import require

    require("mteb", extra="eval", purpose="sempa mteb")
    from mteb.cli import main

    import sempa_st.mteb
    from sempa_st.model.patching import replaced

    models = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    models.add_argument("-m", "--model")
    model = models.parse_known_args(args.arguments)[0].model
    if model and Path(model).is_dir():
        sempa_st.mteb.register(model)
    with replaced(sys, "argv", lambda argv: ["sempa mteb", *args.arguments]):
        try:
            main()
        except (KeyError, ValueError) as error:  # mteb's errors for names that it does not know
            raise SempaError(f"mteb: {first_line(error)}") from error
