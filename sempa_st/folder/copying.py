"""Copy a model: to another machine or format, merged into its base, activated, scaled; or make a base embed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.checks.inspection import CONFIG
from sempa_st.errors import SempaError, check_known
from sempa_st.folder.card import write_card
from sempa_st.folder.formats import FORMATS, RUN_RECORD, ST_CONFIG
from sempa_st.folder.resolve import Source, adapter_base, embedding_tokenizer, find_model
from sempa_st.folder.server import write_server_files
from sempa_st.folder.write import copy_files, licence_files, set_base_reference, set_invocation, write_embedding_files
from sempa_st.model.adapter import check_adapter, check_runs_activated, merged_model
from sempa_st.model.adapter_kinds import (
    check_activated,
    check_native,
    check_scaled,
    rewrite_tensors,
    write_native_settings,
)
from sempa_st.model.base_model import Base, check_causal_lm, load_causal_lm, load_config, resolve_base
from sempa_st.model.prompt_eol import save_model
from sempa_st.model.templates import DEFAULT_TEMPLATE
from sempa_st.model.tokenizer import load_tokenizer, prefix_tokens
from sempa_st.utils.devices import pick_dtype
from sempa_st.utils.files import atomic_folder, check_not_inside, check_output_folder, write_json
from sempa_st.utils.portable import portable_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SERVER = "server"
COPY_FORMATS = (*FORMATS, SERVER)


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
    """Write a model folder that works on this machine, from another one or from a bare base.

    Args:
        model: Shipped model, SemPA folder or Hub id, or a base.
        output: Folder to write.
        format: ``native``, ``custom`` or ``server``. When None, that of the source; ``native`` for a base, and
            ``custom`` with ``activate``. ``server`` merges the adapter, leaves out the LM head and moves the template
            into the tokenizer, for servers of embeddings: :func:`sempa_st.folder.server.write_server_files`.
        activate: Turn a plain adapter into an activated one, which acts on sentences under the template only. The
            vectors stay the same, and for any other text the model gives exactly the base's output.
        merge: Add the adapter's update to the base's weights, and write a full causal language model.
        scale: Factor of the adapter's update, above 0. A factor below 1 changes the output for all text less.
        dtype: Type of merged weights. float32 keeps the vectors, bfloat16 halves the size.
        base: Base to point to instead of the one that the adapter names.
        template: Embedding template for a bare base.
        overwrite: Replace ``output`` if it exists.

    Raises:
        SempaError: If the model, the base or the output folder cannot be used as asked.
    """
    check_output_folder(output, overwrite=overwrite)
    request = _Request(find_model(model), format, merge, activate, scale, template)
    request.check()
    source = request.source
    origin = origin_of(source, base)
    check_not_inside(output, [source.folder.path, origin.folder])
    if source.folder.is_adapter:
        check_adapter(origin, source.folder.path)
    tokenizer, template, length = embedding_tokenizer(source, origin, template)
    embedding: dict[str, Any] = {"template": template, "max_seq_length": length}
    with atomic_folder(output, overwrite=overwrite) as folder:
        copy_files(source.folder.path, folder, [ST_CONFIG, *licence_files(source.folder.path)])
        if request.for_server:
            write_server_files(folder, _whole_model(source, origin, dtype), tokenizer, **embedding)
        else:
            if merge:
                save_model(_whole_model(source, origin, dtype), folder)
            else:
                copy_files(source.folder.path, folder, source.folder.model_files)
                if source.folder.is_adapter:
                    _adjust_adapter(request, origin, folder, prefix_tokens(tokenizer, template) if activate else [])
            config = load_config(origin.folder)
            write_embedding_files(folder, tokenizer, config=config, format=request.target_format, **embedding)
        record = write_record(source.folder.record, origin, folder, scale=scale)
        write_card(folder, Path(output).name, origin, record, served=template if request.for_server else None)
    return Path(output)


@dataclass(frozen=True)
class _Request:
    """The copy that is asked for; arguments as of :func:`copy_model`."""

    source: Source
    format: str | None
    merge: bool
    activate: bool
    scale: float
    template: str | None

    @property
    def target_format(self) -> str:
        """Format of the copy."""
        return self.format or ("custom" if self.activate else self.source.folder.format) or "native"

    @property
    def for_server(self) -> bool:
        """Whether the copy is for servers of embeddings."""
        return self.format == SERVER

    def check(self) -> None:
        """Raise :class:`SempaError` if the source is of a kind that no such copy can be made of."""
        source, folder = self.source, self.source.folder
        if source.kind == "sentence-transformers":
            raise SempaError(
                f"{source.name} is a plain sentence-transformers model. Expected a SemPA folder or a base."
            )
        check_known(self.target_format, COPY_FORMATS, "folder format")
        is_plain = folder.is_adapter and not folder.is_activated
        if self.activate and (self.merge or self.target_format != "custom" or not is_plain):
            raise SempaError(
                f"--activate cannot be applied to {source.name} like this. Expected a model that holds a plain "
                "adapter, no --merge, and format custom."
            )
        if self.merge and not folder.is_adapter:
            raise SempaError(f"{source.name} holds no adapter, so there is nothing to merge. Leave out --merge.")
        if self.scale != 1:
            if self.merge or self.for_server or not folder.is_adapter or not 0 < self.scale < math.inf:
                raise SempaError(
                    f"--scale {self.scale} cannot be applied. Expected a number above 0, a model that holds an "
                    "adapter, and no merged copy (merge the scaled one instead)."
                )
            check_scaled(source.name, folder.path)
        if not folder.is_adapter:
            check_causal_lm(folder.path)
        if folder.is_activated and (self.merge or self.target_format != "custom"):
            self._check_deactivate()
        if source.kind == "sempa" and self.template:
            raise SempaError(
                f"{source.name} brings its own template; --template {self.template!r} is for bare bases only."
            )

    def _check_deactivate(self) -> None:
        """Raise :class:`SempaError` unless the activated adapter acts from the beginning of the template on.

        As a plain adapter it then gives the same vectors; for any other text it changes the base's output.
        """
        name, folder = self.source.name, self.source.folder
        if self.merge or self.for_server:
            raise SempaError(
                f"The adapter of {name} is an activated one, which cannot be merged. If it acts on whole sentences, "
                "a copy with --format native can be."
            )
        if folder.invocation != prefix_tokens(load_tokenizer(folder.path), folder.template or DEFAULT_TEMPLATE):
            raise SempaError(
                f"The adapter of {name} is an activated one: it acts on the template's suffix only. In the "
                "format native it would act on every token or on none. Expected format custom."
            )


def origin_of(source: Source, base: str | None = None) -> Base:
    """Return the base that a model points to or derives from.

    Args:
        source: A SemPA folder or a base.
        base: Base to take instead of the one that an adapter names.

    Raises:
        SempaError: If the base is not found, or one is given for a whole model.
    """
    if source.folder.is_adapter:
        return adapter_base(source.folder, base)
    if base:
        raise SempaError(f"{source.name} is a whole model without a base; leave out --base {base}.")
    if source.kind == "base":
        return resolve_base(source.name, source.revision)
    # A merged model is its own base, under the name of the base that it was merged from.
    record = source.folder.record or {}
    return Base(str(record.get("base") or source.name), source.folder.path)


def _whole_model(source: Source, origin: Base, dtype: str) -> PreTrainedModel:
    """Return the model with its adapter merged, if it has one."""
    kind = pick_dtype(dtype, "cpu")
    if source.folder.is_adapter:
        return merged_model(origin, source.folder.path, kind)
    return load_causal_lm(source.folder.path, kind)


def _adjust_adapter(request: _Request, origin: Base, folder: Path, tokens: list[int]) -> None:
    """Scale the copy of an adapter, and make it plain for the format native, or act from ``tokens`` on if there are."""
    source = request.source
    native = request.target_format == "native"
    set_base_reference(folder, origin.reference)
    if tokens:
        set_invocation(folder, tokens)
        check_activated(origin, source.name, folder)
    elif native and source.folder.is_activated:
        set_invocation(folder, None)
        (folder / CONFIG).unlink()  # It keeps transformers from opening the folder, which can be opened now.
    rewrite_tensors(origin, folder, request.scale)
    if tokens:
        check_runs_activated(origin, source.name, folder, tokens)
    elif native:
        write_native_settings(origin, folder)
        check_native(origin, source.name, folder)


def write_record(
    record: dict[str, Any] | None, origin: Base, folder: Path, *, scale: float = 1.0
) -> dict[str, Any] | None:
    """Write the run record of a trained model into a folder, without paths of this machine, and return it.

    Args:
        record: The record; nothing is written when None.
        origin: Base of the model.
        folder: Model folder.
        scale: Factor of the adapter's update.
    """
    if record is None:
        return None
    record = portable_record({**record, "base": origin.name})
    if scale != 1:
        record = {**without_results(record), "scale": scale * (record.get("scale") or 1)}
    write_json(folder / RUN_RECORD, record)
    return record


def without_results(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run record without the measured figures of the model that it is of, for a model with other weights."""
    return {name: value for name, value in record.items() if name != "results"}
