"""LoRA adapters: choose the layers to adapt, load with clear errors, and merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.checks.inspection import read_settings, tensor_shapes
from sempa_st.errors import SempaError
from sempa_st.model.adapter_kinds import check_lora, layers_pattern, skeleton
from sempa_st.model.base_model import Base, load_causal_lm
from sempa_st.model.peft_models import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_FUSED_IN_MAMBA = {"out_proj", "dt_proj", "x_proj"}
"""Layers whose weights Mamba's kernels use without calling the layer, so that an adapter on them has no effect."""
_NUM_TEST_TOKENS = 32  # length of the sequence on which a merged model is compared with what it was merged from


def linear_suffixes(model: PreTrainedModel) -> list[str]:
    """Return the names (``q_proj``, ...) of all linear layers except the LM head, sorted.

    Only the last component of each path is returned: sentence-transformers loads the adapter onto the decoder without
    its LM head, where the full paths are different.

    Raises:
        SempaError: If the model has no such layer.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        # GPT-2's linear layers are Conv1D: a linear layer with a transposed weight.
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not _is_router(module)
    }
    if any(family in model.config.model_type for family in ("mamba", "falcon_h1", "nemotron_h")):
        names -= _FUSED_IN_MAMBA
    if not names:
        raise SempaError(
            f"{type(model).__name__} has no linear layer besides its LM head, so LoRA has nothing to adapt."
        )
    return sorted(names)


def _is_router(module: Any) -> bool:
    """Whether a linear layer returns several tensors, as the routers of PhiMoE and Llama 4: LoRA cannot update it."""
    from torch import Tensor, nn
    from transformers.pytorch_utils import Conv1D

    is_plain = type(module) in (nn.Linear, Conv1D)
    return not is_plain and not isinstance(module(module.weight.new_zeros(1, module.in_features)), Tensor)


def lora_config(
    model: PreTrainedModel,
    *,
    r: int = 8,
    alpha: int = 32,
    dropout: float = 0.0,
    layers: Sequence[int] | None = None,
    invocation: Sequence[int] | None = None,
) -> Any:
    """Return a PEFT LoRA config; the defaults are the paper's: rank 8, alpha 32, all linear layers but the LM head.

    Args:
        model: Base causal language model.
        r: Rank, at least 1.
        alpha: Scale; the update is ``alpha / r * B A``.
        dropout: Dropout probability of the adapter's inputs in training, in [0, 1).
        layers: Indices of the decoder layers to adapt, from 0; all layers when None.
        invocation: Invocation tokens of an activated adapter (aLoRA); a plain adapter when None.

    Raises:
        SempaError: If the model has no linear layer to adapt, or no decoder layer with such an index.
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
        # Without this, PEFT does not find the layers of a decoder without its LM head.
        layers_pattern=None if layers is None else layers_pattern(model),
        alora_invocation_tokens=None if invocation is None else list(invocation),
    )


def left_out(base: Base, config: Any) -> list[str]:
    """Return the weight matrices besides embeddings and LM head that an adapter updates in no layer, sorted.

    Such are the weights of experts where transformers holds them as one parameter, and their routers. PEFT has an
    update for the former, but holds the updated weights of all experts of a layer in memory.

    Args:
        base: Base of the adapter.
        config: What :func:`lora_config` returned.

    Returns:
        Names within a layer, such as ``mlp.experts.down_proj``.
    """
    import copy

    import torch
    from peft import get_peft_model
    from torch import nn

    with torch.device("meta"):
        tuned: Any = get_peft_model(skeleton(base), copy.deepcopy(config))  # PEFT changes the settings that it gets
    head = tuned.get_output_embeddings()
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for path, module in tuned.get_base_model().named_modules():
        if isinstance(module, nn.Embedding | nn.Conv1d) or module is head or "lora_" in path:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            is_fused = parameter.dim() > 2
            if is_fused or (parameter.dim() == 2 and name == "weight"):
                parts = [part for part in path.split(".") if part != "base_layer"] + [name] * is_fused
                layer = max((index for index, part in enumerate(parts) if part.isdigit()), default=-1)
                found["base_layer" in path].add(".".join(parts[layer + 1 :]))
    return sorted(found[False] - found[True])


def attach_adapter(model: PreTrainedModel, folder: str | Path, base_name: str, **settings: Any) -> Any:
    """Load the adapter in ``folder`` onto ``model``; see :func:`sempa_st.model.peft_models.load_adapter`.

    Args:
        model: Base model; it is modified.
        folder: Adapter folder.
        base_name: Name of the base, for error messages.
        **settings: PEFT settings to use instead of the folder's, such as ``lora_dropout``.

    Raises:
        SempaError: If a file is missing or corrupted, or if the adapter does not match the base.
    """
    with _loading_errors(Path(folder), base_name):
        return load_adapter(model, folder, **settings)


def train_adapter(model: nn.Module) -> None:
    """Give the weights of a model's adapter gradients, and no others; a model without an adapter stays as it is.

    They become float32, since small steps are lost to rounding in 16 bits. Any library may have loaded the adapter.
    """
    adapter = {name for name, _ in model.named_parameters() if "lora_" in name}
    for name, parameter in model.named_parameters() if adapter else ():
        parameter.requires_grad_(name in adapter)
        if name in adapter:
            parameter.data = parameter.data.float()


def merge_adapters(model: PreTrainedModel, folders: Sequence[Path], base_name: str) -> None:
    """Merge adapters into a causal language model in place, in the model's dtype.

    An adapter may have been trained on the model without its LM head, like those of LLM2Vec. The names of its tensors
    show which.

    Args:
        model: Base causal language model.
        folders: Adapter folders; each adapter was trained on top of the next one.
        base_name: Name of the base, for error messages.

    Raises:
        SempaError: As :func:`attach_adapter`, and if an adapter is not LoRA.
    """
    for folder in reversed(folders):
        with _loading_errors(folder, base_name):
            prefix = f"base_model.model.{model.base_model_prefix}."
            has_head = any(name.startswith(prefix) for name in tensor_shapes(folder / ADAPTER_WEIGHTS))
            target: Any = model if has_head else model.base_model
            load_adapter(target, folder).merge_and_unload()


@contextmanager
def _loading_errors(folder: Path, base_name: str) -> Iterator[None]:
    """Check an adapter's type and weight file, and turn PEFT's exceptions in the block into :class:`SempaError`."""
    from safetensors import SafetensorError

    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise SempaError(
            f"{folder} has no {ADAPTER_WEIGHTS}. Pickled adapters (adapter_model.bin) are never loaded; expected "
            "safetensors."
        )
    check_lora(folder)
    try:
        yield
    except SafetensorError as error:
        raise SempaError(
            f"{folder / ADAPTER_WEIGHTS} is corrupted ({error}). Restore or download the file again."
        ) from error
    except Exception as error:  # PEFT raises many types if the adapter does not match the base
        trained_on = read_settings(folder, ADAPTER_CONFIG).get("base_model_name_or_path")
        raise SempaError(
            f"The adapter in {folder} cannot be used on the base {base_name!r}. {error} It names {trained_on!r} as its "
            "base; pass another one with --base."
        ) from error


def check_adapter(base: Base, folder: str | Path) -> None:
    """Check that an adapter's tensors match a base in name and shape, without loading the base's weights.

    Raises:
        SempaError: As :func:`attach_adapter`.
    """
    attach_adapter(skeleton(base), folder, base.name)


def check_runs_activated(base: Base, name: str, folder: Path, tokens: Sequence[int]) -> None:
    """Run an activated adapter once: in some architectures PEFT cannot tell which positions a layer processes.

    Args:
        base: Base of the adapter.
        name: Name of the model that is copied, for the message.
        folder: Adapter folder.
        tokens: Invocation tokens.

    Raises:
        SempaError: If the adapter does not run.
    """
    import torch
    from peft import PeftConfig, PeftModelForCausalLM

    config = PeftConfig.from_pretrained(str(folder))
    # Only this class searches for invocation tokens; AutoPeftModelForCausalLM uses it as well.
    tuned = PeftModelForCausalLM(load_causal_lm(base.folder, torch.bfloat16), config).eval()
    other = int(tokens[0] == 0)
    try:
        with torch.no_grad():
            for batch in ([[*tokens, other]], [[other] * 4], [[other, *tokens], [*tokens, other]]):
                tuned(input_ids=torch.tensor(batch), use_cache=False)
    except (IndexError, RuntimeError) as error:
        raise SempaError(
            f"The adapter of {name} cannot be activated: the layers of {type(tuned.get_base_model()).__name__} hide "
            f"from PEFT which token is which ({error}). Leave out --activate."
        ) from error


def merged_model(base: Base, folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the causal language model, with its LM head, with an adapter merged into its weights.

    Args:
        base: Base that the adapter was trained on.
        folder: Adapter folder.
        dtype: Type of the result; the weights are merged in float32.

    Raises:
        SempaError: If the adapter cannot be merged, or the merged model gives other outputs.
    """
    import torch

    from sempa_st.checks.weights import check_finite_weights

    tuned = attach_adapter(load_causal_lm(base.folder, torch.float32), folder, base.name)
    before = _outputs(tuned)
    try:
        merged: PreTrainedModel = tuned.merge_and_unload()
        merged.tie_weights()  # loading the saved model will tie them as well
        after = _outputs(merged)
        if not all(outputs.isfinite().all() for outputs in (*before, *after)):
            raise ValueError("its outputs are infinite or NaN, before merging or after: the model is damaged")
    except (RuntimeError, ValueError) as error:
        raise SempaError(f"The adapter in {folder} cannot be merged ({error}). Leave out --merge.") from error
    pairs = zip(before, after, strict=True)
    if any(not torch.allclose(old, new, rtol=1e-3, atol=1e-3 * float(old.abs().max())) for old, new in pairs):
        raise SempaError(
            f"The adapter in {folder} cannot be merged: the merged model gives other outputs. This happens if the "
            "adapter changes an embedding that is tied to the LM head. Leave out --merge."
        )
    converted: PreTrainedModel = merged.to(dtype=dtype)  # type: ignore[call-arg]
    check_finite_weights(converted, folder)
    return converted


def _outputs(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last hidden states and the logits for a test sequence, shapes (1, seq_len, hidden or vocab_size)."""
    import torch

    config = model.config.get_text_config()
    ids = torch.linspace(0, config.vocab_size - 1, _NUM_TEST_TOKENS).long()[None]
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    return output.hidden_states[-1], output.logits
