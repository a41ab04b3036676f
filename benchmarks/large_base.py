"""Measure what a large base costs, with random weights of its shape: training steps, encoding, and the whole run.

    python -m benchmarks.large_base --shape llama3-8b --config llama3-8b --device cuda --data-dir DIR --output FILE.json

Weights are made on the device, so that no model is downloaded; the tokenizer is that of an embedded base. Steps are
those of the configuration with one forward pass each: the first one, which allocates, does not count. On a CPU the
memory is the process's peak, and nothing of that size runs in reasonable time: ``--shape tiny`` is there to try it.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

import sempa_st
from benchmarks.speed.training import steps_alone
from sempa_st.data.nli import load_nli
from sempa_st.model.base_model import resolve_base
from sempa_st.model.embedded import EMBEDDED_BASES
from sempa_st.model.tokenizer import load_tokenizer, save_tokenizer
from sempa_st.training.build import build_trainer
from sempa_st.training.config import TrainConfig
from sempa_st.training.inputs import load_inputs
from sempa_st.utils.files import write_json
from sempa_st.utils.options import read_options
from sempa_st.utils.run_info import run_info
from sempa_st.utils.tables import table

SHAPES: dict[str, dict[str, int]] = {
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 8192,
    },
    "tiny": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 0, "max_position_embeddings": 2048,
    },
}  # fmt: skip
"""Shapes by name; a vocabulary of 0 is the tokenizer's."""
PAPER_TRIPLETS = 275_601
"""Triplets of the paper's data set."""


def main() -> None:
    """Measure one shape with one configuration, write the figures and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama3-8b")
    parser.add_argument("--config", default="llama3-8b", help="as in sempa train")
    parser.add_argument("--tokenizer", default="smollm2-135m", help=f"{', '.join(EMBEDDED_BASES)}, or a folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data-dir", required=True, help="folder with nli/triplets.parquet")
    parser.add_argument("--steps", type=int, default=4, help="training steps, the first one not counted")
    parser.add_argument("--batch-size", type=int, help="triplets a step (default: the configuration's)")
    parser.add_argument("--sentences", type=int, default=512, help="sentences to encode")
    parser.add_argument("--cards", type=int, default=4, help="cards that the whole run is reckoned for")
    parser.add_argument("--output", required=True, help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base = make_base(Path(scratch) / "base", args.shape, args.tokenizer, args.device)
        values = {"config": args.config, "base": str(base), "data": f"{args.data_dir}/nli/triplets.parquet"}
        values |= {
            "dev": "sample",
            "output": str(Path(scratch) / "run"),
            "gradient_accumulation": 1,
            "warmup_ratio": 0.0,
        }
        values |= {"device": args.device} | ({"batch_size": args.batch_size} if args.batch_size else {})
        config = read_options(TrainConfig, values)
        config.max_triplets = config.batch_size * args.steps
        found = {"training": measure_training(config), "encoding": measure_encoding(config, args.sentences)}
    seconds = found["training"]["seconds a triplet"] + found["training"]["reference seconds a triplet"]
    found["run"] = {"triplets": PAPER_TRIPLETS, "hours": PAPER_TRIPLETS * seconds / args.cards / 3600}
    found["run"] |= {"cards": args.cards}
    write_json(Path(args.output), {**run_info(), "shape": args.shape, "config": args.config, **found})
    rows = [[part, name, value] for part, values in found.items() for name, value in values.items()]
    print(table(["part", "figure", "value"], rows))


def make_base(folder: Path, shape: str, tokenizer: str, device: str) -> Path:
    """Write a Llama of this shape with random weights in bfloat16, and return its folder."""
    source = load_tokenizer(resolve_base(tokenizer).folder)
    sizes = SHAPES[shape] | {"vocab_size": SHAPES[shape]["vocab_size"] or len(source)}
    ids = {name: getattr(source, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.device(device):
        torch.manual_seed(0)
        config = LlamaConfig(**sizes, **ids)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.save_pretrained(folder)
    save_tokenizer(source, folder)
    return folder


def measure_training(config: TrainConfig) -> dict[str, Any]:
    """Run the steps of ``config.max_triplets``; return seconds and peak memory, the reference pass apart."""
    device = str(config.device)
    with steps_alone(Path(config.output), Path(f"{config.output}.cache")) as work:
        inputs = load_inputs(config, device)
        started = time.perf_counter()
        trainer = build_trainer(inputs, work)
        reference = time.perf_counter() - started if config.has_reference else 0.0
        _reset_peak(device)
        steps = _StepTimes(device)
        trainer.add_callback(steps)
        trainer.train()
    count = config.batch_size
    return {
        "objective": config.objective,
        "triplets a step": count,
        "seconds a triplet": statistics.median(steps.seconds[1:]) / count,
        "reference seconds a triplet": reference / len(inputs.data.triplets),
        "peak GiB": _peak(device),
    }


def measure_encoding(config: TrainConfig, count: int) -> dict[str, Any]:
    """Embed ``count`` premises twice with the base, under the template; return the second time and the peak memory."""
    sentences = list(dict.fromkeys(triplet.premise for triplet in load_nli(config.data).triplets))[:count]
    model = sempa_st.load(config.base, dtype=config.dtype, device=config.device)
    _reset_peak(str(config.device))
    for _ in range(2):
        started = time.perf_counter()
        model.encode(sentences, batch_size=256, show_progress_bar=False)
        seconds = time.perf_counter() - started
    return {
        "sentences": len(sentences),
        "sentences a second": len(sentences) / seconds,
        "peak GiB": _peak(str(config.device)),
    }


class _StepTimes(TrainerCallback):  # type: ignore[misc]
    """Measures the seconds of each optimiser step."""

    def __init__(self, device: str) -> None:
        self.seconds: list[float] = []
        self._device = device
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.seconds.append(self._now() - self._started)

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _reset_peak(device: str) -> None:
    gc.collect()  # a model that is done with is held by cycles
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> float:
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated() / 2**30)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
