"""Open a folder with plain sentence-transformers, with errors a person can act on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.checks.inspection import CONFIG, read_settings
from sempa_st.checks.library_errors import readable
from sempa_st.checks.weights import check_finite_weights, check_whole, loaded_with_info
from sempa_st.errors import SempaError
from sempa_st.folder.layout import ModelFolder
from sempa_st.folder.resolve import Source, adapter_base
from sempa_st.model.adapter_kinds import check_native
from sempa_st.model.chat_templates import check_chat_templates
from sempa_st.utils.finite import NotFiniteError, check_finite
from sempa_st.utils.hub import current_access

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer


def load_plain(source: Source, dtype: torch.dtype, device: str, **arguments: Any) -> SentenceTransformer:
    """Load any model of sentence-transformers, or a folder of format ``native``, by the library's own modules.

    The vectors of the latter leave the pooling in float32 whatever the model computes in.

    Args:
        source: The model.
        dtype: Type of the weights.
        device: ``cpu``, ``cuda``, ...
        **arguments: Further arguments of the modules' ``from_pretrained``, such as ``attn_implementation``. A
            ``device_map`` replaces the device.

    Raises:
        SempaError: If the folder has the format ``custom``, its weights are not complete, a chat template is not fit,
            or the model cannot be loaded or embeds no text.
    """
    from sentence_transformers import SentenceTransformer

    folder = source.folder
    if folder.format == "custom":
        raise SempaError(
            f"{source.name} is of format custom: plain sentence-transformers would run the code in it, which this "
            "package does not. Read it with --reader sempa"
            + (
                "; its adapter is an activated one, which has no native form."
                if folder.is_activated
                else ", or make a native copy with sempa copy FOLDER DIR --format native"
            )
        )
    base = adapter_base(folder) if folder.is_adapter else None
    if base:
        check_native(base, source.name, folder.path)
    else:
        _check_weights(folder)
    with readable(folder.path, base=base.folder if base else None):
        # The library finds an adapter's base by its name, in the same cache.
        model = SentenceTransformer(
            str(folder.path),
            device=None if "device_map" in arguments else device,
            model_kwargs={**arguments, "dtype": dtype, "use_safetensors": True},
            trust_remote_code=False,
            token=current_access().token,
            cache_folder=current_access().cache_folder,
        )
    if source.kind == "sempa":
        folder.embedding_settings(model.tokenizer)
        # A norm in 16 bits is wrong in the third decimal, and so are dot products of vectors divided by it.
        model[1].register_forward_hook(_in_float32)
    for module in model.modules():
        _check_templates(module, folder.path)
    check_finite_weights(model, folder.path)
    model[-1].register_forward_hook(_FiniteVectors(model.tokenizer))
    try:
        model.encode(["A cat.", "Two cats, and a dog."], show_progress_bar=False)
    except SempaError:
        raise
    except Exception as error:  # modules whose settings do not fit each other are noticed here only
        raise SempaError(
            f"{source.name} opens with sentence-transformers and embeds no text ({type(error).__name__}: {error}). Its "
            "settings do not go together; restore or download the folder again."
        ) from error
    return model


def _in_float32(module: Any, args: Any, features: dict[str, Any]) -> dict[str, Any]:
    """Convert what was pooled."""
    return {**features, "sentence_embedding": features["sentence_embedding"].float()}


@dataclass(frozen=True)
class _FiniteVectors:
    """A hook on the last module, which notices infinite and NaN vectors: plain ``encode`` returns them in silence."""

    tokenizer: Any

    def __call__(self, module: Any, args: Any, features: dict[str, Any]) -> None:
        vectors = features.get("sentence_embedding")
        if vectors is None:
            return
        try:
            check_finite(vectors, ["?"] * len(vectors))
        except NotFiniteError as error:
            ids, decode = features.get("input_ids"), getattr(self.tokenizer, "batch_decode", None)
            if ids is None or decode is None or len(ids) != len(vectors):
                raise
            texts = decode(ids, skip_special_tokens=True)
            raise error.naming([(index, texts[index]) for index, _ in error.bad], error.total) from None


def _check_weights(folder: ModelFolder) -> None:
    """Raise :class:`SempaError` if sentence-transformers would give a checkpoint's missing weights random values."""
    from transformers import AutoModel

    for path in (folder.path / str(module.get("path", "")) for module in folder.modules):
        if (path / CONFIG).is_file() and "architectures" in read_settings(path, CONFIG):
            check_whole(*loaded_with_info(AutoModel, path, device_map="meta"), path)


def _check_templates(module: Any, folder: Path) -> None:
    """Check the chat templates that a module may render: its tokenizer's, its processor's and that of its settings."""
    tokenizer, settings = getattr(module, "tokenizer", None), getattr(module, "processing_kwargs", None) or {}
    known = [getattr(holder, "chat_template", None) for holder in (tokenizer, getattr(module, "processor", None))]
    # The settings hold the name of one of these, or a template themselves.
    chosen = (settings.get("chat_template") or {}).get("chat_template")
    if not any(isinstance(templates, dict) and chosen in templates for templates in known):
        known.append(chosen)
    for templates in known:
        check_chat_templates(templates, folder, getattr(tokenizer, "special_tokens_map", {}))
