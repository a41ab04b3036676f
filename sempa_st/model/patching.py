"""Patches of other libraries, and their private names: in this file and in no other.

Each says why it is there and on which versions it was seen. ``tests/model/test_patching.py`` fails when a library is
changed. This file needs nothing else of sempa_st (see ``prompt_eol.py``), and imports optional libraries by name:
transformers refuses a model folder whose import statements it cannot satisfy.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from importlib import import_module
from inspect import isroutine
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_ST = "sentence_transformers.SentenceTransformer"
OVERRIDDEN = {
    f"{_ST}._load_with_module_classes": ("model_name_or_path", "module_classes", "kwargs"),
    "transformers.Trainer._save": ("output_dir", "state_dict"),
    "transformers.Trainer._load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "trl.DPOTrainer._precompute_ref_logps": ("dataset", "name", "batch_size"),
    "lm_eval.models.huggingface.HFLM._loglikelihood_tokens": ("requests", "disable_tqdm", "override_bs"),
    "torch.nn.Module._save_to_state_dict": ("destination", "prefix", "keep_vars"),
}
"""Private methods that we override, with arguments: transformers 5.23, trl 1.16, lm-eval 0.4.13, torch 2.13, ST 6.2."""

# Any module of torch: arguments and output of its calls, by hooks. Seen in torch 2.13.

Before = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
"""Takes the positional and the keyword arguments of a call, and returns those to use instead."""
After = Callable[[Any], Any]
"""Takes the output of a call, and returns the output to use instead."""
_EDITABLE = "_sempa_st_editable"


class _Edit(NamedTuple):
    module: nn.Module
    before: Before | None
    after: After | None


_EDITS: ContextVar[tuple[_Edit, ...]] = ContextVar("sempa_st_edits", default=())
_INSTALLING = Lock()


@contextmanager
def edited(module: nn.Module, *, before: Before | None = None, after: After | None = None) -> Iterator[None]:
    """Change the arguments or the output of a module's calls, within a block and in this thread only.

    A hook that is registered for one forward pass also runs in every other thread that uses the module meanwhile. These
    are registered once, stay, and do nothing unless the thread's context (:mod:`contextvars`) says so.

    Args:
        module: Any module.
        before: Change of the arguments. It may call ``module.forward`` itself, which runs no hooks.
        after: Change of the output. Of nested blocks, the outermost one's change is made first.
    """
    _make_editable(module)
    token = _EDITS.set((*_EDITS.get(), _Edit(module, before, after)))
    try:
        yield
    finally:
        _EDITS.reset(token)


def _make_editable(module: nn.Module) -> None:
    # The mark is copied and pickled with the hooks. Not hasattr(): some wrappers pass it on to the module they wrap.
    if _EDITABLE in vars(module):
        return
    with _INSTALLING:
        if _EDITABLE not in vars(module):
            module.register_forward_pre_hook(_before, with_kwargs=True)
            module.register_forward_hook(_after)
            setattr(module, _EDITABLE, True)


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


if hasattr(os, "register_at_fork"):  # a process forked while another thread holds the lock would wait for it for ever
    os.register_at_fork(
        before=_INSTALLING.acquire, after_in_parent=_INSTALLING.release, after_in_child=_INSTALLING.release
    )


# PEFT: the tokens that an activated adapter (aLoRA) acts on. Seen in PEFT 0.21.

EVERY_TOKEN = -1
_PATCHED_ADAPTERS = "_sempa_st_patched_adapters"
_ACTS_ON: ContextVar[list[int] | int | None] = ContextVar("sempa_st_activated", default=None)


@contextmanager
def alora_acting_on(tokens: list[int] | int) -> Iterator[None]:
    """Tell the activated adapters of patched models (:func:`patch_alora`) their tokens, in this thread only.

    Args:
        tokens: For each sequence of the batch, the number of tokens at its end that the adapter acts on; or
            :data:`EVERY_TOKEN`.
    """
    token = _ACTS_ON.set(tokens)
    try:
        yield
    finally:
        _ACTS_ON.reset(token)


def alora_acts_on_every_token() -> bool:
    """Whether the activated adapters of patched models act on all tokens, in this thread (:func:`alora_acting_on`)."""
    return _ACTS_ON.get() == EVERY_TOKEN


def patch_alora(model: Any) -> None:
    """Make a PEFT model's activated adapters read from the thread's context which tokens they act on.

    PEFT has no public way to say so. Its own hooks, registered for one forward pass, run in the passes of all threads,
    and an exception leaves them behind. Nothing happens to a model without such an adapter, nor a second time.
    """
    if not hasattr(model, "get_base_model"):
        return
    configs = model.peft_config.items()
    names = {name for name, config in configs if getattr(config, "alora_invocation_tokens", None)}
    lora = model.base_model
    if names <= vars(lora).get(_PATCHED_ADAPTERS, set()):
        return
    for layer in model.modules():
        for name in names & getattr(layer, "lora_variant", {}).keys():
            variant = layer.lora_variant[name]
            variant.forward = partial(_forward_in_context, type(variant).forward)
    lora._enable_peft_forward_hooks = partial(_offsets_in_context, lora)
    setattr(lora, _PATCHED_ADAPTERS, names)


def _forward_in_context(
    forward: Callable[..., Tensor],
    layer: Any,
    *,
    active_adapter: str,
    x: Tensor,
    result: Tensor,
    alora_offsets: list[int | None] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Return a layer's output with the adapter's update; ``forward`` and the arguments are PEFT's."""
    acts_on = _ACTS_ON.get()
    if isinstance(acts_on, int):
        dropped = layer.lora_dropout[active_adapter](x)
        update: Tensor = layer.lora_B[active_adapter](layer.lora_A[active_adapter](dropped))
        return result + update * layer.scaling[active_adapter]
    offsets = alora_offsets if acts_on is None else acts_on
    return forward(layer, active_adapter=active_adapter, x=x, result=result, alora_offsets=offsets, **kwargs)


@contextmanager
def _offsets_in_context(lora: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Replace PEFT's method of ``lora`` that registers the hooks; the arguments are that method's."""
    offsets = kwargs.get("alora_offsets")
    # PEFT's own hooks stay for gradient checkpointing, whose layers run again outside the context, and for beam search,
    # which PEFT refuses in them.
    own = offsets is None or (kwargs.get("num_beams") or 1) > 1
    own = own or any(getattr(layer, "gradient_checkpointing", False) for layer in lora.modules())
    if not own:
        kwargs["alora_offsets"] = None
    context = nullcontext() if own else alora_acting_on(offsets or [])
    with type(lora)._enable_peft_forward_hooks(lora, *args, **kwargs), context:
        yield


# Transformers: the attention of a model, and tokenizers as they were saved. Seen in transformers 5.23.


def attention_implementation(config: Any) -> str:
    """Return the name of a model's attention function (``sdpa``, ``eager``, ...), which has a public setter only."""
    return str(config._attn_implementation)


def tokenizer_as_saved(folder: Path, class_name: str) -> Any:
    """Read a folder's ``tokenizer.json`` as a tokenizer of a class; return None where that may not give the same.

    Many classes, Gemma's too, rebuild it from lists of tokens and merges. They keep these and take three times as long.

    Args:
        folder: Folder with a saved fast tokenizer.
        class_name: Name of its class in transformers.
    """
    from transformers import TokenizersBackend
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    kind: Any = tokenizer_class_from_name(class_name) or object
    own = {name for name, value in vars(kind).items() if isroutine(value) or isinstance(value, property)}
    # A class with methods of its own may need what its constructor leaves.
    if kind.__bases__ != (TokenizersBackend,) or own != {"__init__"}:
        return None
    # The file contains the added tokens. Without this argument transformers parses it a second time to find them.
    tokenizer = TokenizersBackend.from_pretrained(str(folder), added_tokens_decoder={}, trust_remote_code=False)
    tokenizer.__class__ = kind  # its name is saved
    tokenizer.model_input_names = list(kind.model_input_names)
    return tokenizer


# Attributes of other libraries' modules and objects, replaced within a block and for all threads.


def compute_by(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let a module compute by ``forward``, in place of its class's own method, from now on."""
    module.forward = forward


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute of an object or a module by what ``make`` returns for its value."""
    own = name in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def completion_tokens_only() -> AbstractContextManager[None]:
    """Make TRL's fused LM head skip prompt and padding positions on a CPU too. Seen in trl 1.16.

    TRL skips them where Triton runs. Elsewhere it scores every position and discards most of the scores, which is three
    quarters of a step for a vocabulary of 262,144 tokens. The loss is the same.
    """
    return replaced(import_module("trl.trainer.utils"), "_use_triton", lambda original: lambda device: True)


def gguf_parsed_once() -> AbstractContextManager[None]:
    """Parse a GGUF file once: transformers 5.23 parses it for the settings and for the tensors, 20 s each."""
    return replaced(import_module("gguf"), "GGUFReader", functools.cache)


def without_harness_bars() -> AbstractContextManager[None]:
    """Hide the harness's progress bar for each task's prompts, which has no switch. Seen in lm-eval 0.4.13."""
    return replaced(import_module("lm_eval.api.task"), "tqdm", lambda original: lambda rows, **_: rows)


# Torch 2.13: products of eight-bit integers. Announced to go (pytorch/pytorch#184982), but no other way is as fast yet.


def pack_int8(weight: Tensor, scales: Tensor) -> Any:
    """Round a weight of shape (outputs, inputs) to multiples of ``scales`` (outputs,), and pack it for the kernel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        zeros = torch.zeros(len(scales), dtype=torch.long)
        rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(rounded, None)


def unpack_int8(packed: Any) -> tuple[Tensor, Tensor]:
    """Return the integers and the scales of a packed weight."""
    weight, _ = torch.ops.quantized.linear_unpack(packed)
    return weight.int_repr(), weight.q_per_channel_scales()


def linear_int8(states: Tensor, packed: Any) -> Tensor:
    """Return the product of states (..., inputs), rounded to 7 bits, with a packed weight: shape (..., outputs)."""
    output: Tensor = torch.ops.quantized.linear_dynamic(states, packed, True)
    return output
