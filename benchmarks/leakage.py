"""Score models on the seven STS test sets with and without the pairs that share a sentence with the training triplets.

No test pair has to be a training pair for a model to have seen one of its sentences. Sentences are compared as
:func:`words`; both sentences of a pair count, and all sentences of a triplet.

    python -m benchmarks.leakage MODEL ... --data-dir DIR --output FILE.json
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import sempa_st
from sempa_st.data.nli import Triplet, load_nli
from sempa_st.data.sts import STS_TASKS, GradedPairs, local_files, read_pairs
from sempa_st.utils.files import read_json, write_json
from sempa_st.utils.options import split_list
from sempa_st.utils.run_info import run_info
from sempa_st.utils.tables import table


def main() -> None:
    """Score the models named on the command line; finished sets of an earlier call are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="what sempa_st.load takes")
    parser.add_argument("--data-dir", required=True, help="folder with sts/*.parquet")
    parser.add_argument("--data", help="training triplets (default: nli/triplets.parquet in the data folder)")
    parser.add_argument("--tasks", default=",".join(STS_TASKS))
    parser.add_argument("--output", required=True, help="JSON file to write")
    args = parser.parse_args()
    output, data = Path(args.output), load_nli(args.data or str(Path(args.data_dir, "nli", "triplets.parquet")))
    seen = sentences_of(data.triplets)
    triplets = {"count": len(data.triplets), "sha256": data.fingerprint()}
    earlier = read_json(output) if output.is_file() else {}
    sets: dict[str, Any] = earlier["sets"] if earlier.get("triplets") == triplets else {}
    for name in args.models:
        model = sempa_st.load(name, dtype="float32", device="cpu")
        for task in split_list(args.tasks):
            pairs = read_pairs(local_files(args.data_dir, task, "test", "senteval"))
            clean = without(pairs, seen)
            found = sets.setdefault(task, {"pairs": len(pairs), "shared": len(pairs) - len(clean), "spearman": {}})
            if name not in found["spearman"]:
                vectors = dict(zip(pairs.sentences, model.encode(pairs.sentences, convert_to_tensor=True), strict=True))
                found["spearman"][name] = {"all": spearman(pairs, vectors), "without": spearman(clean, vectors)}
                write_json(output, {**run_info(), "protocol": "senteval", "triplets": triplets, "sets": sets})
    print(report(sets, args.models))


def words(text: str) -> str:
    """Return a sentence as compared: case, punctuation and white space left out.

    >>> words("A man's  dog runs .")
    'a man s dog runs'
    """
    return " ".join(re.findall(r"\w+", text.casefold()))


def sentences_of(triplets: Iterable[Triplet]) -> set[str]:
    """Return the :func:`words` of all sentences of triplets, neutral ones included."""
    return {words(sentence) for triplet in triplets for sentence in astuple(triplet) if sentence} - {""}


def without(pairs: GradedPairs, seen: set[str]) -> GradedPairs:
    """Return the pairs of which neither sentence has been seen."""
    rows = zip(pairs.first, pairs.second, pairs.scores, strict=True)
    kept = [row for row in rows if not {words(row[0]), words(row[1])} & seen]
    first, second, scores = zip(*kept, strict=True) if kept else ((), (), ())
    return GradedPairs(first, second, scores)


def spearman(pairs: GradedPairs, vectors: dict[str, Any]) -> float:
    """Return the Spearman correlation times 100 of pairs, from a vector per sentence."""
    import torch

    return pairs.spearman(torch.stack([vectors[sentence] for sentence in pairs.sentences]))


def report(sets: dict[str, Any], models: Sequence[str]) -> str:
    """Return the table of :func:`main`: per set its pairs, the shared ones, and per model both correlations."""
    columns = ["set", "pairs", "shared", *(f"{name}{part}" for name in models for part in ("", ", without"))]
    rows = []
    for task, found in sets.items():
        scores = (found["spearman"][name][part] for name in models for part in ("all", "without"))
        rows.append([task, found["pairs"], found["shared"], *scores])
    return table(columns, rows)


if __name__ == "__main__":
    main()
