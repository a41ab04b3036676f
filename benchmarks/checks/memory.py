"""Compare ``sempa train --estimate`` with the memory that two steps take on a CPU.

    python -m benchmarks.checks.memory --base gemma3-270m --objective contrastive --batch-size 8

The data are the shipped triplets with the most text, so that each batch is the largest one. Measured is the growth of
the process from the loaded base to its peak (VmHWM of Linux). The estimate without weights must match it within 15%.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

from sempa_st.data.nli import load_nli
from sempa_st.training.build import build_trainer
from sempa_st.training.config import TrainConfig
from sempa_st.training.estimate import estimate_memory
from sempa_st.training.run import load_inputs
from sempa_st.training.run_folder import RunFolder
from sempa_st.utils.devices import trim_malloc
from sempa_st.utils.tables import table

TOLERANCE = 0.15
_RESET_PEAK = "5"


def main() -> int:
    """Estimate, measure, and return exit code 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="gemma3-270m")
    parser.add_argument("--objective", default="contrastive")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
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
        trim_malloc()
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        before = _status("VmRSS")
        trainer.train()
        measured = _status("VmHWM") - before
    expected = estimate.peak - estimate.weights
    print(estimate.table())
    print(table(["besides the weights", "MiB"], [["estimated", expected / 2**20], ["measured", measured / 2**20]]))
    print(f"estimated / measured: {expected / measured:.3f}")
    return int(abs(expected / measured - 1) > TOLERANCE)


def _longest(path: Path, count: int) -> Path:
    triplets = sorted(load_nli("sample").triplets, key=lambda row: len(row.premise + row.entailed + row.contradicted))
    rows = [{"sent0": row.premise, "sent1": row.entailed, "hard_neg": row.contradicted} for row in triplets[-count:]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _status(name: str) -> int:
    """Return a number of bytes that Linux tells of this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
