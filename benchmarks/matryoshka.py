"""Score models on STS-B dev by the width of the embedding, in float32, in int8 and by the sign of each component.

The sentences are embedded once, in full. A shorter vector is the beginning of the full one; int8 ranges are those of
all sentences; binary vectors are compared by the number of bits in which they differ.

    python -m benchmarks.matryoshka MODEL ... --widths 640,320,160,80 --data-dir DIR --output FILE.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from sentence_transformers.util import quantize_embeddings

import sempa_st
from sempa_st.data.sts import GradedPairs, dev_pairs
from sempa_st.errors import SempaError
from sempa_st.utils.files import write_json
from sempa_st.utils.options import split_list
from sempa_st.utils.run_info import run_info
from sempa_st.utils.tables import table

PRECISIONS = ("float32", "int8", "binary")
_DECIMALS = 6
"""Binary vectors of 4096 components have cosines 0.0005 apart."""


def main() -> None:
    """Score the models named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="what sempa_st.load takes")
    parser.add_argument("--widths", default="640,320,160,80")
    parser.add_argument("--data-dir", help="folder with sts/stsb.dev.parquet (default: the Hub)")
    parser.add_argument("--dev", default="stsb", help="as in sempa train")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", required=True, help="JSON file to write")
    args = parser.parse_args()
    widths, pairs = [int(width) for width in split_list(args.widths)], dev_pairs(args.dev, args.data_dir)
    scores: dict[str, Any] = {}
    for name in args.models:
        model = sempa_st.load(name, dtype=args.dtype)
        vectors = model.encode(pairs.sentences, convert_to_numpy=True)
        scores[Path(name).name] = by_width(pairs, np.asarray(vectors), widths)
        write_json(Path(args.output), {**run_info(), "dev": args.dev, "dtype": args.dtype, "scores": scores})
    print(report(scores))


def by_width(pairs: GradedPairs, vectors: np.ndarray, widths: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return the Spearman correlation times 100 by width and precision.

    Args:
        pairs: Graded pairs.
        vectors: Embeddings of their sentences, of shape (sentences, hidden).
        widths: Numbers of leading components to keep.

    Raises:
        SempaError: If a width is larger than the embedding.
    """
    if max(widths) > vectors.shape[1]:
        raise SempaError(f"The width {max(widths)} is larger than the embedding, {vectors.shape[1]}. Leave it out.")
    return {
        str(width): {kind: spearman(pairs, compared(vectors[:, :width], kind)) for kind in PRECISIONS}
        for width in widths
    }


def spearman(pairs: GradedPairs, vectors: torch.Tensor) -> float:
    """Return the Spearman correlation times 100 of cosines with the grades; cosines that differ by rounding are equal.

    Binary vectors of a width have few different cosines, and many pairs that share one.
    """
    return 100 * float(spearmanr(pairs.cosines(vectors).round(decimals=_DECIMALS), pairs.scores).statistic)


def compared(vectors: np.ndarray, precision: str) -> torch.Tensor:
    """Return vectors in a precision of :data:`PRECISIONS`, as float32, so that their cosine ranks pairs.

    Binary ones are +1 and -1, whose cosine is 1 - 2 (differing bits) / width.
    """
    if precision == "float32":
        return torch.from_numpy(vectors).float()
    quantised: Any = quantize_embeddings(vectors, precision=precision)
    if precision == "binary":
        bits = np.unpackbits((quantised.astype(np.int16) + 128).astype(np.uint8), axis=1)[:, : vectors.shape[1]]
        quantised = 2.0 * bits - 1
    return torch.from_numpy(quantised).float()


def report(scores: dict[str, dict[str, dict[str, float]]]) -> str:
    """Format the scores as a table with a row for each model and width."""
    rows = [
        [name, int(width), *(row[kind] for kind in PRECISIONS)]
        for name, widths in scores.items()
        for width, row in widths.items()
    ]
    return table(["model", "width", *PRECISIONS], rows)


if __name__ == "__main__":
    main()
