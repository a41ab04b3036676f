"""``sempa train``: train an adapter by preference optimisation."""

from __future__ import annotations

import argparse
from typing import Any

from sempa_st.cli.arguments import add_command
from sempa_st.training.config import TrainConfig
from sempa_st.utils.options import add_options, read_options


def add_train(commands: Any) -> None:
    """Add ``sempa train``."""
    parser = add_command(commands, "train", _train, "Train an adapter by preference optimisation on NLI data.")
    add_options(parser, TrainConfig)


def _train(args: argparse.Namespace) -> None:
    config = read_options(TrainConfig, vars(args))
    from sempa_st.training import train
    from sempa_st.training.record import run_table

    result = train(config)
    if result.is_main_process:
        print(run_table(result.record))
        print(f"Wrote {config.output} in {result.record['seconds']:.0f} s.")
