"""The command ``sempa encode``."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sempa_st.cli.arguments import NOTHING_KEPT, add_command, add_model_options, given, positive
from sempa_st.errors import SempaError

_STANDARD_INPUT = "-"
# Those of the package's code, which is imported when the command runs.
_PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
_KINDS = ("txt", "csv", "jsonl", "json", "parquet")


def add(commands: Any) -> None:
    """Add ``sempa encode``."""
    parser = add_command(
        commands,
        "encode",
        _encode,
        "Embed the sentences of a file.",
        examples=(
            "sempa-gemma3-270m sentences.txt --output vectors.npy",
            "runs/best reviews.csv --column text --normalize --output vectors.parquet",
            "runs/best - --input-format jsonl --column text --output vectors.npy",
            "runs/best corpus/ --column text --engine ray --output corpus-vectors",
        ),
        kept=_kept,
    )
    add_model_options(parser)
    parser.add_argument(
        "input",
        help="txt (one sentence per line), csv, jsonl, json or parquet file, a folder of such files, or - for standard "
        "input",
    )
    data = parser.add_argument_group("input and output")
    data.add_argument(
        "--output", required=True, help="npy or parquet file to write, or a folder for a parquet file per shard"
    )
    data.add_argument("--overwrite", action="store_true", help="replace the output, and another unfinished run")
    data.add_argument("--column", help="column that holds the sentences (default: the only one)")
    data.add_argument("--input-format", choices=_KINDS, help="format of standard input (default: txt)")
    data.add_argument("--skip-bad-rows", action="store_true", help="leave out and count empty sentences")
    vectors = parser.add_argument_group("vectors")
    vectors.add_argument("--normalize", action="store_true", help="scale vectors to the norm 1")
    vectors.add_argument("--truncate-dim", type=positive, metavar="N", help="keep the first N dimensions")
    vectors.add_argument(
        "--precision", default="float32", choices=_PRECISIONS, help="of the vectors (default: float32)"
    )
    prompts = vectors.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="text to put before each sentence")
    prompts.add_argument("--prompt-name", metavar="NAME", help="one of the model's own prompts, to use instead")
    large = parser.add_argument_group("large inputs")
    large.add_argument("--engine", default="local", choices=("local", "ray"), help="ray: workers of Ray Data")
    large.add_argument(
        "--workers", type=positive, metavar="N", help="Ray's workers, a model each (default: one per GPU, or CPU)"
    )
    large.add_argument(
        "--shard-size", type=positive, default=4096, metavar="N", help="rows of a shard, the unit of an interrupted run"
    )


def _encode(args: argparse.Namespace) -> None:
    from sempa_st.encoding.run import encode_file
    from sempa_st.encoding.sentences import read_sentences, standard_input

    options = given(args)
    reading = {name: options.pop(name) for name in ("column", "skip_bad_rows", "shard_size")}
    source, kind = options.pop("input"), options.pop("input_format")
    piped = source == _STANDARD_INPUT
    if kind and not piped:
        raise SempaError(f"--input-format {kind} is for standard input (-). The ending of {source} says its format.")
    if piped and args.engine == "ray":
        raise SempaError("Standard input cannot be read by Ray's workers. Write it to a file first.")
    with standard_input(kind or "txt") if piped else nullcontext(Path(source)) as path:
        sentences = read_sentences(path, **reading)
        count, width = encode_file(input=sentences, **options)
    skipped = f", {sentences.skipped} empty rows skipped" if sentences.skipped else ""
    print(f"Wrote {count} vectors of width {width} to {args.output}{skipped}.")


def _kept(args: argparse.Namespace) -> str:
    from sempa_st.encoding.shard_folder import ShardFolder

    folder = ShardFolder(args.output)
    count = folder.count_finished()
    return f"{count} shard(s) are kept in {folder.path}. Run the same command to go on." if count else NOTHING_KEPT
