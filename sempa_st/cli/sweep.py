"""The command ``sempa sweep``: its flags, the settings that they ask for, and what it prints."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sempa_st.cli.arguments import add_command
from sempa_st.errors import SempaError
from sempa_st.training.config import TrainConfig
from sempa_st.utils.options import add_options, convert_option, load_yaml, option_values

_OWNED = ("output", "resume", "overwrite")
_NOT_IN_GRID = {
    **dict.fromkeys(_OWNED, "the sweep sets it for each run"),
    **dict.fromkeys(("data_dir", "device", "log_steps"), "it does not tell two runs apart"),
    "dev": "scores on different pairs cannot be compared",
}
_MOST_POINTS = 10_000
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None}


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a sweep, and those of a training run for the settings that all of its runs share."""
    parser.add_argument(
        "--grid", metavar="FILE", help="YAML file: options and lists of values, or a list of such mappings"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="NAME=VALUE,...",
        help="one more option to vary, such as learning_rate=1e-4,2e-4; values that hold a comma go into --grid",
    )
    parser.add_argument(
        "--search",
        type=int,
        metavar="N",
        help="train only N points of the grid, picked by Optuna's TPE sampler; --seed fixes which",
    )
    parser.add_argument("--output", required=True, help="folder of the sweep; the same command goes on with it")
    parser.add_argument("--keep-models", action="store_true", help="keep the model of every run, not only the best")
    parser.add_argument("--retry-failed", action="store_true", help="try again what has failed before")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    add_options(parser, TrainConfig, without=_OWNED)


def sweep_command(args: argparse.Namespace) -> None:
    """Run ``sempa sweep``.

    Raises:
        SempaError: On a bad grid, settings, data or output folder, or if no run ends well.
    """
    fixed = option_values(TrainConfig, vars(args))
    for name in ("resume", "overwrite"):
        if name in fixed:
            raise SempaError(f"The config file {args.config} sets {name}, which a sweep sets itself. Leave it out.")
    if args.search is not None and args.search < 1:
        raise SempaError(f"--search is {args.search}. Expected the number of runs to make, 1 or more.")
    configs, varied = make_configs(fixed, read_grid(args.grid, args.assignments))
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise SempaError("A sweep needs the optuna package. Install it with: pip install 'sempa-st[train]'") from error
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
    """Return the settings of every point of a grid, no two the same, and the names of those that vary.

    Args:
        fixed: Settings that all points share, the output being the sweep's folder.
        grid: Settings of each point; they win over the fixed ones.

    Raises:
        SempaError: If the settings of a point are refused, or two points are the same.
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
        file: YAML file: keys are options of a training run, values lists, and the grid is their product; or a list of
            such mappings, whose points are put together. A single value stands for a list of one.
        assignments: More axes, each as ``name=value,value``; every point of the file is taken with each of their
            combinations.

    Raises:
        SempaError: On an unknown key, a value of the wrong type, an empty list, a key that is given twice, no grid at
            all, or one of too many points.
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
    words = [word.strip() for word in values.split(",")] if values.strip() else []
    return key.strip(), [_WORDS.get(word.lower(), word) for word in words], f"--set {text}"


def _axes(given: Iterable[tuple[Any, Any, str]]) -> dict[str, list[Any]]:
    """Return the checked values of each option, from keys with their values and where they stand."""
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


def add_sweep(commands: Any) -> None:
    """Add ``sempa sweep``."""
    add_sweep_options(
        add_command(commands, "sweep", sweep_command, "Train a grid of settings and keep the best model.")
    )
