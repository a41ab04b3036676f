"""The command ``sempa sweep``, and the grid of settings that its options describe."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sempa_st.cli.arguments import add_command
from sempa_st.cli.train import TRAIN_GROUPS
from sempa_st.errors import SempaError
from sempa_st.training.config import TrainConfig
from sempa_st.utils.extras import require
from sempa_st.utils.options import add_options, convert_option, load_yaml, option_values, split_list

_OWNED = ("output", "resume", "overwrite")
_NOT_IN_GRID = {
    **dict.fromkeys(_OWNED, "the sweep sets it for each run"),
    **dict.fromkeys(("data_dir", "device", "log_steps", "report_to"), "it does not tell two runs apart"),
    "dev": "scores on different pairs cannot be compared",
}
_MOST_POINTS = 10_000
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None}


def add(commands: Any) -> None:
    """Add ``sempa sweep``: its own options, and those of a training run that all of its runs share."""
    parser = add_command(
        commands,
        "sweep",
        _sweep,
        "Train a grid of settings and keep the best model.",
        examples=(
            "--data sample --dev sample --set learning_rate=1e-4,2e-4 --set lora_r=8,16 --output runs/sweep",
            "--config gemma3-270m --data my_nli.csv --grid grid.yaml --search 20 --output runs/sweep",
        ),
        kept=lambda args: f"Finished runs and checkpoints are kept in {args.output}. Run the same command to go on.",
    )
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument(
        "--grid", metavar="FILE", help="YAML file: options with lists of values, or a list of such mappings"
    )
    sweep.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="NAME=VALUE,...",
        help="one more option to vary, such as learning_rate=1e-4,2e-4; values that contain a comma go into --grid",
    )
    sweep.add_argument(
        "--search",
        type=int,
        metavar="N",
        help="train only N points of the grid, picked by Optuna's TPE sampler; --seed fixes which",
    )
    sweep.add_argument("--output", required=True, help="folder of the sweep; the same command continues it")
    sweep.add_argument("--keep-models", action="store_true", help="keep the model of every run, not only the best")
    sweep.add_argument("--retry-failed", action="store_true", help="run failed points again")
    sweep.add_argument("--json", action="store_true", help="print the results as JSON")
    add_options(parser, TrainConfig, groups=TRAIN_GROUPS, without=_OWNED)


def _sweep(args: argparse.Namespace) -> None:
    fixed = option_values(TrainConfig, vars(args))
    for name in ("resume", "overwrite"):
        if name in fixed:
            raise SempaError(f"The config file {args.config} sets {name}, which a sweep sets itself. Leave it out.")
    if args.search is not None and args.search < 1:
        raise SempaError(f"--search is {args.search}. Expected the number of runs to make, 1 or more.")
    configs, varied = make_configs(fixed, read_grid(args.grid, args.assignments))
    require("optuna", "trl", "datasets", extra="train", purpose="A sweep")
    import optuna

    from sempa_st.training.run_results import results_table
    from sempa_st.training.sweep import BEST, run_sweep

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    results = run_sweep(
        configs,
        varied,
        args.output,
        search=args.search,
        keep_models=args.keep_models,
        retry_failed=args.retry_failed,
    )
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
        return
    print(results_table(results))
    best = Path(args.output) / BEST
    print(f'The best model is in {best}. Load it with sempa_st.load("{best}") or SentenceTransformer("{best}").')


def make_configs(fixed: Mapping[str, Any], grid: Sequence[Mapping[str, Any]]) -> tuple[list[TrainConfig], list[str]]:
    """Build the settings of every point of a grid.

    Args:
        fixed: Settings that all points share; the output is the sweep's folder.
        grid: Settings of each point; they override the fixed ones.

    Returns:
        The settings by point, all different, and the names of the settings that vary.

    Raises:
        SempaError: If the settings of a point are invalid, or two points are the same.
    """
    configs: list[TrainConfig] = []
    seen: dict[tuple[Any, ...], int] = {}
    for number, settings in enumerate(grid, 1):
        point = f"Point {number} of the grid ({', '.join(f'{name}={value}' for name, value in settings.items())})"
        try:
            config = TrainConfig(**{**fixed, **settings})
        except SempaError as error:
            raise SempaError(f"{point}: {error}") from error
        first = seen.setdefault(tuple(vars(config).values()), number)
        if first != number:
            raise SempaError(f"{point} has the same settings as point {first}. Name each point once.")
        configs.append(config)
    names = list(dict.fromkeys(name for settings in grid for name in settings))
    return configs, [name for name in names if len({getattr(config, name) for config in configs}) > 1] or names


def read_grid(file: str | None, assignments: Sequence[str]) -> list[dict[str, Any]]:
    """Return the settings of each point of a grid.

    Args:
        file: YAML file that maps options of a training run to lists of values; the grid is their product. A list of
            such mappings gives the points of all of them. A single value is a list of one.
        assignments: More options to vary, each as ``name=value,value``; every point of the file is combined with
            every combination of these.

    Raises:
        SempaError: On an unknown key, a value of the wrong type, an empty list, a key that is given twice, or a grid
            that is missing or too large.
    """
    if not file and not assignments:
        raise SempaError("The sweep has no grid. Pass --grid FILE, or --set name=value,value for each option to vary.")
    axes = _axes(_assigned(text) for text in assignments)
    grids = []
    for mapping in _mappings(file) if file else [{}]:
        grid = _axes((key, value, f"The grid file {file}") for key, value in mapping.items())
        if both := grid.keys() & axes.keys():
            raise SempaError(f"{', '.join(sorted(both))} is both in {file} and in --set. Give it in one place.")
        grids.append({**grid, **axes})
    count = sum(math.prod(map(len, grid.values())) for grid in grids)
    if count > _MOST_POINTS:
        raise SempaError(f"The grid has {count:,} points, each a training run. Expected {_MOST_POINTS:,} at most.")
    return [dict(zip(grid, values, strict=True)) for grid in grids for values in itertools.product(*grid.values())]


def _mappings(file: str) -> list[dict[Any, Any]]:
    content = load_yaml(file)
    mappings = content if isinstance(content, list) else [content]
    if not mappings or not all(isinstance(mapping, dict) and mapping for mapping in mappings):
        raise SempaError(
            f"The grid file {file} does not hold options and their values. Expected lines such as "
            "'learning_rate: [1e-4, 2e-4]', or a list of such mappings."
        )
    return mappings


def _assigned(text: str) -> tuple[str, list[Any], str]:
    key, sign, values = text.partition("=")
    if not sign:
        raise SempaError(f"--set {text} has no '='. Expected name=value,value, such as learning_rate=1e-4,2e-4.")
    words = split_list(values) if values.strip() else []
    return key.strip(), [_WORDS.get(word.lower(), word) for word in words], f"--set {text}"


def _axes(given: Iterable[tuple[Any, Any, str]]) -> dict[str, list[Any]]:
    """Convert and check values: (key, values, source for error messages) in, values by option out."""
    axes: dict[str, list[Any]] = {}
    for key, value, where in given:
        values = value if isinstance(value, list) else [value]
        if not values:
            raise SempaError(f"{where} has no value for {key}. Expected a list of at least one.")
        converted = [convert_option(TrainConfig, key, value, where) for value in values]
        name = converted[0][0]
        if name in _NOT_IN_GRID:
            raise SempaError(f"{where} varies {name}, which a sweep cannot: {_NOT_IN_GRID[name]}. Leave it out.")
        if name in axes:
            raise SempaError(f"{where} gives {name} twice. Put all its values into one list.")
        axes[name] = [value for _, value in converted]
    return axes
