"""Throughput and peak memory of ``sempa encode`` on files of growing length, for :mod:`run_speed`."""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sempa_st.bases import EMBEDDED_BASE
from sempa_st.stsdata import local_files, read_pairs


def measure_streams(args: argparse.Namespace) -> dict[str, Any]:
    """Encode files of real sentences, repeated where they run out, each by a process of its own."""
    sentences = read_pairs(local_files(args.data_dir, "STSBenchmark", "dev", "mteb")).sentences
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for length in args.lengths:
            source, output = Path(scratch, "sentences.txt"), Path(scratch, "vectors.npy")
            with source.open("w") as handle:
                handle.writelines(f"{text}\n" for text in itertools.islice(itertools.cycle(sentences), length))
            started = time.perf_counter()
            command = [sys.executable, "-m", "sempa_st", "encode", EMBEDDED_BASE, str(source), "--output", str(output)]
            process = subprocess.Popen(command)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise RuntimeError(f"{command} ended with status {status}.")
            seconds = time.perf_counter() - started
            rows.append(
                {
                    "sentences": length,
                    "seconds": seconds,
                    "sentences/s": length / seconds,
                    "peak MiB": usage.ru_maxrss / 1024,
                }
            )
    return {"tables": {"stream": rows}}
