"""The commands ``sempa push`` and ``sempa pull``."""

from __future__ import annotations

import argparse
from typing import Any

from sempa_st.cli.arguments import add_command
from sempa_st.utils.devices import DTYPES


def add(commands: Any) -> None:
    """Add ``sempa push`` and ``sempa pull``."""
    _add_push(commands)
    _add_pull(commands)


def _add_push(commands: Any) -> None:
    parser = add_command(
        commands,
        "push",
        _push,
        "Send a model to the Hugging Face Hub, after checking it as strangers will use it.",
        examples=("runs/best your-name/sempa-llama3 --dry-run", "sempa-gemma3-270m your-name/sempa --merged --private"),
        kept=lambda args: "Large files that were sent stay on the Hub. Run the same command to go on.",
    )
    parser.add_argument("model", metavar="FOLDER", help="shipped model or SemPA folder")
    parser.add_argument("repo", metavar="REPO", help="repository of the Hub, owner/name; it is made if need be")
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    parser.add_argument("--merged", action="store_true", help="send the adapter merged into its base, a whole model")
    parser.add_argument("--dry-run", action="store_true", help="check all, list the files and send nothing")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES[1:],
        help="type of merged weights, and of the comparison of the readers' vectors (default: float32)",
    )


def _add_pull(commands: Any) -> None:
    parser = add_command(
        commands,
        "pull",
        _pull,
        "Fetch a model from the Hugging Face Hub into a folder.",
        examples=("your-name/sempa-llama3", "your-name/sempa-llama3 models/llama --revision v1"),
    )
    parser.add_argument("repo", metavar="REPO", help="repository of the Hub, owner/name")
    parser.add_argument("output", metavar="FOLDER", nargs="?", help="folder to write (default: the repository's name)")
    parser.add_argument("--revision", help="branch, tag or commit (default: the newest commit)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder")


def _push(args: argparse.Namespace) -> None:
    from sempa_st.hub.push import push

    options = {name: getattr(args, name) for name in ("private", "merged", "dry_run", "dtype")}
    pushed = push(args.model, args.repo, **options)
    for name, size in pushed.files.items():
        print(f"{size:>14,}  {name}")
    print(f"Sent to {pushed.url}" if pushed.url else f"All checks pass. Nothing was sent to {args.repo}.")


def _pull(args: argparse.Namespace) -> None:
    from sempa_st.hub.push import pull

    output = args.output or args.repo.rpartition("/")[2]
    commit = pull(args.repo, output, revision=args.revision, overwrite=args.overwrite)
    print(f"Fetched {args.repo} at {commit} into {output}.")
