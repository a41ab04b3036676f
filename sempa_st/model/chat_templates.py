"""Try out the chat templates of a model folder in a separate process before this process renders them.

A chat template is a program. It is first rendered for typical conversations in a process with limited time and memory
(:mod:`sempa_st.model.template_trial`). This detects templates that are slow or produce huge output for such
conversations. It cannot detect a template that recognises the trial and is slow for other conversations only.
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
MAX_TEMPLATE_LENGTH = 1 << 20
_SECONDS, _BYTES = 5, 1 << 30
"""Limits on CPU time and memory for all renderings of a template; the process itself needs 0.2 s and 50 MB."""
_WAIT = 30
"""Timeout in seconds of wall-clock time: longer than the CPU time, since the machine may be busy."""
_MAX_FIXED, _MAX_RATIO = 100_000, 64
"""Maximum length of the output: a fixed number of characters, plus this many per character of the conversation."""
_REPEATS = 25
"""Renderings of one short sentence, so that a template that is slow for every sentence exceeds the time limit."""
_TURNS = 25
"""Questions with answers in the longest conversation, like in a few-shot prompt."""
_LONG = 'It\'s "one" \\ two;\n\t<three> 四 ä, '


def check_chat_templates(templates: dict[str, str] | str | None, folder: str | Path, tokens: dict[str, str]) -> None:
    """Raise :class:`SempaError` if a chat template is invalid, or takes too much time or memory.

    Args:
        templates: The tokenizer's only chat template, or all of them by name.
        folder: Folder that they come from, for the message.
        tokens: The tokenizer's special tokens by name, which templates may use.
    """
    for name, text in (templates if isinstance(templates, dict) else {"default": templates}).items():
        if text:
            check_embedding_template(f"The chat template {name!r} in {folder}", text, tokens, embeds=False)


def check_embedding_template(name: str, text: str, tokens: dict[str, str], *, embeds: bool = True) -> None:
    """Raise :class:`SempaError` if a chat template cannot embed: it must render a single sentence, and include it.

    Args:
        name: Description of the template, for the message.
        text: The template.
        tokens: The tokenizer's special tokens by name.
        embeds: False to check only that it is valid and takes little time and memory.
    """
    bos = tokens.get("bos_token", "")
    if any(text == own.jinja(start=start) for own in EMBEDDING_TEMPLATES.values() for start in ("", bos, bos + " ")):
        return
    if len(text) > MAX_TEMPLATE_LENGTH:
        raise SempaError(f"{name} has {len(text):,} characters. Expected at most {MAX_TEMPLATE_LENGTH:,}.")
    try:
        result = _tried(text, tuple(sorted(tokens.items())))
    except (OSError, subprocess.TimeoutExpired) as error:  # raised and not returned, so that it is not cached
        raise SempaError(
            f"{name} cannot be tried out by {sys.executable!r} in a process of its own ({error}). Fix or remove the "
            "template, or allow Python to start a process."
        ) from error
    fault = result.get("fault")
    if embeds and not fault:
        first, second = result["outcomes"][:2]
        if raised := first.get("error") or second.get("error"):
            fault = f"cannot be rendered for one sentence ({raised})"
        elif first == second:
            fault = "gives the same text for two sentences"
    if fault:
        raise SempaError(f"{name} {fault}. Fix or remove it, or restore or download the file again.")


@functools.lru_cache(maxsize=64)
def _tried(text: str, tokens: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Return the result of :func:`sempa_st.model.template_trial.answer` in a separate process; results are cached.

    Raises:
        OSError: If the process cannot be started.
        subprocess.TimeoutExpired: If it does not answer in time.
    """
    limits = {"seconds": _SECONDS, "bytes": _BYTES, "fixed": _MAX_FIXED, "times": _MAX_RATIO}
    task = limits | {"template": text, "tokens": dict(tokens), "conversations": _conversations()}
    done = subprocess.run(
        [sys.executable or "", "-P", "-S", str(_CHILD)],  # -S: do not run the startup code of site-packages
        input=json.dumps(task),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # where Jinja is found
        timeout=_WAIT,
    )
    if done.returncode < 0:
        cause = signal.strsignal(-done.returncode)
        return {"fault": f"takes too much time or memory (over {_SECONDS} s or {_BYTES >> 20} MiB: {cause})"}
    with contextlib.suppress(ValueError):
        answer: dict[str, Any] = json.loads(done.stdout)
        return {**answer, "outcomes": answer.get("outcomes", [])[:2]}  # only these are used, and the others may be long
    return {"fault": f"cannot be tried out (exit code {done.returncode}: {done.stderr.strip()[-200:]})"}


def _conversations() -> list[tuple[list[dict[str, Any]], bool]]:
    """Return typical conversations, each with the value of ``add_generation_prompt``; the first two are sentences."""
    contents: tuple[Any, ...] = ("A cat sleeps.", "Who saw two dogs", _LONG * 600, [{"type": "text", "text": "A cat."}])
    first, second, long, in_parts = ({"role": "user", "content": content} for content in contents)
    system = {"role": "system", "content": "You are a helpful assistant."}
    answer = {"role": "assistant", "content": "An animal is asleep."}
    alone = [[second], *[[first]] * _REPEATS, [long], [in_parts]]
    turns = [[system, first], [first, answer], [system, first, answer], [*[first, answer] * _TURNS, first]]
    return [(messages, prompt) for prompt in (False, True) for messages in alone + turns]
