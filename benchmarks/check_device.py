"""Compare the vectors of a device with the CPU's, method by method, on sentences of every length and in float32.

    python benchmarks/check_device.py gemma3-270m SENTENCES.parquet --column sentence1 --device cuda --json FILE.json

Batches are of 32 sentences of about one length, so that each number of keys from the shortest to the longest has its
turn. A device's kernel that is wrong for some of them shows up in no average.
"""

from __future__ import annotations

import argparse
import sys

from check_readers import THRESHOLD, mixed_lengths
from torch.nn.functional import cosine_similarity

import sempa_st
from sempa_st.console import table
from sempa_st.encoding import read_sentences
from sempa_st.files import write_json
from sempa_st.methods.registry import methods_for
from sempa_st.runinfo import run_info

_BATCH = 32


def main() -> int:
    """Run all comparisons; exit code 1 if one falls short."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a base")
    parser.add_argument("sentences")
    parser.add_argument("--column")
    parser.add_argument("--count", type=int, default=960)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--methods", nargs="*", default=methods_for(encoders=False))
    parser.add_argument("--json")
    args = parser.parse_args()
    sentences = mixed_lengths([text for _, text in read_sentences(args.sentences, column=args.column)], args.count)
    rows: list[list[object]] = []
    for method in (None, *args.methods):
        expected, found = (
            sempa_st.load(args.model, method=method, dtype="float32", device=device).encode(
                sentences, batch_size=_BATCH, convert_to_tensor=True
            )
            for device in ("cpu", args.device)
        )
        cosines = cosine_similarity(expected, found.cpu())
        low = int((cosines < THRESHOLD).sum())
        rows.append([method or "the model itself", f"{float(cosines.min()):.8f}", low, "LOW" if low else "ok"])
        print(*rows[-1], flush=True)
    header = ["method", "lowest cosine", f"sentences below {THRESHOLD}", ""]
    print(table(header, rows))
    if args.json:
        cells = [dict(zip(header[:-1], row, strict=False)) for row in rows]
        write_json(args.json, {"sentences": len(sentences), "results": cells, "run": run_info()})
    return int(any(row[-1] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
