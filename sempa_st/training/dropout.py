"""Switch off the dropout of a base, so that policy and reference differ by what is trained and by nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sempa_st.errors import SempaError

_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_NUM_TEST_TOKENS = 8


def disable_dropout(model: PreTrainedModel) -> None:
    """Set every dropout rate of a model to 0, whatever mode it is in.

    Architectures keep their rates in three kinds of places: in dropout modules, in numbers of other modules that
    functional dropout reads (OPT's ``dropout`` and ``layerdrop``, Llama's ``attention_dropout``), and in the config,
    which some read in each forward pass (Falcon). All of them have ``drop`` in their names. So the config of a fully
    tuned model says 0, too: the rates it was trained with.

    Args:
        model: Base model, before an adapter is attached: the adapter's own dropout stays.
    """
    for module in model.modules():
        if isinstance(module, _MODULES):
            module.p = 0.0
        _zero_rates(module)
    for config in (model.config, model.config.get_text_config()):
        _zero_rates(config)


def _zero_rates(holder: Any) -> None:
    for name, value in list(vars(holder).items()):
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(holder, name, type(value)(0))


def check_repeatable(model: PreTrainedModel) -> None:
    """Raise :class:`SempaError` if two forward passes in training mode differ, as with a router that adds noise.

    So it does if they give NaN, which a setting may cause where all weights are finite.

    Args:
        model: Base model without dropout.
    """
    ids = torch.arange(_NUM_TEST_TOKENS)[None].to(model.device)
    was_training = model.training
    model.train()
    with torch.random.fork_rng(), torch.no_grad():
        first, second = (model(input_ids=ids, use_cache=False).logits.float() for _ in range(2))
    model.train(was_training)
    if first.isnan().any():
        raise SempaError(
            f"{type(model).__name__} gives logits that are NaN before anything is trained, though its weights are "
            "finite. Expected numbers: restore or download the config.json of the base again; if values overflow in "
            "float16, choose --dtype float32 or bfloat16."
        )
    if not torch.allclose(first, second, rtol=0, atol=1e-4 * float(first.abs().max())):
        raise SempaError(
            f"{type(model).__name__} draws random numbers in training besides dropout, so that it differs from its own "
            "reference before anything is trained. Expected another base, or --objective contrastive without --kl, "
            "which has no reference."
        )
