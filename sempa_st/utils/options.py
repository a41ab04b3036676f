"""Read a dataclass of options from its defaults, a YAML file and command-line flags, each overriding the one before."""

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
_MAX_YAML_BYTES = 1 << 20
_MAX_VALUES = 100_000
_MAX_BITS = 1024


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """Declare a dataclass field that is also a YAML key and a command-line flag.

    Args:
        default: Default value.
        help: Help text of the flag.
        choices: Allowed values of the flag; any when None.
    """
    return field(default=default, metadata={"help": help, "choices": choices})


def public_name(name: str) -> str:
    """Return the name of a field as a key or flag: without the underscore after what is a keyword in Python.

    >>> public_name("from_"), public_name("max_length")
    ('from', 'max_length')
    """
    return name.removesuffix("_")


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
    group_of: dict[str, Any] = {}
    for title, names in (groups or {}).items():
        group_of |= dict.fromkeys(names, parser.add_argument_group(title))
    types_by_name = get_type_hints(options)
    for item in fields(options):
        if item.name not in without:
            _add_flag(group_of.get(item.name, parser), item, _plain_type(types_by_name[item.name]))


def _add_flag(parser: Any, item: Field[Any], kind: type) -> None:
    flag = "--" + public_name(item.name).replace("_", "-")
    help = item.metadata["help"] + ("" if item.default in (None, "") else f" (default: {item.default})")
    common: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "help": help.replace("%", "%%")}
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
    else:
        metavar = None if item.metadata["choices"] else {int: "N", float: "X"}.get(kind, "TEXT")
        parser.add_argument(flag, type=kind, choices=item.metadata["choices"], metavar=metavar, **common)


def read_options(options: type[Options], given: Mapping[str, Any]) -> Options:
    """Build the dataclass from parsed arguments and the YAML file that ``given["config"]`` may name.

    Args:
        options: The dataclass.
        given: Parsed arguments by name; they override the file.

    Raises:
        SempaError: On an unknown key or a value of the wrong type in the file, or a value that the dataclass rejects.
    """
    return options(**option_values(options, given))


def option_values(options: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the YAML file or a flag sets, with their values; see :func:`read_options`.

    Raises:
        SempaError: On an unknown key or a value of the wrong type in the file.
    """
    values: dict[str, Any] = {}
    if path := given.get("config"):
        values = _read_config(path, options)
    known = {item.name for item in fields(options)}
    return values | {name: value for name, value in given.items() if name in known}


def convert_option(options: type, key: Any, value: Any, where: str) -> tuple[str, Any]:
    """Return the name of the field called ``key`` and ``value`` converted to the type of the field.

    Args:
        options: The dataclass.
        key: Name of the field, with hyphens or underscores.
        value: Value as read from YAML or a flag.
        where: Start of an error message, such as the name of the file.

    Raises:
        SempaError: If there is no such field, or the value has the wrong type.
    """
    known = {public_name(item.name): item.name for item in fields(options)}
    name = known.get(public_name(str(key).replace("-", "_")), "")
    if not name:
        raise SempaError(f"{where} has the unknown key {key!r}. Known keys: {', '.join(known)}.")
    return name, _convert(value, get_type_hints(options)[name], f"{where}: {key}")


def load_yaml(path: str | Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        SempaError: If it cannot be read, is not YAML, or is too large, with its aliases expanded.
    """
    import yaml

    try:
        text = _text(Path(path))
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        count = _count_values(node, {})
        content = loader.construct_document(node) if node is not None and count <= _MAX_VALUES else None
    except OSError as error:
        raise SempaError(f"The file {path} cannot be read ({error.strerror}). Check the path.") from error
    except Exception as error:  # PyYAML's constructors of values let any exception through
        raise SempaError(f"The file {path} is not YAML: {type(error).__name__}: {error}") from error
    if count > _MAX_VALUES:
        raise SempaError(f"The file {path} contains {count:,} values. Expected at most {_MAX_VALUES:,}.")
    return content


def _text(path: Path) -> str:
    # Reading a pipe or device might never end.
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a file")
    if path.stat().st_size > _MAX_YAML_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {_MAX_YAML_BYTES} bytes")
    return path.read_text(encoding=UTF8)


def _count_values(node: Any, counts: dict[int, int]) -> int:
    """Count the values under a YAML node, those of an alias once for each use.

    Nested aliases can expand to exponentially many values, so they are counted without being expanded.

    Args:
        node: Node as PyYAML composed it.
        counts: Number of values by ``id`` of each node counted so far; updated.
    """
    if node is None or isinstance(node.value, str):
        return 1
    if id(node) not in counts:
        counts[id(node)] = _MAX_VALUES + 1  # a node that contains itself is always too large
        children = [child for item in node.value for child in (item if isinstance(item, tuple) else (item,))]
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(node)]


def shipped_configs() -> dict[str, Path]:
    """Return the configuration files of the package by name."""
    folder = PACKAGE / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _read_config(path: str, options: type) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        if path not in shipped_configs():
            names = ", ".join(shipped_configs())
            raise SempaError(f"The config file {path} cannot be read: there is no such file. Built-in names: {names}.")
        file = shipped_configs()[path]
    content = load_yaml(file)
    if not isinstance(content, dict):
        raise SempaError(f"The config file {path} is not a mapping of keys to values, with lines such as 'beta: 0.1'.")
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
        expected = f"a value of type {kind.__name__}" + (" that is finite" if kind is float else "")
        # Python refuses to print integers of thousands of digits.
        huge = isinstance(value, int) and value.bit_length() > _MAX_BITS
        shown = f"a number of {value.bit_length()} bits" if huge else reprlib.repr(value)
        raise SempaError(f"{where} is {shown}. Expected {expected}.") from error


def _plain_type(annotation: Any) -> type:
    """Return ``X`` for ``X`` and for ``X | None``."""
    if isinstance(annotation, types.UnionType):
        annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
    assert isinstance(annotation, type)
    return annotation
