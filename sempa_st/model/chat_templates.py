"""Chat templates are programs: one found in a folder is tried out before this process renders it.

It is rendered for conversations such as it will get, in a process that may take little time and memory
(:mod:`sempa_st.model.template_trial`). That finds a template that is slow or large for these; one that is written to
tell them from others, and to be slow for the others alone, it cannot find.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from sempa_st.errors import SempaError
from sempa_st.model.templates import EMBEDDING_TEMPLATES

_CHILD = Path(__file__).with_name("template_trial.py")
_LONGEST_TEMPLATE = 1 << 20
_SECONDS, _BYTES = 5, 1 << 30
"""Processor time and memory of all renderings of a template; the process itself needs 0.2 s and 50 MB."""
_WAIT = 30
"""Seconds until an answer must be there: more, as the processor may be busy."""
_MOST_FIXED, _MOST_TIMES = 100_000, 64
"""Characters that may be written: of the template's own, and for each of the conversation's."""
_TIMES = 25
"""How often one short sentence is rendered: what is slow for each of thousands must be too slow here."""
_TURNS = 25
"""Questions with answers in the longest conversation, as a prompt with examples has them."""
_LONG = 'It\'s "one" \\ two;\n\t<three> 四 ä, '


def check_chat_templates(templates: dict[str, str] | str | None, folder: str | Path, tokens: dict[str, str]) -> None:
    """Raise :class:`SempaError` if a chat template is broken, or takes too much time or memory.

    Args:
        templates: A tokenizer's only one, or all by name.
        folder: Where they come from, for a message.
        tokens: The tokenizer's special tokens by name, which templates may write.
    """
    for name, text in (templates if isinstance(templates, dict) else {"default": templates}).items():
        if text:
            _check(f"The chat template {name!r} in {folder}", text, tokens)


def check_embedding_template(name: str, text: str, tokens: dict[str, str]) -> None:
    """Raise :class:`SempaError` if a chat template is not fit, or does not render a sentence alone to a text with it.

    Args:
        name: What to call it in a message.
        text: The template.
        tokens: The tokenizer's special tokens by name.
    """
    _check(name, text, tokens, embeds=True)


def _check(name: str, text: str, tokens: dict[str, str], *, embeds: bool = False) -> None:
    bos = tokens.get("bos_token", "")
    if any(text == own.jinja(start=start) for own in EMBEDDING_TEMPLATES.values() for start in ("", bos, bos + " ")):
        return
    if len(text) > _LONGEST_TEMPLATE:
        raise SempaError(f"{name} has {len(text):,} characters. Expected a template, of {_LONGEST_TEMPLATE:,} at most.")
    try:
        tried = _tried(text, tuple(sorted(tokens.items())))
    except (OSError, subprocess.TimeoutExpired) as error:  # another time it may be another answer
        raise SempaError(
            f"{name} cannot be tried out by {sys.executable!r} in a process of its own ({error}). Mend or remove the "
            "template, or let Python start a process."
        ) from error
    fault = tried.get("fault")
    if embeds and not fault:
        first, second = tried["outcomes"][:2]
        if raised := first.get("error") or second.get("error"):
            fault = f"cannot be rendered for one sentence ({raised})"
        elif first == second:
            fault = "gives the same text for two sentences"
    if fault:
        raise SempaError(f"{name} {fault}. Mend or remove it, or restore the file from where it came.")


@functools.lru_cache(maxsize=64)
def _tried(text: str, tokens: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Return the answer of :func:`sempa_st.model.template_trial.answer`; raises what :mod:`subprocess` does."""
    limits = {"seconds": _SECONDS, "bytes": _BYTES, "fixed": _MOST_FIXED, "times": _MOST_TIMES}
    task = limits | {"template": text, "tokens": dict(tokens), "conversations": _conversations()}
    done = subprocess.run(
        [sys.executable or "", "-P", "-S", str(_CHILD)],  # without what site-packages run at a start
        input=json.dumps(task),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # Jinja is where it is for us
        timeout=_WAIT,
    )
    if done.returncode < 0:
        ended = signal.strsignal(-done.returncode)
        return {"fault": f"takes too much time or memory (over {_SECONDS} s or {_BYTES >> 20} MiB: {ended})"}
    with contextlib.suppress(ValueError):
        answer: dict[str, Any] = json.loads(done.stdout)
        return {**answer, "outcomes": answer.get("outcomes", [])[:2]}  # the others may be long
    return {"fault": f"cannot be tried out (exit code {done.returncode}: {done.stderr.strip()[-200:]})"}


def _conversations() -> list[tuple[list[dict[str, Any]], bool]]:
    """Return conversations such as templates get, each with whether the beginning of the answer is asked for."""
    contents: tuple[Any, ...] = ("A cat sleeps.", "Who saw two dogs", _LONG * 600, [{"type": "text", "text": "A cat."}])
    first, second, long, in_parts = ({"role": "user", "content": content} for content in contents)
    system = {"role": "system", "content": "You are a helpful assistant."}
    answer = {"role": "assistant", "content": "An animal is asleep."}
    alone = [[second], *[[first]] * _TIMES, [long], [in_parts]]
    turns = [[system, first], [first, answer], [system, first, answer], [*[first, answer] * _TURNS, first]]
    return [(messages, asked) for asked in (False, True) for messages in alone + turns]
