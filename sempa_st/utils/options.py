"""One parser for a dataclass of options: defaults, then a YAML file, then command-line flags."""

from __future__ import annotations

import argparse
import errno
import math
import reprlib
import types
from collections.abc import Collection, Mapping
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from sempa_st.errors import SempaError
from sempa_st.utils.assets import PACKAGE
from sempa_st.utils.files import UTF8

Options = TypeVar("Options")
_LARGEST_YAML = 1 << 20
_MOST_VALUES = 100_000
_MOST_BITS = 1024


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """Declare a dataclass field that is also a YAML key and a command-line flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


def split_list(text: str) -> list[str]:
    """Split a comma-separated list and strip its entries; empty ones are kept, for the caller to refuse or drop.

    >>> split_list("0, 4,6-17")
    ['0', '4', '6-17']
    """
    return [part.strip() for part in text.split(",")]


def add_options(
    parser: argparse.ArgumentParser,
    options: type,
    *,
    groups: Mapping[str, Collection[str]] | None = None,
    without: Collection[str] = (),
) -> None:
    """Add ``--config`` and a flag for each field of a dataclass; a flag that is not given sets no attribute.

    Args:
        parser: Parser to add the flags to.
        options: The dataclass.
        groups: Names of fields by the heading of their group in the help.
        without: Fields that get no flag.
    """
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with any of these options, or the name of a shipped one"
    )
    group_of: dict[str, argparse._ArgumentGroup] = {}
    for title, names in (groups or {}).items():
        group_of |= dict.fromkeys(names, parser.add_argument_group(title))
    types_by_name = get_type_hints(options)
    for item in fields(options):
        if item.name not in without:
            _add_flag(group_of.get(item.name, parser), item, _plain_type(types_by_name[item.name]))


def _add_flag(parser: argparse._ActionsContainer, item: Field[Any], kind: type) -> None:
    flag = "--" + item.name.replace("_", "-")
    help = item.metadata["help"] + ("" if item.default in (None, "") else f" (default: {item.default})")
    common: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "help": help.replace("%", "%%")}
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
    else:
        metavar = None if item.metadata["choices"] else {int: "N", float: "X"}.get(kind, "TEXT")
        parser.add_argument(flag, type=kind, choices=item.metadata["choices"], metavar=metavar, **common)


def read_options(options: type[Options], given: Mapping[str, Any]) -> Options:
    """Build the dataclass from parsed arguments, on top of the YAML file that ``given["config"]`` may name.

    Raises:
        SempaError: On an unknown key or a value of the wrong type in the file, or a value the dataclass refuses.
    """
    return options(**option_values(options, given))


def option_values(options: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the YAML file or a flag sets, for :func:`read_options`.

    Raises:
        SempaError: On an unknown key or a value of the wrong type in the file.
    """
    values: dict[str, Any] = {}
    if path := given.get("config"):
        values = _read_config(path, options)
    known = {item.name for item in fields(options)}
    return values | {name: value for name, value in given.items() if name in known}


def convert_option(options: type, key: Any, value: Any, where: str) -> tuple[str, Any]:
    """Return the field that ``key`` names (with - or _) and ``value`` in that field's type.

    Raises:
        SempaError: If there is no such field, or the value is of the wrong type; the message starts with ``where``.
    """
    name = str(key).replace("-", "_")
    known = [item.name for item in fields(options)]
    if name not in known:
        raise SempaError(f"{where} has the unknown key {key!r}. Known keys: {', '.join(known)}.")
    return name, _convert(value, get_type_hints(options)[name], f"{where}: {key}")


def load_yaml(path: str | Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        SempaError: If it cannot be read, is not YAML, or is too large for options, its aliases expanded.
    """
    import yaml

    try:
        text = _text(Path(path))
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        values = _values_under(node, {})
        content = loader.construct_document(node) if node is not None and values <= _MOST_VALUES else None
    except OSError as error:
        raise SempaError(f"The file {path} cannot be read ({error.strerror}). Check the path.") from error
    except Exception as error:  # constructors of single values raise errors of many types
        raise SempaError(f"The file {path} is not YAML: {type(error).__name__}: {error}") from error
    if values > _MOST_VALUES:
        raise SempaError(f"The file {path} holds {values:,} values. Expected options, of {_MOST_VALUES:,} at most.")
    return content


def _text(path: Path) -> str:
    # A pipe or device may never end.
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file")
    if path.stat().st_size > _LARGEST_YAML:
        raise OSError(errno.EFBIG, f"it is larger than {_LARGEST_YAML} bytes")
    return path.read_text(encoding=UTF8)


def _values_under(node: Any, known: dict[int, int]) -> int:
    """Count the values in a YAML document; those of an alias count each time that it is used."""
    if node is None or isinstance(node.value, str):
        return 1
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # too many, should the node contain itself
        children = [child for item in node.value for child in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_values_under(child, known) for child in children)
    return known[id(node)]


def shipped_configs() -> dict[str, Path]:
    """Return the configuration files that the package ships, by name."""
    folder = PACKAGE / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _read_config(path: str, options: type) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        if path not in shipped_configs():
            names = ", ".join(shipped_configs())
            raise SempaError(f"The config file {path} cannot be read: there is no such file. Shipped ones: {names}.")
        file = shipped_configs()[path]
    content = load_yaml(file)
    if not isinstance(content, dict):
        raise SempaError(f"The config file {path} does not hold keys and values. Expected lines such as 'beta: 0.1'.")
    return dict(convert_option(options, key, value, f"The config file {path}") for key, value in content.items())


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
        if (kind is int and float(value) != converted) or (kind is float and not math.isfinite(converted)):
            raise ValueError
        return converted
    except (TypeError, ValueError, OverflowError) as error:
        expected = f"a value of type {kind.__name__}" + (", and finite" if kind is float else "")
        # Python writes out no integer of thousands of digits.
        huge = isinstance(value, int) and value.bit_length() > _MOST_BITS
        shown = f"a number of {value.bit_length()} bits" if huge else reprlib.repr(value)
        raise SempaError(f"{where} is {shown}. Expected {expected}.") from error


def _plain_type(annotation: Any) -> type:
    """Return ``X`` for ``X`` and for ``X | None``."""
    if isinstance(annotation, types.UnionType):
        annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
    assert isinstance(annotation, type)
    return annotation
