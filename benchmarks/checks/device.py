"""Compare the vectors of a device with the CPU's, method by method, on sentences of every length and in float32.

    python -m benchmarks.checks.device gemma3-270m SENTENCES.parquet --column sentence1 --device cuda --json FILE.json

A batch holds sentences of one number of tokens and the shortest of all, so that each number of keys from the shortest
to the longest has its turn, under a mask. A kernel that is wrong for some of them would hardly show in an average.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from typing import Any

import torch
from check_readers import THRESHOLD
from torch.nn.functional import cosine_similarity

import sempa_st
from sempa_st.encoding import read_sentences
from sempa_st.folder.resolve import find_model
from sempa_st.methods.registry import methods_for
from sempa_st.model.tokenizer import load_tokenizer
from sempa_st.utils.files import write_json
from sempa_st.utils.run_info import run_info
from sempa_st.utils.tables import table

_OF_A_LENGTH = 8


def batches(tokenizer: Any, sentences: list[str]) -> list[list[str]]:
    """Return one batch per sentence length: some sentences of that length and the shortest sentence of all."""
    by_length: dict[int, list[str]] = defaultdict(list)
    for sentence in dict.fromkeys(sentences):
        by_length[len(tokenizer(sentence)["input_ids"])].append(sentence)
    shortest = by_length[min(by_length)][0]
    return [[shortest, *by_length[length][:_OF_A_LENGTH]] for length in sorted(by_length)]


def vectors(name: str, method: str | None, device: str, texts: list[list[str]]) -> torch.Tensor:
    """Return the vectors of all batches, concatenated."""
    model = sempa_st.load(name, method=method, dtype="float32", device=device)
    return torch.cat([model.encode(batch, convert_to_tensor=True).cpu() for batch in texts])


def main() -> int:
    """Run all comparisons; return exit code 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a base")
    parser.add_argument("sentences")
    parser.add_argument("--column")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--methods", nargs="*", default=methods_for(encoders=False))
    parser.add_argument("--json")
    args = parser.parse_args()
    sentences = [text for _, text in read_sentences(args.sentences, column=args.column)]
    texts = batches(load_tokenizer(find_model(args.model).folder.path), sentences)
    rows: list[list[object]] = []
    for method in (None, *args.methods):
        cosines = cosine_similarity(*(vectors(args.model, method, device, texts) for device in ("cpu", args.device)))
        low = int((~(cosines >= THRESHOLD)).sum())  # not a number is low, too
        rows.append([method or "the model itself", f"{float(cosines.min()):.8f}", low, "LOW" if low else "ok"])
        print(*rows[-1], flush=True)
    header = ["method", "lowest cosine", f"sentences below {THRESHOLD}", ""]
    print(table(header, rows))
    if args.json:
        cells = [dict(zip(header[:-1], row, strict=False)) for row in rows]
        write_json(args.json, {"results": cells, "run": run_info()})
    return int(any(row[-1] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
