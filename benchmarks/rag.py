"""Retrieval and answers from one model: an index of passages, its recall, and memory beside two models.

    python -m benchmarks.rag --data-dir DIR --output benchmarks/results/rag.json

The passages are sentences of WikiText-2, 5,000 by default, with the second sentences of those pairs of STS-B test that
are scored 4.5 or more; the first sentences are the questions, and recall at 10 is the share of questions whose partner
is among the ten nearest of all. Memory is the growth of a process that has the models loaded, by ``--measure``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

import sempa_st
from benchmarks.checks.memory import process_status
from sempa_st.data.sts import local_files, read_pairs
from sempa_st.utils.files import write_json
from sempa_st.utils.run_info import run_info
from sempa_st.utils.tables import table

PEER = "all-MiniLM-L6-v2"
_SCORE = 4.5
_NEAREST = 10


def main() -> None:
    """Measure, write the figures and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sempa-gemma3-270m-activated")
    parser.add_argument("--peer", default="", help=f"folder of the other embedding model, such as {PEER}")
    parser.add_argument("--data-dir", required=True, help="folder with sts/ and text/")
    parser.add_argument("--passages", type=int, default=5000)
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--measure", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(memory_of(args.measure)))
        return
    questions, partners = paired_sentences(args.data_dir)
    text = Path(args.data_dir, "text", "wikitext2.test.txt").read_text(encoding="utf-8")
    passages = sentences_of(text)[: args.passages]
    rows = []
    for name in [args.model, *([args.peer] if args.peer else [])]:
        rows.append(
            {"model": Path(name).name, **recall(sempa_st.load(name, dtype="float32"), questions, partners, passages)}
        )
        print(rows[-1], flush=True)
    one, two = measured([args.model]), measured([args.model, args.peer]) if args.peer else None
    memory = {"one model, MiB": one, "with another for embedding, MiB": two}
    result = {"passages": len(passages) + len(partners), "questions": len(questions), "rows": rows, "memory": memory}
    if args.output:
        write_json(args.output, {**run_info(), **result})
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    print(memory)


def paired_sentences(data_dir: str) -> tuple[list[str], list[str]]:
    """Return first and second sentences of the pairs of STS-B test that mean the same, each first sentence once."""
    pairs = read_pairs(local_files(data_dir, "STSBenchmark", "test", "mteb"))
    graded = zip(pairs.first, pairs.second, pairs.scores, strict=True)
    same = {first: second for first, second, score in graded if score >= _SCORE and first != second}
    return list(same), list(same.values())


def sentences_of(text: str) -> list[str]:
    """Return the distinct sentences of a text of WikiText, without headings and fragments."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("=")]
    found = [part.strip() for line in lines for part in re.split(r"(?<=[.!?]) +(?=[A-Z])", line)]
    return list(dict.fromkeys(part for part in found if len(part.split()) >= 6))


def recall(model: Any, questions: Sequence[str], partners: Sequence[str], passages: Sequence[str]) -> dict[str, float]:
    """Return recall at 10 of the partners among all, and what the index costs."""
    started = time.perf_counter()
    corpus = model.encode([*partners, *passages], normalize_embeddings=True)
    seconds = time.perf_counter() - started
    index = faiss.IndexFlatIP(corpus.shape[1])
    index.add(corpus)
    _, nearest = index.search(model.encode(list(questions), normalize_embeddings=True), _NEAREST)
    texts = [[partners[n] if n < len(partners) else "" for n in row] for row in nearest.tolist()]
    hits = [partner in row for partner, row in zip(partners, texts, strict=True)]
    return {"recall at 10": float(np.mean(hits)), "passages/s": len(corpus) / seconds, "MiB": corpus.nbytes / 2**20}


def measured(models: Sequence[str]) -> float:
    """Return what :func:`memory_of` says in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.rag", "--data-dir", "none", "--measure", *models]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def memory_of(models: Sequence[str]) -> float:
    """Return the growth of this process in MiB from loading the models and using each once."""
    before = process_status("VmRSS")
    held = [sempa_st.load(name, dtype="float32") for name in models]
    for model in held:
        model.encode(["A sentence."])
    return (process_status("VmRSS") - before) / 2**20


if __name__ == "__main__":
    main()
