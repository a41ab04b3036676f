"""Put NaN and infinity where numbers are: each command ends with one paragraph that names the likely cause."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.attacks.world import CPU, TRAIN, Child, Outcome, World, files_of

_BAD_INPUT = 2
_NAMED = re.compile(r"NaN|infinit|finite|overflow|diverge", re.I)
_COMMANDS = {
    "encode": f"encode MODEL TEXTS --output OUT/v.npy {CPU}",
    "encode --int8": f"encode MODEL TEXTS --output OUT/v.npy --int8 {CPU}",
    "encode --precision binary": f"encode MODEL TEXTS --output OUT/v.npy --precision binary {CPU}",
    "evaluate": f"evaluate MODEL --tasks STSBenchmark --data-dir DATA --output OUT {CPU}",
    "copy --merge": "copy MODEL OUT --merge",
    "average": "average NATIVE MODEL --output OUT",
    "train --from": TRAIN.replace("--base BASE", "--from MODEL"),
    "analyze": f"analyze MODEL --output OUT {CPU}",
}
_ON_BASES = {
    "train": TRAIN.replace("BASE", "MODEL"),
    "train: contrastive": TRAIN.replace("BASE", "MODEL") + " --objective contrastive",
    "table": f"table --base MODEL --methods mean --data-dir DATA --output OUT {CPU}",
}
_QUICK = ("encode", "average", "train: contrastive")


def attack(world: World) -> Iterator[Outcome]:
    """Yield what each command made of NaN and infinite weights, of float16's range and of a learning rate too high."""
    adapters = {str(value): _poisoned(world, "native", "adapter_model", value) for value in (torch.nan, torch.inf)}
    bases = {str(value): _poisoned(world, "base", "model", value) for value in (torch.nan, torch.inf)}
    for commands, models in ((_COMMANDS, adapters), (_ON_BASES, bases)):
        for name, command in commands.items():
            if name in _QUICK or not world.quick:
                yield _refused(world, f"numbers: {name}", {kind: (command, path) for kind, path in models.items()})
    overflowing = _overflowing(world)
    half = {"float16": (_COMMANDS["encode"].replace("float32", "float16"), overflowing)}
    yield _refused(world, "numbers: encode beyond float16's range", half)
    if not world.quick:
        runs = {name: (f"{TRAIN} --learning-rate 1e30 {flags}", world.root) for name, flags in _DIVERGING.items()}
        yield _refused(world, "numbers: a run that diverges", runs)


_DIVERGING = {"dpo": "", "contrastive": "--objective contrastive", "one-word-listwise": "--objective one-word-listwise"}


def _refused(world: World, attack: str, trials: dict[str, tuple[str, Path]]) -> Outcome:
    """Run commands on poisoned models; each must end with one paragraph, and without an output."""
    outcome, started = Outcome(attack), time.perf_counter()
    for kind, (command, model) in trials.items():
        output = world.folder("numbers", "out")
        words = world.words(command.replace("OUT", f"{output}/made"), output)
        child = Child.start([str(model) if word == "MODEL" else word for word in words], world.root / "log.txt")
        code, line = child.wait(), child.last_line
        outcome.check(code == _BAD_INPUT and bool(_NAMED.search(line)), f"{kind}: exit code {code}: {line}")
        made = [path.name for path in files_of(output) if path.suffix in {".npy", ".safetensors"}]
        outcome.check(not made, f"{kind}: wrote {', '.join(made)}")
    outcome.seconds = time.perf_counter() - started
    return outcome


def _poisoned(world: World, model: str, stem: str, value: float) -> Path:
    """Copy a model and put a value into one element of its last matrix but one."""
    folder = world.root / f"{model}-{value}"
    shutil.copytree(world.root / model, folder)
    weights = load_file(folder / f"{stem}.safetensors")
    name = [name for name, tensor in weights.items() if tensor.ndim == 2][-2]
    weights[name][0, 0] = value
    save_file(weights, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    return folder


def _overflowing(world: World) -> Path:
    """Return a base whose last norm takes states beyond the range of float16."""
    folder = world.root / "overflowing"
    shutil.copytree(world.root / "base", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(6e4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
