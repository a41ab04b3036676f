"""Changes to what enters or leaves another library's module, seen by one thread only.

A hook that is put on a module for the time of a pass is run by every other thread that uses the module meanwhile. The
hooks here stay on the module for good and do nothing, unless the context of the thread that runs it says so
(:mod:`contextvars`; transformers records hidden states in the same way).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any, NamedTuple

from torch import nn

Before = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
"""Takes the arguments of a call, by position and by name, and returns those to use in their stead."""
After = Callable[[Any], Any]
"""Takes what a call returned, and returns what to return in its stead."""
_MARK = "_sempa_st_editable"


class _Edit(NamedTuple):
    module: nn.Module
    before: Before | None
    after: After | None


_EDITS: ContextVar[tuple[_Edit, ...]] = ContextVar("sempa_st_edits", default=())
_INSTALLING = Lock()


@contextmanager
def edited(module: nn.Module, *, before: Before | None = None, after: After | None = None) -> Iterator[None]:
    """Change what enters or leaves ``module``, for the time of a block and in this thread only.

    Args:
        module: Any module; hooks that look for such changes are put on it once and stay.
        before: Change of the arguments. It may call ``module.forward`` itself, which runs no hooks.
        after: Change of the output. Of several blocks around a call, the outermost one's comes first.
    """
    _make_editable(module)
    token = _EDITS.set((*_EDITS.get(), _Edit(module, before, after)))
    try:
        yield
    finally:
        _EDITS.reset(token)


def _make_editable(module: nn.Module) -> None:
    # The mark is copied and pickled together with the hooks. Not hasattr(): some wrappers pass it on to what they wrap.
    if _MARK in vars(module):
        return
    with _INSTALLING:
        if _MARK not in vars(module):
            module.register_forward_pre_hook(_before, with_kwargs=True)
            module.register_forward_hook(_after)
            setattr(module, _MARK, True)


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for edit in _EDITS.get():
        if edit.module is module and edit.before is not None:
            args, kwargs = edit.before(args, kwargs)
    return args, kwargs


def _after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    for edit in _EDITS.get():
        if edit.module is module and edit.after is not None:
            output = edit.after(output)
    return output


def _new_lock() -> None:
    # A process forked while another thread held the lock would wait for it for ever.
    global _INSTALLING
    _INSTALLING = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)
