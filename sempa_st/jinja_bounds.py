"""Bounds on the chat templates of a folder: they are programs, and a stranger's must not run for ever.

An embedding template is rendered for every sentence. Of such a one it is *shown* that its text is no longer than a
number of characters plus a few times the sentence; what that cannot be shown of is refused. A base's own chat template
may do more, and is only kept from what no chat template needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension

from sempa_st.errors import SempaError

_LONGEST_TEMPLATE = 1 << 20
_LARGEST_NUMBER = 100_000
_MOST_FIXED, _MOST_TIMES = 100_000, 64
_SPECIAL_TOKEN = 64
"""Characters that a variable stands for which is none of the messages'."""
_MESSAGES = 2
"""A system message and the sentence."""
_KEEPING = (
    *("capitalize", "lower", "upper", "title", "trim", "strip", "lstrip", "rstrip", "removeprefix", "removesuffix"),
    *("count", "length", "d", "default", "first", "last", "get", "safe", "string", "startswith", "endswith", "join"),
)
"""Filters and methods whose value is no longer than what they are given."""
_LISTING = ("list", "map", "reverse", "select", "selectattr", "reject", "rejectattr")
_OF_A_LIST = 10
"""Characters that a list, written as text, may need for one of its strings: the longest escape."""


class _Generation(Extension):
    """The tag ``generation`` of transformers, which marks a part of a template."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[nodes.Node]:
        """Return the statements inside."""
        next(parser.stream)
        statements: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return statements


class _UnboundedError(Exception):
    """What cannot be bounded, and in which line."""

    def __init__(self, what: str, node: nodes.Node) -> None:
        super().__init__(f"{what} in line {node.lineno}")


@dataclass(frozen=True)
class _Length:
    """A bound of a text's length: ``fixed`` characters, plus ``times`` those of the messages."""

    fixed: int = 0
    times: int = 0

    def __add__(self, other: _Length) -> _Length:
        return _Length(self.fixed + other.fixed, self.times + other.times)

    def __mul__(self, factor: int) -> _Length:
        return _Length(self.fixed * factor, self.times * factor)

    def __or__(self, other: _Length) -> _Length:
        return _Length(max(self.fixed, other.fixed), max(self.times, other.times))


def check_chat_templates(templates: dict[str, str] | str | None, folder: str | Path) -> None:
    """Raise :class:`SempaError` if a chat template is broken, or repeats something as no chat template needs to.

    Args:
        templates: A tokenizer's only one, or all by name.
        folder: Where they come from, for a message.
    """
    for name, text in (templates if isinstance(templates, dict) else {"default": templates or ""}).items():
        _check_repeats(f"The chat template {name!r} in {folder}", text)


def _check_repeats(name: str, text: str) -> None:
    tree = _parsed(name, text)
    try:
        for power in tree.find_all(nodes.Pow):
            raise _UnboundedError("a power", power)
        for number in tree.find_all(nodes.Const):
            if isinstance(number.value, int | float) and abs(number.value) > _LARGEST_NUMBER:
                raise _UnboundedError(f"the number {number.value}", number)
        for product in tree.find_all(nodes.Mul):
            if any(True for _ in product.find_all(nodes.Mul)):
                raise _UnboundedError("a product of products", product)
        for loop in tree.find_all(nodes.For):
            if _is_range(loop.iter) and any(_is_range(inner.iter) for inner in loop.find_all(nodes.For)):
                raise _UnboundedError("a loop over numbers inside another one", loop)
    except _UnboundedError as error:
        raise SempaError(f"{name} has {error}, and could run for ever. Mend or remove the template.") from error


def check_embedding_template(name: str, text: str) -> None:
    """Raise :class:`SempaError` unless it can be shown that an embedding template holds the sentence, a few times.

    Args:
        name: What to call it in a message.
        text: The template.
    """
    try:
        length = _statements(_parsed(name, text).body, {"messages": _Length(times=1)}, loops=0)
    except (_UnboundedError, RecursionError) as error:
        raise SempaError(
            f"{name} has {error}, so its length cannot be foreseen. Expected a template of text, conditions, "
            "assignments and the messages."
        ) from error
    if not 1 <= length.times <= _MOST_TIMES or length.fixed > _MOST_FIXED:
        raise SempaError(
            f"{name} gives up to {length.fixed:,} characters of its own and the sentence {length.times:,} times. "
            f"Expected at most {_MOST_FIXED:,}, and the sentence 1 to {_MOST_TIMES} times."
        )


def _parsed(name: str, text: str) -> nodes.Template:
    if len(text) > _LONGEST_TEMPLATE:
        raise SempaError(f"{name} has {len(text):,} characters. Expected a template, of {_LONGEST_TEMPLATE:,} at most.")
    try:
        return Environment(extensions=["jinja2.ext.loopcontrols", _Generation]).parse(text)
    except (TemplateSyntaxError, RecursionError, ValueError) as error:
        raise SempaError(f"{name} is not a Jinja template ({error}). Restore the file from where it came.") from error


def _is_range(node: nodes.Node) -> bool:
    calls = [*node.find_all(nodes.Call), *([node] if isinstance(node, nodes.Call) else [])]
    return any(isinstance(call.node, nodes.Name) and call.node.name == "range" for call in calls)


def _statements(body: Sequence[nodes.Node], known: dict[str, _Length], loops: int) -> _Length:
    """Return a bound of what statements write; ``known`` holds one for each variable, and only ever grows."""
    written = _Length()
    for node in body:
        match node:
            case nodes.Output():
                written += _sum(node.nodes, known)
            case nodes.Assign(target=nodes.Name(name=name)):
                known[name] = known.get(name, _Length()) | _length(node.node, known)
            case nodes.AssignBlock(target=nodes.Name(name=name), filter=None):
                known[name] = known.get(name, _Length()) | _statements(node.body, known, loops)
            case nodes.If():
                _length(node.test, known)
                written += _statements([*node.body, *node.elif_, *node.else_], known, loops)
            case nodes.For(target=nodes.Name(name=name), recursive=False) if not loops and _over_messages(node.iter):
                known[name] = _length(node.iter, known)
                if node.test is not None:
                    _length(node.test, known)
                written += _statements(node.body, known, loops + 1) * _MESSAGES
                written += _statements(node.else_, known, loops)
            case nodes.Continue() | nodes.Break():
                pass
            case _:
                raise _UnboundedError(f"a {type(node).__name__}", node)
    return written


def _over_messages(node: nodes.Node) -> bool:
    """Whether a loop goes over the messages, or some of them, and not over the letters of one."""
    match node:
        case nodes.Name(name="messages"):
            return True
        case nodes.Getitem(node=inner, arg=nodes.Slice()) | nodes.Filter(node=inner, name="list" | "reverse"):
            return inner is not None and _over_messages(inner)
    return False


def _sum(parts: Sequence[nodes.Node | None], known: dict[str, _Length]) -> _Length:
    return sum((_length(part, known) for part in parts if part is not None), _Length())


def _length(node: nodes.Node, known: dict[str, _Length]) -> _Length:
    """Return a bound of the length of an expression's value, written as text."""
    match node:
        case nodes.TemplateData():
            return _Length(len(node.data))
        case nodes.Const():
            return _Length(len(str(node.value)))
        case nodes.Name():
            return known.get(node.name, _Length(_SPECIAL_TOKEN))
        case nodes.Add() | nodes.Concat() | nodes.Sub() | nodes.Neg() | nodes.Slice():
            return _sum(list(node.iter_child_nodes()), known)
        case nodes.List() | nodes.Tuple():
            return _sum(node.items, known) * _OF_A_LIST
        case nodes.Getattr():
            return _length(node.node, known)
        case nodes.Getitem():
            _length(node.arg, known)
            return _length(node.node, known)
        case nodes.CondExpr():
            _length(node.test, known)
            return _length(node.expr1, known) | (_length(node.expr2, known) if node.expr2 else _Length())
        case nodes.And() | nodes.Or():
            return _length(node.left, known) | _length(node.right, known)
        case nodes.Not() | nodes.Compare() | nodes.Operand() | nodes.Test():
            _sum(list(node.iter_child_nodes(exclude=("kwargs",))), known)
            return _Length(len(str(False)))
        case nodes.Filter(node=nodes.Node() as value):
            return _applied(node, node.name, value, known)
        case nodes.Call(node=nodes.Name(name="raise_exception")):
            _sum(node.args, known)
            return _Length()
        case nodes.Call(node=nodes.Getattr(node=value, attr=name)):
            return _applied(node, name, value, known)
        case _:
            raise _UnboundedError(f"a {type(node).__name__}", node)


def _applied(node: nodes.Filter | nodes.Call, name: str, value: nodes.Node, known: dict[str, _Length]) -> _Length:
    """Return a bound of what a filter or method makes of a value."""
    length = _length(value, known)
    by_attribute = all(pair.key == "attribute" for pair in node.kwargs)
    if not by_attribute or node.dyn_args is not None or node.dyn_kwargs is not None:
        raise _UnboundedError(f"other arguments of {name}", node)
    match name, node.args:
        case "replace", [nodes.Const(value=str(old)), nodes.Const(value=str(new))] if old:
            return length * max(1, -(-len(new) // len(old)))
        case "join", [nodes.Const(value=str(between))]:
            return length * (1 + len(between))
        case _, args if name in _KEEPING:
            return length + _sum(args, known)
        case _, args if name in _LISTING and not (name == "map" and args):
            return (length + _sum(args, known)) * _OF_A_LIST
        case _:
            raise _UnboundedError(f"the filter or method {name}", node)
