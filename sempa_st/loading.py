"""Open any model as a SentenceTransformer: a shipped one, a SemPA folder, a bare decoder, or any other model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.checks.inspection import CONFIG, read_settings, settings_if_any
from sempa_st.checks.library_errors import readable
from sempa_st.checks.weights import check_finite_weights, check_whole, loaded_with_info
from sempa_st.data.nli import load_nli
from sempa_st.errors import SempaError
from sempa_st.folder.digests import combined_digest
from sempa_st.folder.layout import (
    MODULES,
    ST_CONFIG,
    embedding_settings,
    folder_format,
    is_activated,
    is_adapter_folder,
)
from sempa_st.folder.resolve import Source, adapter_base, adapters_over_base, bare_adapter, find_model, source_digest
from sempa_st.forward.embed import embed_rows_fast
from sempa_st.methods.registry import methods_for, parse_method
from sempa_st.model.adapter_kinds import check_native
from sempa_st.model.base_model import Base, load_causal_lm
from sempa_st.model.chat_templates import check_chat_templates
from sempa_st.model.gemma import EMBEDDED_BASE
from sempa_st.model.patching import avoid_broken_sdpa
from sempa_st.model.peft_models import is_peft_model
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.templates import DEFAULT_TEMPLATE, embedding_template
from sempa_st.model.tokenizer import embedding_rows, install_template, load_tokenizer
from sempa_st.utils.devices import pick_device, pick_dtype

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

READERS = ("sempa", "native")
"""``sempa``: our module. ``native``: plain ``SentenceTransformer(folder)``, as a user without this package sees it."""
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
        base: Base to put the folder's adapter on, where the one it names has moved; for a bare adapter it may be an
            adapter itself.
        reader: ``sempa`` for our module, ``native`` for plain sentence-transformers modules.
        int8: Round what most linear layers multiply to integers (:func:`sempa_st.model.int8.quantize`): faster on a
            CPU, and no longer exact. It is computed in float32 on a CPU, which an ``auto`` dtype and a device of None
            then are.

    Raises:
        SempaError: If the model cannot be found, read, or embedded with as asked.
    """
    if reader not in READERS:
        raise SempaError(f"Unknown reader {reader!r}. Expected one of: {', '.join(READERS)}.")
    if int8:
        # What it needs, where nothing else is asked for.
        device, dtype = device or "cpu", "float32" if dtype == "auto" else dtype
    device = pick_device(device)
    torch_dtype = pick_dtype(dtype, device)
    source = find_model(str(model), for_method=True)
    if template and source.kind != "base" and not method:
        raise SempaError(f"{source.name} brings its own template; --template {template!r} is for bare bases only.")
    adapted = source.kind in ("sempa", "adapter") and is_adapter_folder(source.folder)
    if base and not (adapted and reader == "sempa"):
        raise SempaError(f"--base {base!r} is for an adapter folder read with our module; leave it out for {model}.")
    if method:
        opened = _load_method(source, method, template, base, reader, torch_dtype, device)
    else:
        _check_readable(source, reader)
        if source.kind == "base":
            opened = _load_base(source, template or DEFAULT_TEMPLATE, torch_dtype, device)
        elif source.kind == "sempa" and reader == "sempa":
            opened = _load_sempa(source, base, torch_dtype, device)
        else:
            opened = _load_plain(source, torch_dtype, device)
    avoid_broken_sdpa(opened, device)
    if int8:
        _quantize(opened)
    asked = {"method": method, "reader": reader, "dtype": str(torch_dtype), "int8": int8}
    opened.model_card_data.model_name = _own_name(opened, source, base, asked)
    return opened


def _quantize(opened: SentenceTransformer) -> None:
    """Round a model's linear layers to integers, balanced on sentences of the sample; a plain adapter is merged."""
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


def _check_readable(source: Source, reader: str) -> None:
    """Raise :class:`SempaError` if a model cannot be embedded with without a method."""
    if source.kind == "adapter":
        raise bare_adapter(source.name)
    if source.kind == "encoder":
        kinds = ", ".join(read_settings(source.folder, CONFIG).get("architectures") or ["of unknown architecture"])
        raise SempaError(
            f"{source.name} ({kinds}) is an encoder and not a decoder. Give it a method: "
            f"{', '.join(methods_for(encoders=True))}."
        )
    if source.kind == "base" and reader == "native":
        raise SempaError(
            f"{source.name} is a bare base. Make a native folder of it first: sempa copy {source.name} DIR"
        )


def _load_base(source: Source, template: str, dtype: Any, device: str) -> SentenceTransformer:
    definition = embedding_template(template)
    tokenizer = load_tokenizer(source.folder)
    install_template(tokenizer, definition)
    decoder = load_causal_lm(source.folder, dtype, whole=False).eval()
    return _assemble(PromptEOL(decoder, tokenizer, template=template, forward_rows=embed_rows_fast), source, device)


def _load_sempa(source: Source, base: str | None, dtype: Any, device: str) -> SentenceTransformer:
    # What is wrong with the settings is told before the weights are read.
    below = _base_under(source, base)
    tokenizer = _load_tokenizer(source, below)
    template, length = embedding_settings(source.folder, tokenizer)
    model = _load_weights(source, below, dtype)
    module = PromptEOL(model, tokenizer, template=template, max_seq_length=length, forward_rows=embed_rows_fast)
    return _assemble(module, source, device)


def _load_decoder(source: Source, base: str | None, dtype: Any) -> tuple[Any, Any]:
    """Return the decoder of a base, a SemPA folder or a bare adapter, with all adapters on it, and its tokenizer."""
    from sempa_st.model.adapter import merge_adapters

    if source.kind == "adapter":
        folders, below = adapters_over_base(source.folder, base)
        for folder in filter(is_activated, folders):
            raise SempaError(f"The adapter in {folder} acts from certain tokens on, which no --method has.")
        tokenizer = load_tokenizer(below.folder)
        model = load_causal_lm(below.folder, dtype).eval()  # adapters are merged into it
        merge_adapters(model, folders, below.name)
        return model, tokenizer
    found = _base_under(source, base)
    return _load_weights(source, found, dtype), _load_tokenizer(source, found)


def _base_under(source: Source, base: str | None) -> Base | None:
    return adapter_base(source.folder, base) if is_adapter_folder(source.folder) else None


def _load_tokenizer(source: Source, base: Base | None) -> PreTrainedTokenizerBase:
    return load_tokenizer(source.folder, embedding_rows(base.folder) if base else None)


def _load_weights(source: Source, base: Base | None, dtype: Any) -> Any:
    from sempa_st.model.adapter import attach_adapter

    model = load_causal_lm((base or source).folder, dtype, whole=False)
    return attach_adapter(model, source.folder, base.name) if base else model.eval()


def _load_method(
    source: Source, method: str, template: str | None, base: str | None, reader: str, dtype: Any, device: str
) -> SentenceTransformer:
    from sempa_st.forward.sentence_transformer import SentenceTransformer
    from sempa_st.methods.module import MethodModule

    if template or reader != "sempa":
        raise SempaError(f"--method {method!r} brings its own texts and module. Leave out --template and --reader.")
    encoder = source.takes_encoder_methods
    if parse_method(method).for_encoders != encoder:
        raise SempaError(
            f"The method {method!r} does not apply to {source.name}, {'an encoder' if encoder else 'a decoder'}. "
            f"Expected one of: {', '.join(methods_for(encoders=encoder))}."
        )
    if source.kind == "sempa" and is_activated(source.folder):
        raise SempaError(f"{source.name} acts under its own template only. Leave out --method {method!r}.")
    model, tokenizer = _load_encoder(source, dtype) if encoder else _load_decoder(source, base, dtype)
    return SentenceTransformer(modules=[MethodModule(model, tokenizer, method)], device=device)


def _load_encoder(source: Source, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    model, info = loaded_with_info(AutoModel, source.folder, dtype=dtype)
    with readable(source.folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    check_whole(model, info, source.folder)
    check_finite_weights(model, source.folder)
    return model.get_encoder().eval() if model.config.is_encoder_decoder else model.eval(), tokenizer


def _assemble(module: PromptEOL, source: Source, device: str) -> SentenceTransformer:
    from sempa_st.forward.sentence_transformer import SentenceTransformer

    config = settings_if_any(source.folder, ST_CONFIG) or {}
    return SentenceTransformer(
        modules=[module],
        device=device,
        prompts=config.get("prompts"),
        default_prompt_name=config.get("default_prompt_name"),
        similarity_fn_name=config.get("similarity_fn_name", "cosine"),
        truncate_dim=config.get("truncate_dim"),
    )


def _load_plain(source: Source, dtype: Any, device: str) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    if folder_format(source.folder) == "custom":
        raise SempaError(
            f"{source.name} is of format custom: plain sentence-transformers would run the code in it, which this "
            "package does not. Read it with --reader sempa"
            + (
                "; its adapter is an activated one, which has no native form."
                if is_activated(source.folder)
                else ", or make a native copy with sempa copy FOLDER DIR --format native"
            )
        )
    # It is looked through before a library opens it.
    base = adapter_base(source.folder) if is_adapter_folder(source.folder) else None
    if base:
        check_native(base, source.name, source.folder)
    else:
        _check_plain_weights(source.folder)
    with readable(source.folder, base=base.folder if base else None):
        model_kwargs = {"dtype": dtype, "use_safetensors": True}
        model = SentenceTransformer(
            str(source.folder), device=device, model_kwargs=model_kwargs, trust_remote_code=False
        )
    if source.kind == "sempa":
        embedding_settings(source.folder, model.tokenizer)
    for module in model.modules():
        _check_templates(module, source.folder)
    try:
        model.encode(["A cat.", "Two cats, and a dog."], show_progress_bar=False)
    except Exception as error:  # what its modules say of each other shows here only
        raise SempaError(
            f"{source.name} opens with sentence-transformers and embeds no text ({type(error).__name__}: {error}). Its "
            "settings do not go together; restore or download the folder again."
        ) from error
    return model


def _check_templates(module: Any, folder: Path) -> None:
    """Check the chat templates that a module of sentence-transformers may render; its settings name one, or hold it."""
    tokenizer, settings = getattr(module, "tokenizer", None), getattr(module, "processing_kwargs", None) or {}
    known = [getattr(holder, "chat_template", None) for holder in (tokenizer, getattr(module, "processor", None))]
    asked = (settings.get("chat_template") or {}).get("chat_template")
    if not any(isinstance(templates, dict) and asked in templates for templates in known):
        known.append(asked)
    for templates in known:
        check_chat_templates(templates, folder, getattr(tokenizer, "special_tokens_map", {}))


def _check_plain_weights(folder: Path) -> None:
    """Raise :class:`SempaError` if sentence-transformers would fill a checkpoint in ``folder`` with random weights."""
    from transformers import AutoModel

    for part in (folder / str(module.get("path", "")) for module in read_settings(folder, MODULES)):
        if (part / CONFIG).is_file() and "architectures" in read_settings(part, CONFIG):
            check_whole(*loaded_with_info(AutoModel, part, device_map="meta"), part)


def _own_name(model: SentenceTransformer, source: Source, base: str | None, asked: dict[str, Any]) -> str:
    """Return a name with a digest of all that decides a vector: MTEB serves two models of one name the same scores.

    It is the same on every machine and device; the type of the weights, which the device may choose, is part of it.
    """
    digest = combined_digest(
        asked
        | {
            "model": source_digest(source, base),
            "template": getattr(model[0], "template", None),
            "max_seq_length": model.max_seq_length,
            "truncate_dim": model.truncate_dim,
            "prompts": model.prompts,
            "default_prompt_name": model.default_prompt_name,
        }
    )
    name = Path(os.path.abspath(source.name)).name if Path(source.name).is_dir() else Path(source.name).name  # noqa: PTH100
    return f"local/{name}-{digest[:12]}"
