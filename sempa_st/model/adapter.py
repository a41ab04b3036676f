"""LoRA adapters: which layers to adapt, loading with errors a person can act on, and merging."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.checks.inspection import read_settings
from sempa_st.errors import SempaError
from sempa_st.model.adapter_kinds import layers_pattern, skeleton
from sempa_st.model.base_model import Base, load_causal_lm
from sempa_st.model.peft_models import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_FUSED_IN_MAMBA = {"out_proj", "dt_proj", "x_proj"}
"""Layers whose weights Mamba's kernels take without calling the layer, so that an adapter on them does nothing."""
_PROBED = 32
"""Tokens on which a merged model is compared with what it was made of."""


def linear_suffixes(model: PreTrainedModel) -> list[str]:
    """Return the suffix names (``q_proj``, ...) of all linear layers but the LM head, sorted.

    Suffixes and not full paths: an adapter stored with full paths of the causal LM cannot be loaded onto the bare
    decoder, which is what sentence-transformers does.

    Raises:
        SempaError: If the model has no such layer.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        # GPT-2's linear layers are Conv1D: the same with the weight transposed.
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    if any(part in model.config.model_type for part in ("mamba", "falcon_h1", "nemotron_h")):
        names -= _FUSED_IN_MAMBA
    if not names:
        raise SempaError(
            f"{type(model).__name__} has no linear layer besides its LM head, so LoRA has nothing to adapt."
        )
    return sorted(names)


def lora_config(
    model: PreTrainedModel,
    *,
    r: int = 8,
    alpha: int = 32,
    dropout: float = 0.0,
    layers: Sequence[int] | None = None,
    invocation: Sequence[int] | None = None,
) -> Any:
    """Return LoRA settings for ``model``; by default the paper's: rank 8, alpha 32, every linear layer but the LM head.

    Args:
        model: Base causal language model.
        r: Rank, at least 1.
        alpha: Scale; the update is ``alpha / r * B A``.
        dropout: Share of the adapter's inputs that are dropped in training, from 0 to below 1.
        layers: Numbers of the decoder layers to adapt, from 0; all of them when None.
        invocation: Token ids from which on an activated adapter acts; a plain adapter when None.

    Raises:
        SempaError: If the model has no linear layer to adapt, or no decoder layer of such a number.
    """
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    count = model.config.get_text_config().num_hidden_layers
    if layers and max(layers) >= count:
        raise SempaError(f"There is no decoder layer {max(layers)} to adapt: the base's layers are 0 to {count - 1}.")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=linear_suffixes(model),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        layers_to_transform=None if layers is None else list(layers),
        # Without it PEFT finds no layer in a decoder without the LM head.
        layers_pattern=None if layers is None else layers_pattern(model),
        alora_invocation_tokens=None if invocation is None else list(invocation),
    )


def attach_adapter(model: PreTrainedModel, folder: str | Path, base_name: str) -> Any:
    """Put the adapter in ``folder`` on ``model``; see :func:`sempa_st.model.peft_models.load_adapter`.

    Raises:
        SempaError: If a file is missing or corrupted, or if the adapter was made for another base.
    """
    with _clear_errors(Path(folder), base_name):
        return load_adapter(model, folder)


def merge_adapters(model: PreTrainedModel, folders: Sequence[Path], base_name: str) -> None:
    """Merge adapters into a causal language model in place, in its own type.

    An adapter may have been trained on the model without its head, as LLM2Vec's are; its tensors' names tell.

    Args:
        model: Base causal language model.
        folders: Their folders, each adapter trained on top of the next one.
        base_name: What the user called the base.

    Raises:
        SempaError: As :func:`attach_adapter` does, and on an adapter of another kind than LoRA.
    """
    from safetensors import safe_open

    for folder in reversed(folders):
        with _clear_errors(folder, base_name):
            with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
                inner = f"base_model.model.{model.base_model_prefix}."
                with_head = any(name.startswith(inner) for name in file.keys())  # noqa: SIM118
            part: Any = model if with_head else model.base_model
            load_adapter(part, folder).merge_and_unload()


@contextmanager
def _clear_errors(folder: Path, base_name: str) -> Iterator[None]:
    from safetensors import SafetensorError

    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise SempaError(
            f"{folder} has no {ADAPTER_WEIGHTS}. Pickled adapters (adapter_model.bin) are never loaded; expected "
            "safetensors."
        )
    kind = read_settings(folder, ADAPTER_CONFIG)["peft_type"]
    if kind != "LORA":
        raise SempaError(f"The adapter in {folder} is of type {kind}. Expected LORA.")
    try:
        yield
    except SafetensorError as error:
        raise SempaError(
            f"{folder / ADAPTER_WEIGHTS} is corrupted ({error}). Restore the file from where it came."
        ) from error
    except Exception as error:  # PEFT raises many types for one cause: the adapter and the base do not go together
        trained_on = read_settings(folder, ADAPTER_CONFIG).get("base_model_name_or_path")
        raise SempaError(
            f"The adapter in {folder} cannot be used on the base {base_name!r}. {error} It names {trained_on!r} as its "
            "base; another one is given with --base."
        ) from error


def check_adapter(base: Base, folder: str | Path) -> None:
    """Compare the names and shapes of an adapter's tensors with a base, without loading the base's weights.

    Raises:
        SempaError: As :func:`attach_adapter` does.
    """
    attach_adapter(skeleton(base), folder, base.name)


def check_runs_activated(base: Base, name: str, folder: Path, tokens: Sequence[int]) -> None:
    """Run an activated adapter once, since some architectures hide from PEFT which token is which.

    Args:
        base: Its base.
        name: Name of the model that it was made of.
        folder: Folder of the adapter.
        tokens: Token ids from which on it acts.

    Raises:
        SempaError: If it does not run.
    """
    import torch
    from peft import PeftConfig, PeftModelForCausalLM

    config = PeftConfig.from_pretrained(str(folder))
    # Only this class of PEFT's looks for the tokens, as AutoPeftModelForCausalLM does for whoever opens the folder.
    tuned = PeftModelForCausalLM(load_causal_lm(base.folder, torch.bfloat16), config).eval()
    other = int(tokens[0] == 0)
    try:
        with torch.no_grad():
            for rows in ([[*tokens, other]], [[other] * 4], [[other, *tokens], [*tokens, other]]):
                tuned(input_ids=torch.tensor(rows), use_cache=False)
    except (IndexError, RuntimeError) as error:
        kind = type(tuned.get_base_model()).__name__
        raise SempaError(
            f"The adapter of {name} cannot be activated: the layers of {kind} hide from PEFT which token is which "
            f"({error}). Leave out --activate."
        ) from error


def merged_model(base: Base, folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return a full causal language model, LM head included, with the adapter's update added to the weights.

    Args:
        base: The base that the adapter was trained on.
        folder: Adapter folder.
        dtype: Type of the result; the sum itself is taken in float32.

    Raises:
        SempaError: If the adapter cannot be merged, or the merged model would give other outputs.
    """
    import torch

    from sempa_st.checks.weights import check_finite_weights

    tuned = attach_adapter(load_causal_lm(base.folder, torch.float32), folder, base.name)
    before = _outputs(tuned)
    try:
        merged: PreTrainedModel = tuned.merge_and_unload()
        merged.tie_weights()  # as when it is loaded again
        after = _outputs(merged)
    except (RuntimeError, ValueError) as error:
        raise SempaError(f"The adapter in {folder} cannot be merged ({error}). Leave out --merge.") from error
    pairs = zip(before, after, strict=True)
    if any(not torch.allclose(one, two, rtol=1e-3, atol=1e-3 * float(one.abs().max())) for one, two in pairs):
        raise SempaError(
            f"The adapter in {folder} cannot be merged: the merged model gives other outputs, as where an embedding "
            "changes that the LM head shares. Leave out --merge."
        )
    converted: PreTrainedModel = merged.to(dtype=dtype)  # type: ignore[call-arg]
    check_finite_weights(converted, folder)
    return converted


def _outputs(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last states and the logits at some tokens of the vocabulary."""
    import torch

    config = model.config.get_text_config()
    ids = torch.linspace(0, config.vocab_size - 1, _PROBED).long()[None]
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    return output.hidden_states[-1], output.logits
