"""Throughput and peak memory of ``sempa encode`` on files of growing length."""

from __future__ import annotations

import argparse
import itertools
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from sempa_st.data.sts import local_files, read_pairs
from sempa_st.folder.resolve import find_model
from sempa_st.model.base_model import resolve_base
from sempa_st.model.embedded import EMBEDDED_BASE
from sempa_st.model.tokenizer import load_tokenizer, save_tokenizer
from sempa_st.utils.devices import pick_dtype

_BETWEEN_LOOKS = 0.05
"""Seconds."""


def measure_streams(args: argparse.Namespace) -> dict[str, Any]:
    """Encode files of real sentences, repeated as needed, each file in its own process."""
    sentences = read_pairs(local_files(args.data_dir, "STSBenchmark", "dev", "mteb")).sentences
    _, _, libraries = run_watched(["-c", "import sempa_st.forward.sentence_transformers, sempa_st.loading"])
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = str(save_tiny(Path(scratch, "tiny"))) if args.tiny else args.model
        weights = _weights(find_model(model).folder.path)
        for length in args.lengths:
            source, output = Path(scratch, "sentences.txt"), Path(scratch, "vectors.npy")
            with source.open("w") as handle:
                handle.writelines(f"{text}\n" for text in itertools.islice(itertools.cycle(sentences), length))
            command = ["-m", "sempa_st", "encode", model, str(source), "--output", str(output), "--device", "cpu"]
            seconds, peak, private = run_watched(command)
            rows.append(
                {
                    "sentences": length,
                    "seconds": seconds,
                    "sentences/s": length / seconds,
                    "peak MiB": peak,
                    "private MiB": private,
                    "of it libraries": libraries,
                    "weights MiB": weights,
                    "the rest / weights": (private - libraries) / weights,
                }
            )
    return {"tables": {"stream": rows}}


def save_tiny(folder: Path) -> Path:
    """Write a random decoder with the embedded base's tokenizer, so narrow that input and output dominate."""
    base = resolve_base(EMBEDDED_BASE).folder
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    config.update({"hidden_size": 16, "intermediate_size": 32, "head_dim": 8, "num_attention_heads": 2})
    config.update({"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(folder)
    save_tokenizer(load_tokenizer(base), folder)
    return folder


def run_watched(arguments: Sequence[str]) -> tuple[float, float, float]:
    """Run a Python process and sample its memory (Linux) many times a second.

    Returns:
        The seconds it took, and the peaks in MiB of its resident memory and of the private part of that: what is read
        from files through the page cache, such as weights before they are converted, is not private.

    Raises:
        RuntimeError: If it ends with an error.
    """
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments])
    peak, private = 0, 0
    while process.poll() is None:
        held = _memory(process.pid)
        peak, private = max(peak, held.get("VmHWM", 0)), max(private, held.get("RssAnon", 0))
        time.sleep(_BETWEEN_LOOKS)
    if process.returncode:
        raise RuntimeError(f"{arguments} ended with status {process.returncode}.")
    return time.perf_counter() - started, peak / 1024, private / 1024


def _memory(process: int) -> dict[str, int]:
    """Return the resident memory of a process in KiB, or nothing once it has ended."""
    lines = (line.split() for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return {line[0].removesuffix(":"): int(line[1]) for line in lines if line[-1] == "kB"}


def _weights(folder: Path) -> float:
    """Return the size in MiB of a base's weights in the compute type."""
    numbers = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            numbers += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.offset_keys())
    return numbers * pick_dtype("auto", "cpu").itemsize / 2**20
