"""The model that a run trains: the base with a new adapter or with that of ``--from``, or the base itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from sempa_st.errors import SempaError
from sempa_st.model.adapter import attach_adapter, train_adapter
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.tokenizer import prefix_tokens, suffix_tokens
from sempa_st.training.inputs import RunInputs


def tuned_model(inputs: RunInputs) -> Any:
    """Return the model to train: the base itself, or the frozen base with an adapter.

    Raises:
        SempaError: If the base cannot take such an adapter.
    """
    if inputs.start:
        return _started(inputs, inputs.start.folder.path)
    if inputs.config.tuning == "full":
        return inputs.model
    if inputs.config.activation == "template":
        activated = _activated(inputs, suffix_tokens)
        _check_activation(inputs.scorer.module(activated))
        return activated
    if inputs.config.activation == "sentence":
        # Training uses only sentences under the template, where this adapter acts on every token. So it is trained as a
        # plain adapter, with the same initialisation.
        with torch.random.fork_rng():
            activated = _activated(inputs, prefix_tokens)
            _check_activation(inputs.scorer.module(activated))
            activated.unload()
    return get_peft_model(inputs.model, inputs.adapter_settings())


def _activated(inputs: RunInputs, invocation_tokens: Callable[[Any, str], list[int]]) -> Any:
    """Return the model with an adapter that is activated by some tokens of the template."""
    invocation = invocation_tokens(inputs.scorer.tokenizer, inputs.config.template)
    try:
        return get_peft_model(inputs.model, inputs.adapter_settings(invocation))
    except ValueError as error:
        raise SempaError(
            f"--activation does not work with {type(inputs.model).__name__}: PEFT has no activated form for all of its "
            f"layers ({error}). Omit it for this base."
        ) from error


def _started(inputs: RunInputs, folder: Path) -> Any:
    """Return the base with the adapter in ``folder``, to be trained further."""
    config = inputs.config
    settings: dict[str, Any] = {"lora_dropout": config.lora_dropout}
    if config.activation == "sentence":  # see above: it is trained as a plain adapter
        settings["alora_invocation_tokens"] = None
    tuned = attach_adapter(inputs.model, folder, inputs.base.name, **settings)
    train_adapter(tuned)
    if config.activation == "template":
        _check_activation(inputs.scorer.module(tuned))
    return tuned


def _check_activation(module: PromptEOL) -> None:
    """Raise :class:`SempaError` if some layer of this architecture does not tell PEFT the position of a token."""
    features = {name: tensor.to(module.model.device) for name, tensor in module.preprocess(["A cat", "A"]).items()}
    try:
        with torch.no_grad():
            module(features)
    except (IndexError, RuntimeError) as error:
        raise SempaError(
            f"--activation does not work with {type(module.decoder).__name__}: its layers hide the positions of tokens "
            f"from PEFT ({error}). Omit it for this base."
        ) from error


@contextmanager
def explain_dropout() -> Iterator[None]:
    """Turn PEFT's refusal of dropout on an adapted parameter that is no layer, such as an expert's, into an error."""
    try:
        yield
    except ValueError as error:
        if "lora_dropout" not in str(error):
            raise
        raise SempaError(f"--lora-dropout does not work with this base ({error}) Expected 0.") from error
