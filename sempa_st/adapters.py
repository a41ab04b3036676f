"""LoRA adapters: which layers to adapt, loading with errors a person can act on, and merging."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.bases import Base, load_causal_lm, load_config, unreadable
from sempa_st.errors import SempaError
from sempa_st.inspection import read_settings
from sempa_st.prompt_eol import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def linear_suffixes(model: PreTrainedModel) -> list[str]:
    """Return the suffix names (``q_proj``, ...) of all linear layers but the LM head, sorted.

    Suffixes and not full paths: an adapter stored with full paths of the causal LM cannot be loaded onto the bare
    decoder, which is what sentence-transformers does.

    Raises:
        SempaError: If the model has no such layer.
    """
    from torch import nn

    head = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if not names:
        raise SempaError(
            f"{type(model).__name__} has no torch.nn.Linear layer besides its LM head, so LoRA has nothing to adapt."
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

    count = model.config.get_text_config().num_hidden_layers
    if layers and max(layers) >= count:
        raise SempaError(f"There is no decoder layer {max(layers)} to adapt: the base's layers are 0 to {count - 1}.")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=linear_suffixes(model),
        layers_to_transform=None if layers is None else list(layers),
        alora_invocation_tokens=None if invocation is None else list(invocation),
    )


def attach_adapter(model: PreTrainedModel, folder: str | Path, base_name: str) -> Any:
    """Put the adapter in ``folder`` on ``model``; see :func:`sempa_st.prompt_eol.load_adapter`.

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
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(base.folder)
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # of many types, as for a tokenizer
        raise unreadable("model", base.folder, error) from error
    attach_adapter(skeleton, folder, base.name)


def merged_model(base: Base, folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return a full causal language model, LM head included, with the adapter's update added to the weights.

    Args:
        base: The base that the adapter was trained on.
        folder: Adapter folder.
        dtype: Type of the result; the sum itself is taken in float32.
    """
    import torch

    tuned = attach_adapter(load_causal_lm(base.folder, torch.float32), folder, base.name)
    merged: PreTrainedModel = tuned.merge_and_unload()
    return merged.to(dtype=dtype)  # type: ignore[call-arg]
