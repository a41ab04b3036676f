"""Copy a model: onto another machine, into the other format, merged, or a bare base made an embedding folder."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sempa_st.checks.inspection import CONFIG
from sempa_st.errors import SempaError
from sempa_st.folder.card import write_card
from sempa_st.folder.layout import (
    MODEL_SETTINGS,
    RUN_RECORD,
    ST_CONFIG,
    check_format,
    embedding_settings,
    folder_format,
    invocation_of,
    is_activated,
    is_adapter_folder,
    read_record,
    template_name,
    weight_files,
)
from sempa_st.folder.resolve import Source, adapter_base, find_model
from sempa_st.folder.write import copy_files, set_base_reference, set_invocation, write_embedding_files
from sempa_st.model.adapter import check_adapter, check_runs_activated, merged_model
from sempa_st.model.adapter_kinds import (
    check_activated,
    check_native,
    check_scaled,
    rewrite_tensors,
    write_native_settings,
)
from sempa_st.model.base_model import Base, check_causal_lm, load_config, resolve_base
from sempa_st.model.prompt_eol import DEFAULT_MAX_SEQ_LENGTH, save_model
from sempa_st.model.templates import DEFAULT_TEMPLATE, embedding_template
from sempa_st.model.tokenizer import embedding_rows, install_template, load_tokenizer, prefix_tokens
from sempa_st.utils.devices import pick_dtype
from sempa_st.utils.files import atomic_folder, check_not_inside, check_output_folder, write_json
from sempa_st.utils.portable import portable_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SETTINGS = (*MODEL_SETTINGS, ST_CONFIG, "NOTICE", "GEMMA_TERMS.html")


def copy_model(
    model: str,
    output: str | Path,
    *,
    format: str | None = None,
    merge: bool = False,
    activate: bool = False,
    scale: float = 1.0,
    dtype: str = "float32",
    base: str | None = None,
    template: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model folder from another one (or from a bare base) that works on this machine.

    Args:
        model: Shipped model, SemPA folder or Hub id, or a base.
        output: Folder to write.
        format: ``native`` or ``custom``; when None that of the source (``native`` for a base), or what ``activate``
            needs.
        activate: Let a plain adapter act on sentences under the template and on nothing else: the vectors stay, and
            any other text gets the base's output bit for bit.
        merge: Add the adapter's update to the base's weights and write a full causal language model.
        scale: What the adapter's update is multiplied by, above 0. Below 1 all text moves less, ordinary text included.
        dtype: Type of merged weights; float32 keeps the vectors, bfloat16 halves the file.
        base: Base to point to, where the one the adapter names has moved.
        template: Embedding template for a bare base.
        overwrite: Replace what stands at ``output``.

    Raises:
        SempaError: If the source, the base or the output folder is not fit.
    """
    check_output_folder(output, overwrite=overwrite)
    source = find_model(model)
    if source.kind == "sentence-transformers":
        raise SempaError(f"{model} is a plain sentence-transformers model. Expected a SemPA folder or a base.")
    format = format or ("custom" if activate else folder_format(source.folder)) or "native"
    check_format(format)
    adapter = is_adapter_folder(source.folder)
    if activate and (merge or format == "native" or not adapter or is_activated(source.folder)):
        raise SempaError(
            f"--activate cannot be applied to {model} like this. Expected a model that holds a plain adapter, no "
            "--merge, and format custom."
        )
    if merge and not adapter:
        raise SempaError(f"{model} holds no adapter, so there is nothing to merge. Leave out --merge.")
    if scale != 1 and (merge or not adapter or not 0 < scale < math.inf):
        raise SempaError(
            f"--scale {scale} cannot be applied. Expected a number above 0, a model that holds an adapter, and "
            "no --merge (merge the scaled copy instead)."
        )
    if scale != 1:
        check_scaled(model, source.folder)
    if not adapter:
        check_causal_lm(source.folder)
    if is_activated(source.folder) and (merge or format == "native"):
        _check_whole_rows(model, source.folder, merge)
    if source.kind == "sempa" and template:
        raise SempaError(f"{model} brings its own template; --template {template!r} is for bare bases only.")
    origin = _origin(source, adapter, base)
    check_not_inside(output, [source.folder, origin.folder])
    if adapter:
        check_adapter(origin, source.folder)
    tokenizer, template, length = _embedding_settings(source, origin, template)
    with atomic_folder(output, overwrite=overwrite) as folder:
        if merge:
            save_model(merged_model(origin, source.folder, pick_dtype(dtype, "cpu")), folder)
        else:
            copy_files(source.folder, folder, [*_SETTINGS, *weight_files(source.folder)])
            if adapter:
                set_base_reference(folder, origin.reference)
                if format == "native" and is_activated(folder):
                    set_invocation(folder, None)
                    (folder / CONFIG).unlink()  # it refused the readers that can open the copy
                if activate:
                    opening = prefix_tokens(tokenizer, template)
                    set_invocation(folder, opening)
                    check_activated(origin, model, folder)
                rewrite_tensors(origin, folder, scale)
                if activate:
                    check_runs_activated(origin, model, folder, opening)
                if format == "native":
                    write_native_settings(origin, folder)
                    check_native(origin, model, folder)
        write_embedding_files(
            folder,
            tokenizer,
            template=template,
            max_seq_length=length,
            config=load_config(origin.folder),
            format=format,
        )
        record = read_record(source.folder)
        if record is not None:
            record = portable_record({**record, "base": origin.name})
            if scale != 1:
                record["scale"] = scale * (record.get("scale") or 1)
            write_json(folder / RUN_RECORD, record)
        write_card(folder, Path(output).name, origin, record)
    return Path(output)


def _origin(source: Source, adapter: bool, base: str | None) -> Base:
    """Return the base that the copy points to or derives from."""
    if adapter:
        return adapter_base(source.folder, base)
    if base:
        raise SempaError(f"{source.name} is a whole model without a base; leave out --base {base}.")
    if source.kind == "base":
        return resolve_base(source.name)
    # A merged model: its own folder stands in for the base, under the base's recorded name.
    record = read_record(source.folder) or {}
    return replace(resolve_base(str(source.folder)), name=str(record.get("base") or source.name))


def _embedding_settings(source: Source, origin: Base, template: str | None) -> tuple[PreTrainedTokenizerBase, str, int]:
    tokenizer = load_tokenizer(source.folder, embedding_rows(origin.folder))
    if source.kind == "base":
        chosen = embedding_template(template or DEFAULT_TEMPLATE)
        install_template(tokenizer, chosen)
        return tokenizer, chosen.name, DEFAULT_MAX_SEQ_LENGTH
    return tokenizer, *embedding_settings(source.folder, tokenizer)


def _check_whole_rows(model: str, folder: Path, merge: bool) -> None:
    """Raise :class:`SempaError` unless the activated adapter in ``folder`` acts on the whole of what is embedded.

    A plain adapter of the same weights then gives the same vectors; it only acts on all other text as well.
    """
    if merge:
        raise SempaError(
            f"The adapter of {model} is an activated one, which cannot be merged. If it acts on whole sentences, "
            "a copy with --format native can be."
        )
    if invocation_of(folder) != prefix_tokens(load_tokenizer(folder), template_name(folder) or DEFAULT_TEMPLATE):
        raise SempaError(
            f"The adapter of {model} is an activated one: it acts on the template's closing tokens only. In the format "
            "native it would act on every token or on none. Expected format custom."
        )
