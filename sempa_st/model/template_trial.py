"""Render a chat template as a process of its own, which may take little time and memory.

A script: it reads a task from standard input and writes what became of it to standard output, both as JSON. It imports
Jinja and the standard library alone, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_TOO_MUCH = (MemoryError, OverflowError, RecursionError)
_LONGEST_ERROR = 200
"""Characters of an error that are shown: its text may be the template's."""


class _Generation(Extension):
    """The tag ``generation`` of transformers, which marks what the model is to write."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Return a call of what stands inside, with a scope of its own as in transformers."""
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_called"), [], [], inside).set_lineno(line)

    def _called(self, caller: Any) -> Any:
        return caller()


def limit_process(seconds: int, size: int) -> None:
    """Bound this process's processor time in seconds and its memory in bytes, as far as the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        for kind, most in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_AS, size),  # the last, since macOS may refuse it
        ):
            _, hard = resource.getrlimit(kind)
            if hard == resource.RLIM_INFINITY or hard > most:
                resource.setrlimit(kind, (most, hard))


def environment() -> ImmutableSandboxedEnvironment:
    """Return a sandbox set up as transformers sets up its own."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Return the ``outcomes`` of a task's conversations, each a ``text`` or an ``error``, or the template's ``fault``.

    Args:
        task: ``template``, its text; ``tokens``, the special tokens by name; ``conversations``, each a pair of messages
            and whether the answer's beginning is asked for; ``fixed`` and ``times``, the most characters that may be
            written, of its own and for each of the conversation's.
    """
    try:
        template = environment().from_string(task["template"])
        return {"outcomes": [_outcome(template, task, *conversation) for conversation in task["conversations"]]}
    except _TOO_MUCH as error:
        return {"fault": f"takes too much time or memory ({_shown(error)})"}
    except Exception as error:  # of many types: some faults are Python's, which Jinja compiles to
        return {"fault": f"is not a Jinja template ({_shown(error)})"}


def _outcome(template: Template, task: dict[str, Any], messages: list[Any], prompt: bool) -> dict[str, str]:
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": prompt}
    try:
        text = template.render(**task["tokens"] | given)
    except _TOO_MUCH:
        raise
    except Exception as error:  # a template is a program, and may raise anything
        return {"error": _shown(error)}
    read = sum(len(str(message["content"])) for message in messages)
    if len(text) > task["fixed"] + task["times"] * read:
        raise OverflowError(f"{len(text):,} characters for a conversation of {read:,}")
    return {"text": text}


def _shown(error: Exception) -> str:
    return repr(error)[:_LONGEST_ERROR]


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    limit_process(asked["seconds"], asked["bytes"])
    json.dump(answer(asked), sys.stdout)
