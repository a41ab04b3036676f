"""Compare the vectors of two versions of the package, bit for bit.

    python -m benchmarks.checks.vectors --save before.npz        # at the one version
    python -m benchmarks.checks.vectors --compare before.npz     # at the other, on the same machine

Both runs embed 200 sentences with the two shipped models (with our module and, where there is one, as plain
sentence-transformers opens them) and with each method on the base, in float32 on one CPU thread; the digests of the
shipped adapters are compared too. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SENTENCES = 200
LOADED = [
    ("sempa-gemma3-270m", {}),
    ("sempa-gemma3-270m", {"reader": "native"}),
    ("sempa-gemma3-270m-activated", {}),
    ("gemma3-270m", {}),
]
METHODS = [
    "mean",
    "last-token",
    "prompteol",
    "pretended-cot",
    "knowledge-enhancement",
    "echo",
    "contrastive-prompting",
    "token-prepending",
    "llm2vec",
]
ENCODER_METHODS = ["bert-avg", "promptbert"]


def sentences() -> list[str]:
    """Return sentences of the package's sample, which is the same in both versions."""
    import sempa_st

    sample = next(Path(sempa_st.__file__).parent.glob("*/nli_sample.jsonl"))
    rows = [json.loads(line) for line in sample.read_text(encoding="utf-8").splitlines()]
    texts = [str(value) for row in rows for value in row.values() if isinstance(value, str) and " " in value]
    return list(dict.fromkeys(texts))[:SENTENCES]


def all_vectors(encoder: str | None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the vectors of each model."""
    import sempa_st

    texts = sentences()
    loads = LOADED + [("gemma3-270m", {"method": method}) for method in METHODS]
    loads += [(encoder, {"method": method}) for method in ENCODER_METHODS if encoder]
    for name, options in loads:
        model = sempa_st.load(name, dtype="float32", device="cpu", **options)
        label = " ".join([Path(name).name, *map(str, options.values())])
        yield label, model.encode(texts, show_progress_bar=False)
        print(label, flush=True)


def adapter_digests() -> dict[str, str]:
    """Return the digest of each file of the adapters that the package ships."""
    import sempa_st

    folders = Path(sempa_st.__file__).parent.glob("*/models")
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {"/".join(path.parts[-2:]): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> int:
    """Save the vectors, or compare them with saved ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--save", type=Path)
    group.add_argument("--compare", type=Path)
    parser.add_argument("--encoder", help="a BERT-like folder, for the methods of encoders")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    vectors = dict(all_vectors(args.encoder))
    digests = adapter_digests()
    if args.save:
        np.savez(args.save, digests=json.dumps(digests), **vectors)
        return 0
    before = np.load(args.compare)
    different = 0
    for name in before.files:
        if name == "digests":
            same, largest = json.loads(str(before[name])) == digests, 0.0
        else:
            same = np.array_equal(before[name], vectors[name])
            largest = float(np.abs(before[name] - vectors[name]).max())
        different += not same
        print(f"{name:45} {'identical' if same else f'DIFFERENT, by at most {largest:.3g}'}")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
