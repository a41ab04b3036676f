"""Check one model in many threads: concurrent embedding, generation and forward passes match sequential ones.

    python -m benchmarks.checks.threads [MODEL ...] --threads 16 --seconds 60 --json FILE

Prints a line a model: passes of each kind, exceptions, and results that differ from the one without other threads
(logits bit for bit, vectors by more than 1e-5). Exit code 1 where there is any.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch

import sempa_st
from sempa_st.data.nli import load_nli
from sempa_st.utils.files import write_json
from sempa_st.utils.run_info import run_info
from sempa_st.utils.tables import table

MODELS = ("gemma3-270m", "sempa-gemma3-270m", "sempa-gemma3-270m-activated")
PROMPT = "The best thing about a rainy Sunday is"
_TOLERANCE = 1e-5


def works(model: Any, sentences: list[str]) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the tasks of the threads by name; each returns a tensor."""
    inputs = model.tokenizer(PROMPT, return_tensors="pt")
    generator = model[0].model

    def generate() -> torch.Tensor:
        found = generator.generate(
            **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return torch.cat(found.logits)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        logits: torch.Tensor = generator(**inputs).logits
        return logits

    return {"encode": lambda: torch.as_tensor(model.encode(sentences)), "generate": generate, "forward": forward}


def run(model: Any, threads: int, seconds: float) -> dict[str, int]:
    """Run all tasks in turn in many threads; return the number of runs and of failures."""
    sentences = [triplet.premise for triplet in load_nli("sample").triplets[:16]]
    kinds = works(model, sentences)
    alone = {name: work() for name, work in kinds.items()}
    counts: Counter[str] = Counter()
    lock, end = Lock(), time.monotonic() + seconds

    def loop(number: int) -> None:
        names = list(kinds)
        while time.monotonic() < end:
            name = names[number % len(names)]
            number += 1
            try:
                found = kinds[name]()
                if name == "encode":
                    wrong = float((found - alone[name]).abs().max()) > _TOLERANCE
                else:
                    wrong = not torch.equal(found, alone[name])
                outcome = "different" if wrong else "right"
            except Exception as error:
                outcome = "exceptions"
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            with lock:
                counts.update([name, outcome])

    pool = [Thread(target=loop, args=(number,)) for number in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    return {name: counts[name] for name in (*kinds, "exceptions", "different")}


def main() -> int:
    """Run the check and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {name: run(sempa_st.load(name, dtype=args.dtype), args.threads, args.seconds) for name in args.models}
    print(
        table(["model", *next(iter(results.values()))], [[name, *counts.values()] for name, counts in results.items()])
    )
    if args.json:
        settings = {"threads": args.threads, "seconds": args.seconds, "dtype": args.dtype}
        write_json(args.json, {"results": results, **settings, "python": platform.python_version(), "run": run_info()})
    return int(any(counts["exceptions"] or counts["different"] for counts in results.values()))


if __name__ == "__main__":
    sys.exit(main())
