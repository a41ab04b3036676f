"""Base models: find one by Hub id, local folder or the name of the embedded base, check it and load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.checks.inspection import CONFIG, check_folder, checked_folder, read_settings
from sempa_st.checks.library_errors import quantisation
from sempa_st.errors import SempaError
from sempa_st.model.embedded import EMBEDDED_BASES, embedded_at, embedded_base
from sempa_st.utils.hub import model_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_BLOCK_4BIT = 64
"""Number of weights that share a scale in 4 bits."""


@dataclass(frozen=True)
class Base:
    """A base model in a local folder.

    Args:
        name: Name as the user gave it: a Hub id, a folder or one of :data:`EMBEDDED_BASES`.
        folder: Local folder with its weights and tokenizer.
    """

    name: str
    folder: Path

    @property
    def reference(self) -> str:
        """Value for ``base_model_name_or_path``: a Hub id unchanged, a folder as an absolute path."""
        is_folder = self.name in EMBEDDED_BASES or Path(self.name).is_dir()
        return str(self.folder.resolve()) if is_folder else self.name

    @property
    def is_gemma(self) -> bool:
        """Whether Gemma's terms of use apply to models derived from it."""
        return str(read_settings(self.folder, CONFIG).get("model_type", "")).startswith("gemma")


def resolve_base(name: str, revision: str | None = None) -> Base:
    """Find a base model and check that it is a decoder with safetensors weights.

    Args:
        name: One of :data:`EMBEDDED_BASES`, a local folder, or a Hub id. The cache folder of an embedded base counts
            as its name.
        revision: Branch, tag or commit of the Hub's repository; the newest commit when None.

    Raises:
        SempaError: If it is not found, is not a decoder, or has no safetensors weights.
    """
    name = embedded_at(Path(name)) or name
    base = Base(name, embedded_base(name) if name in EMBEDDED_BASES else checked_folder(name, revision))
    if (base.folder / "adapter_config.json").is_file():
        raise SempaError(f"The base {name!r} is an adapter. Merge it first: sempa copy {name} DIR --merge")
    _check_decoder(base)
    if not any(base.folder.glob("*.safetensors")):
        raise SempaError(
            f"The base {name!r} has no .safetensors file. Pickled weights are never loaded; convert them first, for "
            "instance with the Hub's safetensors conversion space."
        )
    return base


def settings_folder(name: str) -> Path:
    """Return a folder with the settings and the tokenizer of a base; of one on the Hub no weights are downloaded.

    Args:
        name: As for :func:`resolve_base`.

    Raises:
        SempaError: If it is not found or is not a decoder.
    """
    if name in EMBEDDED_BASES or Path(name).is_dir():
        return resolve_base(name).folder
    base = Base(name, check_folder(model_folder(name, weights=False)))
    _check_decoder(base)
    return base.folder


def _check_decoder(base: Base) -> None:
    if not (base.folder / CONFIG).is_file():
        raise SempaError(f"The base {base.name!r} has no config.json. Expected the folder of a transformers model.")
    config = read_settings(base.folder, CONFIG)
    if not _is_decoder(config):
        architectures = config.get("architectures") or []
        raise SempaError(
            f"The base {base.name!r} is not a decoder (architectures: {', '.join(architectures) or 'none'}). Expected "
            "a causal language model such as Llama, Qwen, Gemma, Mistral, OPT or GPT-NeoX."
        )


def is_encoder(folder: Path) -> bool:
    """Return whether a folder contains an encoder or an encoder-decoder."""
    return (folder / CONFIG).is_file() and not _is_decoder(read_settings(folder, CONFIG))


def _is_decoder(config: dict[str, Any]) -> bool:
    names = config.get("architectures") or []
    return not config.get("is_encoder_decoder") and any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def load_causal_lm(
    folder: str | Path, dtype: torch.dtype, *, whole: bool = True, load_in_4bit: bool = False, **arguments: Any
) -> PreTrainedModel:
    """Load the causal language model in ``folder`` from safetensors, with its LM head.

    Args:
        folder: Local folder.
        dtype: Type of the weights.
        whole: Refuse a model that can only be used for embedding: without an LM head, or with quantised weights.
        load_in_4bit: Quantise the linear layers to NF4 with double quantisation (arXiv 2305.14314, section 3).
        **arguments: Further arguments of ``from_pretrained``, such as ``device_map`` and ``attn_implementation``.

    Raises:
        SempaError: If its files cannot be read or do not match, or weights are missing or not finite.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from sempa_st.checks.weights import check_finite_weights, check_whole, loaded_with_info

    if load_in_4bit:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    stored = quantisation(folder)
    model, info = loaded_with_info(AutoModelForCausalLM, folder, dtype=dtype, **arguments)
    if whole and (stored or (getattr(model, "is_quantized", False) and not load_in_4bit)):
        raise SempaError(
            f"The weights in {folder} are quantised ({stored}), and training and merging need "
            "unquantised ones. Use the original model, or a dequantised copy."
        )
    check_whole(named_decoder(model), info, folder, head=whole)
    check_finite_weights(model, folder)
    if load_in_4bit:
        _avoid_other_kernels(model, folder)
    return model


def _avoid_other_kernels(model: PreTrainedModel, folder: str | Path) -> None:
    """Make layers in 4 bits compute the same on every processor (bitsandbytes 0.50), or raise :class:`SempaError`."""
    for name, layer in model.named_modules():
        if not hasattr(layer, "support_avx512bf16_for_cpu"):
            continue
        # Where it is set, evaluation packs the weights anew, and then computes in bfloat16.
        layer.support_avx512bf16_for_cpu = False
        if layer.weight.device.type == "cpu" and layer.in_features % _BLOCK_4BIT:
            raise SempaError(
                f"The layer {name} of the model in {folder} has {layer.in_features} inputs, and bitsandbytes reads "
                f"4-bit weights wrongly on some CPUs unless they are a multiple of {_BLOCK_4BIT}. Omit --load-in-4bit, "
                "or use a GPU."
            )


def named_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return a causal language model after giving it the name of its decoder, where its class has another (Llama 4).

    Raises:
        SempaError: If it holds no decoder.
    """
    from transformers import PreTrainedModel

    if model.base_model is model:
        names = [name for name, module in model.named_children() if isinstance(module, PreTrainedModel)]
        if not names:
            raise SempaError(f"{type(model).__name__} holds no decoder of its own, which an embedding is read from.")
        model.base_model_prefix = names[0]
    return model


def check_causal_lm(folder: str | Path) -> None:
    """Raise :class:`SempaError` unless ``folder`` contains all weights of a causal language model with its LM head.

    Only names and sizes are compared; no weights are read.
    """
    from transformers import AutoModelForCausalLM

    from sempa_st.checks.weights import check_whole, loaded_with_info

    check_whole(*loaded_with_info(AutoModelForCausalLM, folder, device_map="meta"), folder)


def load_config(folder: Path) -> Any:
    """Return the transformers config of the model in ``folder``; raises :class:`SempaError` if it is invalid."""
    from sempa_st.checks.weights import read_config

    return read_config(folder)
