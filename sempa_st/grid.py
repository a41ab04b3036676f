"""The grid of a sweep: which runs it asks for, checked and named before any of them starts. Standard library only."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sempa_st.config import TrainConfig
from sempa_st.errors import SempaError
from sempa_st.options import convert_option, load_yaml

SWEEP_OWNED = ("output", "resume", "overwrite")
"""What a sweep decides for each of its runs."""
_NOT_IDENTITY = (*SWEEP_OWNED, "data_dir", "device", "log_steps")
"""Where and how a run is made, and not what comes out of it."""
_NOT_IN_GRID = {
    **dict.fromkeys(SWEEP_OWNED, "the sweep sets it for each run"),
    **dict.fromkeys(("data_dir", "device", "log_steps"), "it does not tell two runs apart"),
    "dev": "scores on different pairs cannot be compared",
}
_LONGEST_NAME = 100
_MOST_POINTS = 10_000
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class Point:
    """One run that a sweep asks for.

    Args:
        config: All settings of the run; the output is the sweep's folder, and the run's own is set later.
        varied: The settings in which the points of the sweep differ.
    """

    config: TrainConfig
    varied: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The varied settings, to be read by a person."""
        return ", ".join(f"{name}={value}" for name, value in self.varied.items())

    @property
    def name(self) -> str:
        """The varied settings as a name for a folder, or a digest where they are too long for one."""
        parts = (f"{name}={re.sub('[^A-Za-z0-9._+-]', '-', str(value))}" for name, value in self.varied.items())
        name = ",".join(parts)
        return name if len(name) <= _LONGEST_NAME else self.digest

    @property
    def digest(self) -> str:
        """See :func:`settings_digest`."""
        return settings_digest(asdict(self.config))


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Return a short hash of the settings that decide the result of a run.

    Args:
        settings: Settings of a run, as in a config or a record. What is missing, as in the record of a version that
            had no such option, stands at its default; what is no setting is not looked at. Nor is what stands at its
            default, so that an option of a later version changes no digest.
    """
    identity = {
        item.name: settings[item.name]
        for item in fields(TrainConfig)
        if item.name not in _NOT_IDENTITY and settings.get(item.name, item.default) != item.default
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


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
    axes: dict[str, list[Any]] = {}
    for text in assignments:
        name, values = _axis_from_text(text)
        if name in axes:
            raise SempaError(f"--set gives {name} twice. Put all its values into one: --set {name}=value,value.")
        axes[name] = values
    grids = _grids_from_file(file) if file else [{}]
    for grid in grids:
        if both := grid.keys() & axes.keys():
            raise SempaError(f"{', '.join(sorted(both))} is both in {file} and in --set. Give it in one place.")
    if not file and not axes:
        raise SempaError("The sweep has no grid. Pass --grid FILE, or --set name=value,value for each option to vary.")
    count = sum(math.prod(map(len, {**grid, **axes}.values())) for grid in grids)
    if count > _MOST_POINTS:
        raise SempaError(f"The grid has {count:,} points, each a training run. Expected {_MOST_POINTS:,} at most.")
    return [point for grid in grids for point in _product({**grid, **axes})]


def make_points(fixed: Mapping[str, Any], grid: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return the points of a sweep, every one of them valid and no two the same.

    Args:
        fixed: Settings that all points share, the output being the sweep's folder.
        grid: Settings of each point; they win over the fixed ones.

    Raises:
        SempaError: If the settings of a point are refused, or two points are the same.
    """
    configs: list[TrainConfig] = []
    seen: dict[str, int] = {}
    for number, settings in enumerate(grid, 1):
        place = f"Point {number} of the grid ({', '.join(f'{name}={value}' for name, value in settings.items())})"
        try:
            config = TrainConfig(**{**fixed, **settings})
        except SempaError as error:
            raise SempaError(f"{place}: {error}") from error
        first = seen.setdefault(settings_digest(asdict(config)), number)
        if first != number:
            raise SempaError(f"{place} has the same settings as point {first}. Name each point once.")
        configs.append(config)
    names = list(dict.fromkeys(name for settings in grid for name in settings))
    varied = [name for name in names if len({getattr(config, name) for config in configs}) > 1] or names
    return [Point(config, {name: getattr(config, name) for name in varied}) for config in configs]


def _product(grid: Mapping[str, list[Any]]) -> Iterable[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _grids_from_file(file: str) -> list[dict[str, list[Any]]]:
    content = load_yaml(file)
    mappings = content if isinstance(content, list) else [content]
    if not mappings or not all(isinstance(mapping, dict) and mapping for mapping in mappings):
        raise SempaError(
            f"The grid file {file} does not hold options and their values. Expected lines such as "
            "'learning_rate: [1e-4, 2e-4]', or a list of such mappings."
        )
    return [_grid_from_mapping(mapping, f"The grid file {file}") for mapping in mappings]


def _grid_from_mapping(mapping: Mapping[Any, Any], where: str) -> dict[str, list[Any]]:
    grid: dict[str, list[Any]] = {}
    for key, value in mapping.items():
        name, values = _axis(key, value if isinstance(value, list) else [value], where)
        if name in grid:
            raise SempaError(f"{where} gives {name} twice, as {key!r} too. Put all its values into one list.")
        grid[name] = values
    return grid


def _axis_from_text(text: str) -> tuple[str, list[Any]]:
    key, sign, values = text.partition("=")
    if not sign:
        raise SempaError(f"--set {text} has no '='. Expected name=value,value, such as learning_rate=1e-4,2e-4.")
    given = [value.strip() for value in values.split(",")] if values.strip() else []
    return _axis(key.strip(), [_WORDS.get(value.lower(), value) for value in given], f"--set {text}")


def _axis(key: Any, values: list[Any], where: str) -> tuple[str, list[Any]]:
    if not values:
        raise SempaError(f"{where} has no value for {key}. Expected a list of at least one.")
    converted = [convert_option(TrainConfig, key, value, where) for value in values]
    name = converted[0][0]
    if name in _NOT_IN_GRID:
        raise SempaError(f"{where} varies {name}, which a sweep cannot: {_NOT_IN_GRID[name]}. Leave it out.")
    return name, [value for _, value in converted]
