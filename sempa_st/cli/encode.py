"""The command ``sempa encode``."""

from __future__ import annotations

import argparse
from typing import Any

from sempa_st.cli.arguments import add_command, add_model_options, given


def add(commands: Any) -> None:
    """Add ``sempa encode``."""
    parser = add_command(
        commands,
        "encode",
        _encode,
        "Embed the sentences of a file.",
        examples=(
            "sempa-gemma3-270m sentences.txt --output vectors.npy",
            "runs/best reviews.csv --column text --output vectors.parquet",
        ),
    )
    add_model_options(parser)
    parser.add_argument("input", help="txt (one sentence per line), csv, jsonl, json or parquet file")
    data = parser.add_argument_group("input and output")
    data.add_argument("--output", required=True, help="npy or parquet file to write")
    data.add_argument("--column", help="column that holds the sentences (default: the only one)")
    data.add_argument("--skip-bad-rows", action="store_true", help="leave out and count empty sentences")


def _encode(args: argparse.Namespace) -> None:
    from sempa_st.encoding import encode_file, read_sentences

    options = given(args)
    reading = {name: options.pop(name) for name in ("column", "skip_bad_rows")}
    sentences = read_sentences(options.pop("input"), **reading)
    count, width = encode_file(input=sentences, **options)
    skipped = f", {sentences.skipped} empty rows skipped" if sentences.skipped else ""
    print(f"Wrote {count} vectors of width {width} to {args.output}{skipped}.")
