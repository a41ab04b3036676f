"""Render a chat template in a process with limited time and memory.

This file runs as a script: it reads a task from standard input and writes the result to standard output, both as JSON.
It imports only Jinja and the standard library, so that it starts fast.
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
_MAX_ERROR = 200
"""Characters shown of an error; its text may come from the template."""


class _Generation(Extension):
    """The tag ``generation`` of transformers, which marks the text that the model generates."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the body of the tag into a call block, which has its own scope as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> Any:
        return caller()


def limit_process(seconds: int, size: int) -> None:
    """Limit the CPU time (seconds) and memory (bytes) of this process, where the system supports it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        for kind, limit in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_AS, size),  # the last, since macOS may refuse it
        ):
            _, hard = resource.getrlimit(kind)
            if hard == resource.RLIM_INFINITY or hard > limit:
                resource.setrlimit(kind, (limit, hard))


def environment() -> ImmutableSandboxedEnvironment:
    """Return a sandboxed Jinja environment with the same extensions, filters and globals as that of transformers."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = tojson
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Render a template for several conversations.

    Args:
        task: A dictionary with the keys ``template``, the text; ``tokens``, the special tokens by name;
            ``conversations``, pairs of messages and ``add_generation_prompt``; ``fixed`` and ``times``, the maximum
            length of an output: ``fixed`` characters plus ``times`` per character of the conversation.

    Returns:
        ``{"outcomes": [...]}`` with ``{"text": ...}`` or ``{"error": ...}`` for each conversation, or
        ``{"fault": ...}`` if the template is invalid or takes too much.
    """
    try:
        template = environment().from_string(task["template"])
        return {"outcomes": [_outcome(template, task, *conversation) for conversation in task["conversations"]]}
    except _TOO_MUCH as error:
        return {"fault": f"takes too much time or memory ({_shown(error)})"}
    except Exception as error:  # of many types: Jinja compiles to Python, whose compiler may fail as well
        return {"fault": f"is not a Jinja template ({_shown(error)})"}


def _outcome(template: Template, task: dict[str, Any], messages: list[Any], prompt: bool) -> dict[str, str]:
    variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": prompt}
    try:
        text = template.render(**task["tokens"] | variables)
    except _TOO_MUCH:
        raise
    except Exception as error:  # a template is a program, and may raise anything
        return {"error": _shown(error)}
    length = sum(len(str(message["content"])) for message in messages)
    if len(text) > task["fixed"] + task["times"] * length:
        raise OverflowError(f"{len(text):,} characters for a conversation of {length:,}")
    return {"text": text}


def _shown(error: Exception) -> str:
    return repr(error)[:_MAX_ERROR]


if __name__ == "__main__":
    request = json.load(sys.stdin)
    limit_process(request["seconds"], request["bytes"])
    json.dump(answer(request), sys.stdout)
