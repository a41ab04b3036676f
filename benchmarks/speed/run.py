"""Time this package against its alternatives: interleaved in one run, on the same real texts.

    python -m benchmarks.speed.run encode --data-dir DIR --output FILE.json
    python -m benchmarks.speed.run train --data-dir DIR --output FILE.json
    python -m benchmarks.speed.run stream --data-dir DIR --output FILE.json

``encode``: 2,000 sentences of STS-B dev, and texts of 64 to 512 tokens of WikiText-2, by every system that is at hand.
``train``: sequence DPO by TRL's trainer as it comes and by ours, and our other objectives. ``stream``: throughput and
peak memory of ``sempa encode`` on files of growing length.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

from benchmarks.speed.stream import measure_streams
from benchmarks.speed.systems import SYSTEMS, Embed, Setting
from benchmarks.speed.training import chosen, measure_memory, measure_training
from sempa_st.data.sts import local_files, read_pairs
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model
from sempa_st.model.base_model import resolve_base
from sempa_st.model.embedded import EMBEDDED_BASE
from sempa_st.model.templates import embedding_template
from sempa_st.model.tokenizer import load_tokenizer
from sempa_st.utils.files import read_json, write_json
from sempa_st.utils.run_info import run_info
from sempa_st.utils.tables import table

_PLAIN = "sentence-transformers"
_PRODUCT_ROWS = 1024
_SECONDS = 1.0


def main() -> None:
    """Run one of the three benchmarks, print its tables and write its file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("encode", "train", "stream"))
    parser.add_argument("--data-dir", required=True, help="folder with sts/, nli/ and text/")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--systems", nargs="*", default=[], help="some of the rows (default: all)")
    parser.add_argument("--sentences", type=int, default=2000, help="short sentences (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=120, help="long texts (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="each of all systems in turn (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="of encode, but for the paper (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="of encode (default: %(default)s)")
    parser.add_argument(
        "--peers-python", metavar="PYTHON", help="of encode: interpreter in whose environment ONNX and OpenVINO start"
    )
    parser.add_argument("--triplets", type=int, default=64, help="of train (default: %(default)s)")
    parser.add_argument("--memory", action="store_true", help="of train: the peak of each, in a process of its own")
    parser.add_argument("--model", default=EMBEDDED_BASE, help="of stream: base or folder (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="stream through a random decoder of two narrow layers")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1000, 10_000], help="of stream, in sentences")
    args = parser.parse_args()
    training = measure_memory if args.memory else measure_training
    result = {"encode": measure_encoding, "train": training, "stream": measure_streams}[args.what](args)
    save(args.output, result)
    for name, rows in result["tables"].items():
        print(f"\n{name}")
        print(table(list(rows[0]), [["" if cell is None else cell for cell in row.values()] for row in rows]))
    for name, reason in result.get("missing", {}).items():
        print(f"not measured: {name} ({reason})")


def save(path: str, result: dict[str, Any]) -> None:
    """Write a result and the environment that it was measured in."""
    write_json(path, {**run_info(), "threads": torch.get_num_threads(), **result})


def measure_encoding(args: argparse.Namespace) -> dict[str, Any]:
    """Time every system on short and on long texts; compare vectors with plain sentence-transformers in float32."""
    folder = resolve_base(EMBEDDED_BASE).folder
    pairs = read_pairs(local_files(args.data_dir, "STSBenchmark", "dev", "mteb"))
    half = args.sentences // 2
    short = [text for pair in zip(pairs.first[:half], pairs.second[:half], strict=True) for text in pair]
    rounds: dict[str, dict[str, list[float]]] = {}
    tables: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        native = Path(scratch, "native")
        copy_model(EMBEDDED_BASE, native, format="native")
        setting = Setting(folder, native, args.device, args.batch_size, args.peers_python)
        systems, missing = make_systems(chosen(args.systems, SYSTEMS), setting)
        rates = product_rates(read_json(folder / "config.json"), args.device)
        result = {
            "missing": missing,
            "gflops of matrix products": rates,
            "seconds of the rounds": rounds,
            "tables": tables,
        }
        for name, texts in (("short", short), ("long", long_texts(args.data_dir, folder, args.texts))):
            rounds[name], vectors = run_interleaved(systems, texts, args.rounds)
            tables[name] = compare(rounds[name], vectors, count_tokens(folder, texts), folder, rates)
            if name == "short":
                for row in tables[name]:
                    row["STS-B dev"] = spearman(vectors[row["system"]], pairs.scores[:half])
            save(args.output, result)  # long texts may take more memory than there is
    return result


def make_systems(names: Sequence[str], setting: Setting) -> tuple[dict[str, Embed], dict[str, str]]:
    """Load the systems that are available; print why the others are not."""
    systems, missing = {}, {}
    for name in names:
        try:
            systems[name] = SYSTEMS[name](setting)
        except Exception as error:  # a peer that is not installed, or does not take this model, is reported
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if not systems:
        raise SempaError(f"No system is at hand: {missing}.")
    return systems, missing


def run_interleaved(
    systems: dict[str, Embed], texts: Sequence[str], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Embed all texts with each system in turn; each round starts with another system.

    A system may sort the texts, so a round gives it all of them.

    Returns:
        The seconds of each round, and the vectors of the last one, by system.
    """
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    vectors: dict[str, Any] = {}
    names = list(systems)
    for name in names:
        systems[name](texts[:32])  # what is done once, on a first call, is no part of the throughput
    for number in tqdm(range(rounds), desc="rounds"):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            vectors[name] = systems[name](texts)
            seconds[name].append(time.perf_counter() - started)
    return seconds, vectors


def compare(
    seconds: dict[str, list[float]],
    vectors: dict[str, Any],
    tokens: Sequence[int],
    folder: Path,
    rates: dict[str, float],
) -> list[dict[str, Any]]:
    """Return one row per system: throughput, ratios, machine utilisation and cosine to the reference.

    The machine is used by 100% where the operations of the plain path (linear layers, no padding) take as long as
    matrix products of the same shapes do: a system that leaves work out may go beyond that.
    """
    operations = 2 * linear_parameters(read_json(folder / "config.json")) * sum(tokens)
    reference = vectors.get(f"{_PLAIN} float32")
    rows = []
    for name, rounds in seconds.items():
        rate = rates["bfloat16" if "bfloat16" in name else "float32"]
        whole = sum(rounds) / len(rounds)
        row: dict[str, Any] = {
            "system": name,
            "texts/s": len(tokens) / whole,
            "tokens/s": sum(tokens) / whole,
        }
        for peer in ("paper", f"{_PLAIN} float32", f"{_PLAIN} bfloat16"):
            row[f"x {peer.replace(_PLAIN, 'ST')}"] = sum(seconds[peer]) / sum(rounds) if peer in seconds else None
        row["% of the products' rate"] = 100 * operations / whole / rate / 1e9
        row["lowest cosine"] = None if reference is None else lowest_cosine(vectors[name], reference)
        rows.append(row)
    return rows


def lowest_cosine(found: Any, expected: Any) -> str:
    """Return the lowest cosine between vectors of the same text, rounded to its significant digits."""
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return f"{float(((found * expected).sum(axis=1) / norms).min()):.7f}"


def spearman(vectors: Any, scores: Sequence[float]) -> float:
    """Return the Spearman correlation times 100 of consecutive pairs of texts."""
    first, second = vectors[0::2], vectors[1::2]
    cosines = (first * second).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    return 100 * float(spearmanr(cosines, scores).statistic)


def long_texts(data_dir: str, folder: Path, count: int) -> list[str]:
    """Return the paragraphs of WikiText-2's test set with 64 to 512 tokens, in order."""
    lines = Path(data_dir, "text", "wikitext2.test.txt").read_text(encoding="utf-8").splitlines()
    lines = [line.strip() for line in lines if len(line) > 200 and not line.strip().startswith("=")]
    chosen = [line for line, number in zip(lines, count_tokens(folder, lines), strict=True) if 64 <= number <= 512]
    return chosen[:count]


def count_tokens(folder: Path, texts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each text under the template, as in the padded forward pass."""
    tokenizer, template = load_tokenizer(folder), embedding_template("prompteol")
    return [len(ids) for ids in tokenizer([template.text(text) for text in texts])["input_ids"]]


def linear_shapes(config: dict[str, Any]) -> list[tuple[int, int]]:
    """Return inputs and outputs of the linear layers in one layer of a Gemma 3 decoder."""
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = size * config["num_attention_heads"], size * config["num_key_value_heads"]
    return [
        *((hidden, width) for width in (queries, keys, keys)), (queries, hidden),
        (hidden, inner), (hidden, inner), (inner, hidden),
    ]  # fmt: skip


def linear_parameters(config: dict[str, Any]) -> int:
    """Return the parameters of all linear layers but the LM head."""
    return sum(rows * columns for rows, columns in linear_shapes(config)) * int(config["num_hidden_layers"])


def product_rates(config: dict[str, Any], device: str = "cpu") -> dict[str, float]:
    """Return the rate of matrix products of the model's own shapes, in GFLOP/s, by type."""
    rates = {}
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        layers = [
            tuple(torch.randn(height, rows, dtype=dtype, device=device) for height in (_PRODUCT_ROWS, columns))
            for rows, columns in linear_shapes(config)
        ]
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < _SECONDS:
            for states, weight in layers:
                torch.nn.functional.linear(states, weight)
            done += 2 * _PRODUCT_ROWS * sum(weight.numel() for _, weight in layers)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
        rates[name] = done / (time.perf_counter() - started) / 1e9
    return rates


if __name__ == "__main__":
    main()
