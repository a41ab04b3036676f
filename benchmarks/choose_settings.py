"""Choose a method's settings on STS-B dev: each setting is scored at every layer in one forward pass.

    python -m benchmarks.choose_settings prompteol token-prepending:exit=4 ... --data-dir DIR --output FILE.json

Settings that the file already holds are not run again. Pass a method's best setting to ``sempa table``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sempa_st.data.sts import GradedPairs, local_files, read_pairs
from sempa_st.errors import SempaError
from sempa_st.folder.resolve import find_model
from sempa_st.forward.batching import batches_within_tokens
from sempa_st.forward.decoder import layers_of, states_in
from sempa_st.methods.method import Method, mean_pooled
from sempa_st.methods.module import MethodModule, batches_in
from sempa_st.methods.registry import parse_method
from sempa_st.model.base_model import load_causal_lm
from sempa_st.model.embedded import EMBEDDED_BASE
from sempa_st.model.load_options import avoid_broken_sdpa
from sempa_st.model.tokenizer import load_tokenizer
from sempa_st.utils.devices import pick_device
from sempa_st.utils.files import read_json, write_json
from sempa_st.utils.run_info import run_info
from sempa_st.utils.tables import table

_TOKENS = 1500


def main() -> None:
    """Score the settings named on the command line; finished ones of an earlier call are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="+", help="methods with their settings, without a layer")
    parser.add_argument("--base", default=EMBEDDED_BASE, help="a base (default: %(default)s)")
    parser.add_argument("--data-dir", required=True, help="folder with sts/stsb.dev.parquet")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the fastest available)")
    args = parser.parse_args()
    output = Path(args.output)
    pairs = read_pairs(local_files(args.data_dir, "STSBenchmark", "dev", "mteb"))
    folder = find_model(args.base).folder
    digest = folder.digest
    device = pick_device(args.device)
    held = read_json(output) if output.is_file() else {"base": digest, "device": device, "scores": {}}
    if (held["base"], held["device"]) != (digest, device):
        raise SempaError(f"{output} holds scores of another base or device. Choose another output.")
    found: dict[str, dict[str, float]] = held["scores"]
    model: Any = load_causal_lm(folder.path, torch.float32).eval()
    avoid_broken_sdpa(model, device)
    model, tokenizer = model.to(device), load_tokenizer(folder.path)
    for name in args.methods:
        if parse_method(name).layer is not None:
            raise SempaError(f"{name!r} names a layer. Every layer is scored: leave it out.")
        if name not in found:
            found[name] = score_layers(MethodModule(model, tokenizer, f"{name}:layer=-1"), pairs, name)
            write_json(output, {**run_info(), "base": digest, "device": device, "split": "STS-B dev", "scores": found})
    rows: list[list[object]] = []
    for name in args.methods:
        scores = found[name]
        default = parse_method(name).num_layers(model.base_model)
        best = max(scores, key=lambda layer: scores[layer])
        rows.append([name, best, scores[best], default, scores[str(default)]])
    print(table(["method", "best layer", "dev", "its own layer", "dev"], rows))


@torch.no_grad()
def score_layers(module: MethodModule, pairs: GradedPairs, name: str) -> dict[str, float]:
    """Return the Spearman correlation times 100 by layer, 1 being the first one's output and the last with the norm."""
    method, decoder = parse_method(module.method), module.decoder
    depth = len(layers_of(decoder))
    sentences = pairs.sentences
    lengths = [len(module.tokenizer(method.render(text)[0].text)["input_ids"]) for text in sentences]
    width = module.get_embedding_dimension()
    vectors = {layer: torch.empty(len(sentences), width) for layer in range(1, depth + 1)}
    for batch in batches_within_tokens(lengths, _TOKENS, name):
        features = module.preprocess([sentences[index] for index in batch])
        features = {name: tensor.to(decoder.device) for name, tensor in features.items()}
        batches = batches_in(features)
        with read_at_layers(decoder, batches[0].read) as read:
            # Never from packs, in which the places of a row's tokens would not be known here.
            with mock.patch.object(type(method), "packs", False):
                vectors[depth][batch] = method.vectors(decoder, *batches).cpu()
            for layer in range(1, depth):
                vectors[layer][batch] = read[layer].cpu()
    return {
        str(layer): pairs.spearman(found)
        for layer, found in vectors.items()
        if _can_be_read(replace(method, layer=layer), decoder)
    }


def _can_be_read(method: Method, decoder: Any) -> bool:
    try:
        method.check(decoder)
    except SempaError:  # contrastive-prompting has done nothing yet below its own layer
        return False
    return True


@contextmanager
def read_at_layers(decoder: Any, read: Tensor) -> Iterator[dict[int, Tensor]]:
    """Keep the mean of each layer's output at the tokens that are read; a layer's last run counts."""
    found: dict[int, Tensor] = {}

    def keep(layer: int, output: Any) -> None:
        states = states_in(output)
        if states.shape[:2] == read.shape:  # another text of the method may be of another width
            found[layer] = mean_pooled(states, read)

    handles = [
        layer.register_forward_hook(lambda _, inputs, output, number=number: keep(number, output))
        for number, layer in enumerate(layers_of(decoder), 1)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    main()
