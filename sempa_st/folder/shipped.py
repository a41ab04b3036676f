"""Models that the package ships: small adapter folders, completed once on this machine from the embedded base."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sempa_st.errors import SempaError
from sempa_st.folder.card import write_card
from sempa_st.folder.digests import folder_digest
from sempa_st.folder.layout import (
    MODULES,
    RUN_RECORD,
    base_of_adapter,
    folder_format,
    folder_max_seq_length,
    is_activated,
    is_adapter_folder,
    read_record,
    template_name,
)
from sempa_st.folder.write import set_base_reference, write_embedding_files
from sempa_st.model.adapter import attach_adapter
from sempa_st.model.base_model import Base, load_causal_lm, load_config, resolve_base
from sempa_st.model.gemma import EMBEDDED_BASE
from sempa_st.model.peft_models import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from sempa_st.model.templates import embedding_template
from sempa_st.model.tokenizer import install_template, load_tokenizer
from sempa_st.utils.assets import PACKAGE, asset_path
from sempa_st.utils.files import atomic_folder, build_once, cache_folder, check_not_inside, write_json
from sempa_st.utils.portable import portable_record

SHIPPED_MODELS = asset_path("models")
"""Folder of the package with one small folder a model: adapter, run record, model card and notices."""
_CARD = "README.md"
_MAKERS = ("folder", "model")
"""Folders of our code that decide what a completed folder holds."""


def shipped_names() -> list[str]:
    """Return the names of the models that this package ships, sorted."""
    return sorted(path.parent.name for path in SHIPPED_MODELS.glob(f"*/{ADAPTER_CONFIG}"))


def shipped_model(name: str) -> Path:
    """Return the complete folder of a shipped model, made in the cache folder on first use (some seconds).

    Args:
        name: One of :func:`shipped_names`.

    Raises:
        SempaError: If there is no such model, or its base is not installed.
    """
    if name not in shipped_names():
        raise SempaError(f"Unknown shipped model {name!r}. Expected one of: {', '.join(shipped_names()) or 'none'}.")
    try:
        base = resolve_base(EMBEDDED_BASE)
    except SempaError as error:
        raise SempaError(f"The model {name!r} needs its base. {error}") from error
    packed = SHIPPED_MODELS / name
    target = cache_folder() / "models" / f"{name}-{_digest(packed, base)[:12]}"
    return build_once(target, MODULES, lambda folder: _complete(packed, base, folder))


def _digest(packed: Path, base: Base) -> str:
    """Return a SHA-256 (hex) of all that a completed folder is made from, the base's place included."""
    digest = hashlib.sha256(f"{base.reference}:{folder_digest(base.folder)}".encode())
    for path in (
        *sorted(packed.iterdir()),
        *(path for name in _MAKERS for path in sorted((PACKAGE / name).glob("*.py"))),
    ):
        content = path.read_bytes()
        digest.update(f"{path.name}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def _complete(packed: Path, base: Base, folder: Path) -> None:
    """Write into ``folder`` the model folder that ``packed`` and the base's tokenizer make."""
    for path in packed.iterdir():
        shutil.copyfile(path, folder / path.name)
    set_base_reference(folder, base.reference)
    config = _record(folder)["config"]
    tokenizer = load_tokenizer(base.folder)
    install_template(tokenizer, embedding_template(config["template"]))
    write_embedding_files(
        folder,
        tokenizer,
        template=config["template"],
        max_seq_length=config["max_seq_length"],
        config=load_config(base.folder),
        format="custom" if is_activated(folder) else "native",
    )


def pack_model(
    folder: str | Path, target: str | Path, *, results: list[dict[str, Any]] | None = None, overwrite: bool = False
) -> Path:
    """Make the small folder that the package ships from a finished model folder on the embedded base.

    The adapter's weights are rounded to bfloat16. Before anything is kept, the small folder is completed again and its
    adapter put on the base.

    Args:
        folder: Folder that ``sempa train`` wrote.
        target: Folder to write; its last part is the name of the model.
        results: Tables of measured figures for the run record and the card, each with ``title``, ``columns``, ``rows``.
        overwrite: Replace what stands at ``target``.

    Raises:
        SempaError: If ``folder`` is no trained adapter on the embedded base, or does not come back as it was.
    """
    import torch
    from safetensors.torch import load_file, save_file

    folder, target = Path(folder), Path(target)
    if not is_adapter_folder(folder) or not folder_format(folder):
        raise SempaError(f"{folder} is no adapter folder of this package. Expected one that `sempa train` wrote.")
    record = _record(folder)
    record = portable_record({**record, "base": EMBEDDED_BASE, "config": {**record["config"], "base": EMBEDDED_BASE}})
    record |= {"results": results} if results else {}
    base = resolve_base(base_of_adapter(folder))
    if base.name != EMBEDDED_BASE:
        raise SempaError(f"{folder} is an adapter on {base.name!r}. Expected one on {EMBEDDED_BASE!r}.")
    check_not_inside(target, [folder, base.folder])
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items()}
    with atomic_folder(target, overwrite=overwrite) as packed, tempfile.TemporaryDirectory() as scratch:
        shutil.copyfile(folder / ADAPTER_CONFIG, packed / ADAPTER_CONFIG)
        set_base_reference(packed, EMBEDDED_BASE)
        write_json(packed / RUN_RECORD, record)
        save_file(rounded, packed / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        base.write_notices(packed)
        complete = Path(scratch)
        _complete(packed, base, complete)
        _check_same(folder, complete, base, rounded)
        write_card(complete, target.name, base, record)
        shutil.copyfile(complete / _CARD, packed / _CARD)
    return target


def _check_same(folder: Path, complete: Path, base: Base, rounded: dict[str, Any]) -> None:
    """Raise :class:`SempaError` unless ``complete`` reads like ``folder`` and its adapter is the ``rounded`` one."""
    import torch
    from peft import get_peft_model_state_dict

    for read in (template_name, folder_max_seq_length):
        if read(folder) != read(complete):
            raise SempaError(f"{folder} says {read(folder)!r}, its run record {read(complete)!r}. Restore one of them.")
    tuned = attach_adapter(load_causal_lm(base.folder, torch.float32), complete, base.name)
    live = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    if live.keys() != rounded.keys() or any(not torch.equal(live[name], rounded[name].float()) for name in rounded):
        raise SempaError(f"The adapter of {folder} does not come back as it was packed. Check the peft version.")


def _record(folder: Path) -> dict[str, Any]:
    record = read_record(folder)
    if record is None:
        raise SempaError(
            f"{folder} has no {RUN_RECORD}, so what it was trained on is unknown. Expected a trained model."
        )
    return record
