"""Compare ``sempa train --estimate`` with the memory that two steps take on a CPU.

    python -m benchmarks.checks.memory --base gemma3-270m --objective contrastive --batch-size 8

The data are the shipped triplets with the most text, so that each batch is the largest one. Measured is the growth of
the process in the second step (VmHWM of Linux): in the first one, libraries are imported and weights are read that were
only mapped, and the optimiser makes its states, which stay. So the estimate of gradients and activations must match it
within 15%. glibc is told to return freed blocks at once: by default it keeps many, and the process is nearly twice as
large as what it holds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sempa_st.data.nli import load_nli
from sempa_st.training.build import build_trainer
from sempa_st.training.config import TrainConfig
from sempa_st.training.estimate import estimate_memory
from sempa_st.training.inputs import load_inputs
from sempa_st.training.run_folder import RunFolder
from sempa_st.utils.devices import trim_malloc
from sempa_st.utils.tables import table

TOLERANCE = 0.15
_RESET_PEAK = "5"
_RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def main() -> int:
    """Estimate, measure, and return exit code 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="gemma3-270m")
    parser.add_argument("--objective", default="contrastive")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    if not _RETURN_FREED.items() <= os.environ.items():  # glibc reads them at the start of a process
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks.checks.memory", *sys.argv[1:]],
            {**os.environ, **_RETURN_FREED},
        )
    with tempfile.TemporaryDirectory() as scratch:
        config = TrainConfig(
            **vars(args),
            data=str(_longest(Path(scratch) / "nli.jsonl", args.batch_size)),
            dev="sample",
            output=str(Path(scratch) / "model"),
            device="cpu",
            epochs=2,
            gradient_accumulation=1,
            checkpoint_samples=10**6,
        )
        estimate = estimate_memory(config)
        trainer = build_trainer(load_inputs(config, "cpu"), RunFolder(config.output))
        growth = _Growth()
        trainer.add_callback(growth)
        trainer.train()
    expected, measured = estimate.gradients + estimate.activations, growth.of_step[2]
    print(estimate.table())
    print(
        table(["gradients and activations", "MiB"], [["estimated", expected / 2**20], ["measured", measured / 2**20]])
    )
    print(f"estimated / measured: {expected / measured:.3f}")
    return int(abs(expected / measured - 1) > TOLERANCE)


class _Growth(TrainerCallback):  # type: ignore[misc]
    """Measures how much the process grows in each step.

    Attributes:
        of_step: Bytes by the number of the step, from 1.
    """

    def __init__(self) -> None:
        self.of_step: dict[int, int] = {}
        self._before = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the memory before a step."""
        trim_malloc()
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        self._before = process_status("VmRSS")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note how far it rose."""
        self.of_step[state.global_step] = process_status("VmHWM") - self._before


def _longest(path: Path, count: int) -> Path:
    triplets = sorted(load_nli("sample").triplets, key=lambda row: len(row.premise + row.entailed + row.contradicted))
    rows = [{"sent0": row.premise, "sent1": row.entailed, "hard_neg": row.contradicted} for row in triplets[-count:]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def process_status(name: str) -> int:
    """Return a number of bytes that Linux tells of this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
