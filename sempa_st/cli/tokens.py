"""The command ``sempa tokens``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sempa_st.cli.analyze import add_models
from sempa_st.cli.arguments import add_command, add_compute_options, positive
from sempa_st.utils.tables import table


def add(commands: Any) -> None:
    """Add ``sempa tokens``."""
    parser = add_command(
        commands,
        "tokens",
        _tokens,
        "Show the vocabulary tokens that a sentence's embedding is aligned with, models side by side.",
        examples=("gemma3-270m sempa-gemma3-270m Rain", "mean:gemma3-270m gemma3-270m Rain --k 5"),
    )
    add_models(parser)
    parser.add_argument("sentence", help="the sentence")
    parser.add_argument("--k", type=positive, default=10, metavar="N", help="number of tokens (default: 10)")
    parser.add_argument("--json", action="store_true", help="print the tokens with ids and logits as JSON")
    add_compute_options(parser)


def _tokens(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from sempa_st.analysis.context import find_models
    from sempa_st.analysis.tokens import aligned_tokens
    from sempa_st.loading import load
    from sempa_st.utils.finite import check_texts

    check_texts([args.sentence])
    found = {}
    for name, chosen in find_models(args.models).items():
        model = load(chosen.model, method=chosen.method, dtype=args.dtype, device=args.device)
        (found[name],) = aligned_tokens(model, [args.sentence], k=args.k)
    if args.json:
        tokens = {name: [asdict(token) for token in own] for name, own in found.items()}
        print(json.dumps({"sentence": args.sentence, "models": tokens}, indent=2, ensure_ascii=False))
        return
    rows = [
        [rank, *(f"{token.text} ({token.logit:.2f})" for token in tokens)]
        for rank, tokens in enumerate(zip(*found.values(), strict=True), 1)
    ]
    print(table(["rank", *found], rows))
