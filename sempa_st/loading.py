"""Open any model as a SentenceTransformer: a shipped one, a SemPA folder, a bare decoder, or any other model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.checks.inspection import CONFIG, read_settings, settings_if_any
from sempa_st.checks.library_errors import readable
from sempa_st.checks.weights import check_finite_weights, check_whole, loaded_with_info
from sempa_st.data.nli import load_nli
from sempa_st.errors import SempaError, check_known
from sempa_st.folder.digests import digested_name
from sempa_st.folder.formats import ST_CONFIG
from sempa_st.folder.identity import vector_settings
from sempa_st.folder.plain import load_plain
from sempa_st.folder.resolve import (
    Source,
    adapter_base,
    adapters_over_base,
    bare_adapter,
    embedding_tokenizer,
    find_model,
    source_digest,
)
from sempa_st.forward.embed import embed_rows_fast
from sempa_st.forward.fused_lora import fuse_updates
from sempa_st.methods.registry import methods_for, parse_method
from sempa_st.model.base_model import Base, load_causal_lm
from sempa_st.model.embedded import EMBEDDED_BASE
from sempa_st.model.load_options import avoid_broken_sdpa, checked_model_kwargs, set_encode_options
from sempa_st.model.peft_models import is_peft_model
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.tokenizer import embedding_rows, load_tokenizer
from sempa_st.utils.devices import pick_device, pick_dtype
from sempa_st.utils.hub import hub_access

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

READERS = ("sempa", "native")
"""``sempa``: our module. ``native``: plain ``SentenceTransformer(folder)``, as without this package."""
_CALIBRATION_SENTENCES = 64


def load(
    model: str | Path = EMBEDDED_BASE,
    *,
    dtype: str = "auto",
    device: str | None = None,
    template: str | None = None,
    method: str | None = None,
    base: str | None = None,
    reader: str = "sempa",
    int8: bool = False,
    trainable: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_folder: str | Path | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    truncate_dim: int | None = None,
    prompts: Mapping[str, str] | None = None,
) -> SentenceTransformer:
    """Load a model for embedding; its decoder still generates (``load(...)[0].model.generate``).

    Args:
        model: Shipped model (``sempa-gemma3-270m``), SemPA folder or Hub id, a base (embedded, folder or Hub id; read
            with PromptEOL), or any sentence-transformers model.
        dtype: ``auto`` (see :func:`sempa_st.utils.devices.pick_dtype`), ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu``, ``cuda``, ...; the best there is when None.
        template: Embedding template of a base (default ``prompteol``); a SemPA folder brings its own.
        method: Another way to embed with the decoder of a base, a SemPA folder or a folder with a bare LoRA adapter,
            such as ``mean`` or ``token-prepending:exit=5``; see :mod:`sempa_st.methods.registry`.
        base: Base to put the folder's adapter on, instead of the one that it names. For a bare adapter it may be an
            adapter itself.
        reader: ``sempa`` for our module, ``native`` for plain sentence-transformers modules.
        int8: Multiply 8-bit integers in most linear layers (:func:`sempa_st.model.int8.quantize`): faster on a CPU,
            and no longer exact. It needs float32 on a CPU, and makes these the default dtype and device.
        trainable: Give the adapter's weights gradients, and no others, so that a trainer goes on from them. A model
            without an adapter is trainable in any case, with all its weights.
        revision: Branch, tag or commit of a model on the Hub; the newest commit when None. An adapter's base is always
            read at its newest commit.
        token: Token for the Hub; it opens private models and private bases of adapters. As of ``SentenceTransformer``.
        cache_folder: Folder for what is downloaded; the Hub client's own when None.
        model_kwargs: Further arguments of the decoder's ``from_pretrained``, such as ``attn_implementation``, or
            ``device_map`` in place of ``device``.
        truncate_dim: Number of dimensions that ``encode`` keeps; what the folder says, or all, when None.
        prompts: Texts to put before sentences, by name (``encode(..., prompt_name=...)``), beside the folder's own.

    Raises:
        SempaError: If the model cannot be found, read, or embedded with as asked.
    """
    check_known(reader, READERS, "reader")
    arguments = checked_model_kwargs(model_kwargs, device)
    if int8:
        device, dtype = device or "cpu", "float32" if dtype == "auto" else dtype
    device = pick_device(device)
    arguments["dtype"] = pick_dtype(dtype, device)
    with hub_access(token, cache_folder):
        source = find_model(str(model), for_method=True, revision=revision)
        if template and source.kind != "base" and not method:
            raise SempaError(f"{source.name} brings its own template; --template {template!r} is for bare bases only.")
        if base and (reader != "sempa" or source.kind not in ("sempa", "adapter") or not source.folder.is_adapter):
            raise SempaError(
                f"--base {base!r} is for an adapter folder read with our module; leave it out for {model}."
            )
        if method:
            opened = _load_method(source, method, template, base, reader, arguments, device)
        else:
            opened = _load_by_kind(source, template, base, reader, arguments, device)
        digest = source_digest(source, base)
    avoid_broken_sdpa(opened, str(opened.device))
    if int8:
        _quantize(opened)
    elif str(opened.device) == "cpu" and not trainable:
        fuse_updates(opened)
    if trainable:
        _train_adapter(opened, as_trained=not (method or int8))
    set_encode_options(opened, truncate_dim, prompts)
    asked = {"method": method, "reader": reader, "dtype": str(arguments["dtype"]), "int8": int8}
    decisive = {"model": digest, **asked, **({"model_kwargs": repr(model_kwargs)} if model_kwargs else {})}
    opened.model_card_data.model_name = digested_name(source.name, decisive | vector_settings(opened))
    return opened


def _train_adapter(opened: SentenceTransformer, *, as_trained: bool) -> None:
    from sempa_st.model.adapter import train_adapter

    if not as_trained:
        raise SempaError("A model that is read by a method, or in int8, cannot be trained. Leave these out.")
    train_adapter(opened)


def _load_by_kind(
    source: Source, template: str | None, base: str | None, reader: str, arguments: dict[str, Any], device: str
) -> SentenceTransformer:
    """Load a model without a method; raises :class:`SempaError` if it needs one, or cannot be read by ``reader``."""
    if source.kind == "adapter":
        raise bare_adapter(source.name)
    if source.kind == "encoder":
        kinds = ", ".join(read_settings(source.folder.path, CONFIG).get("architectures") or ["of unknown architecture"])
        raise SempaError(
            f"{source.name} ({kinds}) is an encoder and not a decoder. Give it a method: "
            f"{', '.join(methods_for(encoders=True))}."
        )
    if source.kind == "base" and reader == "native":
        raise SempaError(
            f"{source.name} is a bare base. Make a native folder of it first: sempa copy {source.name} DIR"
        )
    if source.kind == "sentence-transformers" or reader == "native":
        return load_plain(source, device=device, **arguments)
    return _load_prompt_eol(source, template, base, arguments, device)


def _load_prompt_eol(
    source: Source, template: str | None, base: str | None, arguments: dict[str, Any], device: str
) -> SentenceTransformer:
    """Load a base or a SemPA folder with our module; vectors are divided by their norm unless the folder is older."""
    from sentence_transformers.base.modules import Normalize

    from sempa_st.folder.copying import origin_of
    from sempa_st.folder.saving import FolderSaver
    from sempa_st.forward.sentence_transformers import SentenceTransformer

    # Faults of the settings are found before the weights are read, which takes longer.
    origin = _base_of(source, base)
    tokenizer, name, length = embedding_tokenizer(source, origin, template)
    model = _load_weights(source, origin, arguments)
    module = PromptEOL(model, tokenizer, template=name, max_seq_length=length, forward_rows=embed_rows_fast)
    config = settings_if_any(source.folder.path, ST_CONFIG) or {}
    normalizes = source.kind == "base" or source.folder.normalizes
    opened = SentenceTransformer(
        modules=[module, Normalize()] if normalizes else [module],
        device=_device_of(model, arguments, device),
        prompts=config.get("prompts"),
        default_prompt_name=config.get("default_prompt_name"),
        similarity_fn_name=config.get("similarity_fn_name", "cosine"),
        truncate_dim=config.get("truncate_dim"),
    )
    opened.saver = FolderSaver(source, origin or origin_of(source))
    return opened


def _load_decoder(source: Source, base: str | None, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Load the decoder of a base, a SemPA folder or a bare adapter, with all adapters on it, and its tokenizer."""
    from sempa_st.model.adapter import merge_adapters

    if source.kind == "adapter":
        folders, below = adapters_over_base(source.folder, base)
        for folder in folders:
            if folder.is_activated:
                raise SempaError(f"The adapter in {folder.path} acts from certain tokens on, which no --method has.")
        tokenizer = load_tokenizer(below.folder)
        model = load_causal_lm(below.folder, **arguments).eval()
        merge_adapters(model, [folder.path for folder in folders], below.name)
        return model, tokenizer
    origin = _base_of(source, base)
    tokenizer = load_tokenizer(source.folder.path, embedding_rows(origin.folder) if origin else None)
    return _load_weights(source, origin, arguments), tokenizer


def _base_of(source: Source, base: str | None) -> Base | None:
    return adapter_base(source.folder, base) if source.folder.is_adapter else None


def _device_of(model: Any, arguments: dict[str, Any], device: str) -> str:
    # A device map has placed the model already.
    return str(model.device) if "device_map" in arguments else device


def _load_weights(source: Source, base: Base | None, arguments: dict[str, Any]) -> Any:
    from sempa_st.model.adapter import attach_adapter

    model = load_causal_lm(base.folder if base else source.folder.path, whole=False, **arguments)
    return attach_adapter(model, source.folder.path, base.name) if base else model.eval()


def _load_method(
    source: Source,
    method: str,
    template: str | None,
    base: str | None,
    reader: str,
    arguments: dict[str, Any],
    device: str,
) -> SentenceTransformer:
    from sempa_st.forward.sentence_transformers import SentenceTransformer
    from sempa_st.methods.module import MethodModule

    if template or reader != "sempa":
        raise SempaError(f"--method {method!r} brings its own texts and module. Leave out --template and --reader.")
    check_method(source, method)
    encoder = source.takes_encoder_methods
    model, tokenizer = _load_encoder(source, arguments) if encoder else _load_decoder(source, base, arguments)
    device = _device_of(model, arguments, device)
    return SentenceTransformer(modules=[MethodModule(model, tokenizer, method)], device=device)


def check_method(source: Source, method: str) -> None:
    """Raise :class:`SempaError` if a method does not exist, or does not apply to the kind of a model."""
    encoder = source.takes_encoder_methods
    if parse_method(method).for_encoders != encoder:
        raise SempaError(
            f"The method {method!r} does not apply to {source.name}, {'an encoder' if encoder else 'a decoder'}. "
            f"Expected one of: {', '.join(methods_for(encoders=encoder))}."
        )
    if source.kind == "sempa" and source.folder.is_activated:
        raise SempaError(f"{source.name} acts under its own template only. Leave out --method {method!r}.")


def _load_encoder(source: Source, arguments: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    path = source.folder.path
    model, info = loaded_with_info(AutoModel, path, **arguments)
    with readable(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    check_whole(model, info, path)
    check_finite_weights(model, path)
    return model.get_encoder().eval() if model.config.is_encoder_decoder else model.eval(), tokenizer


def _quantize(opened: SentenceTransformer) -> None:
    """Quantise a model's linear layers, calibrated on sentences of the sample, after merging a plain adapter."""
    from sempa_st.methods.module import MethodModule
    from sempa_st.model.int8 import check_quantizable, quantize

    module = opened[0]
    if not isinstance(module, PromptEOL | MethodModule):
        raise SempaError("int8 needs a model that this package reads: leave out the native reader, or int8.")
    if isinstance(module, MethodModule) and parse_method(module.method).for_encoders:
        raise SempaError(f"int8 is for decoders, and {module.method} reads an encoder. Leave it out.")
    check_quantizable(module.model)
    if is_peft_model(module.model):
        module.model = module.model.merge_and_unload()
    texts = [triplet.premise for triplet in load_nli("sample").triplets[:_CALIBRATION_SENTENCES]]
    quantize(module.decoder, lambda: opened.encode(texts))
