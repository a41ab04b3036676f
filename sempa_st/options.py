"""One parser for a dataclass of options: defaults, then a YAML file, then command-line flags."""

from __future__ import annotations

import argparse
import types
from collections.abc import Mapping
from dataclasses import Field, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from sempa_st.errors import SempaError

Options = TypeVar("Options")


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """Declare a dataclass field that is also a YAML key and a command-line flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Add ``--config`` and a flag for each field of a dataclass; a flag that is not given leaves no trace."""
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with any of the options below (or the name of a shipped one)"
    )
    types_by_name = get_type_hints(options)
    for item in fields(options):
        flag = "--" + item.name.replace("_", "-")
        help = item.metadata["help"] + ("" if item.default in (None, "") else f" (default: {item.default})")
        kind = _plain_type(types_by_name[item.name])
        common: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "help": help.replace("%", "%%")}
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        else:
            parser.add_argument(
                flag, type=kind, choices=item.metadata["choices"], metavar=_metavar(item, kind), **common
            )


def read_options(options: type[Options], given: Mapping[str, Any]) -> Options:
    """Build the dataclass from parsed arguments, on top of the YAML file that ``given["config"]`` may name.

    Raises:
        SempaError: On an unknown key or a value of the wrong type in the file, or a value the dataclass refuses.
    """
    known = {item.name: item for item in fields(options)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    if path := given.get("config"):
        values = _read_yaml(path, options, known)
    values.update({name: value for name, value in given.items() if name in known})
    return options(**values)


def shipped_configs() -> dict[str, Path]:
    """Return the configuration files that the package ships, by name."""
    folder = Path(str(resources.files("sempa_st"))) / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _read_yaml(path: str, options: type, known: Mapping[str, Field[Any]]) -> dict[str, Any]:
    import yaml

    file = Path(path)
    if not file.is_file():
        file = shipped_configs().get(path, file)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SempaError(
            f"The config file {path} cannot be read ({error.strerror}). Shipped ones: {', '.join(shipped_configs())}."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SempaError(f"The config file {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise SempaError(f"The config file {path} does not hold keys and values. Expected lines such as 'beta: 0.1'.")
    types_by_name = get_type_hints(options)
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise SempaError(f"The config file {path} has the unknown key {key!r}. Known keys: {', '.join(known)}.")
        values[name] = _convert(value, types_by_name[name], f"{path}: {key}")
    return values


def _convert(value: Any, annotation: Any, where: str) -> Any:
    kind = _plain_type(annotation)
    if value is None and type(None) in get_args(annotation):
        return None
    try:
        if value is None or isinstance(value, list | dict):
            raise ValueError
        if kind is bool or isinstance(value, bool):
            if not isinstance(value, bool) or kind is not bool:
                raise ValueError
            return value
        converted = kind(value)
        if kind is int and float(value) != converted:
            raise ValueError
        return converted
    except (TypeError, ValueError) as error:
        raise SempaError(f"{where} is {value!r}. Expected a value of type {kind.__name__}.") from error


def _plain_type(annotation: Any) -> type:
    """Return ``X`` for ``X`` and for ``X | None``."""
    if isinstance(annotation, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    assert isinstance(annotation, type)
    return annotation


def _metavar(item: Field[Any], kind: type) -> str | None:
    if item.metadata["choices"]:
        return None
    return {int: "N", float: "X"}.get(kind, "TEXT")
