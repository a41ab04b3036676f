"""Shipped models: small adapter folders in the package, completed in the cache folder from their embedded base."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sempa_st.errors import SempaError, check_known
from sempa_st.folder.card import write_card
from sempa_st.folder.formats import MODULES, RUN_RECORD
from sempa_st.folder.layout import ModelFolder
from sempa_st.folder.write import set_base_reference, write_embedding_files, write_notices
from sempa_st.model.adapter import attach_adapter
from sempa_st.model.base_model import Base, load_causal_lm, load_config, resolve_base
from sempa_st.model.embedded import EMBEDDED_BASES
from sempa_st.model.peft_models import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from sempa_st.model.templates import embedding_template
from sempa_st.model.tokenizer import install_template, load_tokenizer
from sempa_st.utils.assets import PACKAGE, asset_path
from sempa_st.utils.files import atomic_folder, build_once, cache_folder, check_not_inside, write_json
from sempa_st.utils.portable import portable_record

SHIPPED_MODELS = asset_path("models")
"""Folder with one small folder per model: adapter, run record, model card and notices."""
_CARD = "README.md"
_CODE = ("folder", "model")
"""Folders of the package whose code decides what is in a completed folder."""


def shipped_names() -> list[str]:
    """Return the names of the models that this package ships, sorted."""
    return sorted(path.parent.name for path in SHIPPED_MODELS.glob(f"*/{ADAPTER_CONFIG}"))


def shipped_model(name: str) -> Path:
    """Return the complete folder of a shipped model; on first use it is written to the cache folder (some seconds).

    Args:
        name: One of :func:`shipped_names`.

    Raises:
        SempaError: If there is no shipped model of this name, or its base is not installed.
    """
    check_known(name, shipped_names(), "shipped model")
    packed = SHIPPED_MODELS / name
    try:
        base = resolve_base(ModelFolder(packed).base)
    except SempaError as error:
        raise SempaError(f"The model {name!r} needs its base. {error}") from error
    target = cache_folder() / "models" / f"{name}-{_digest(packed, base)[:12]}"
    return build_once(target, MODULES, lambda folder: _complete(packed, base, folder))


def _digest(packed: Path, base: Base) -> str:
    """Return a SHA-256 (hex) of all that a completed folder is made from, and of the base's path, which it names."""
    digest = hashlib.sha256(f"{base.reference}:{ModelFolder(base.folder).digest}".encode())
    code = [path for name in _CODE for path in sorted((PACKAGE / name).glob("*.py"))]
    for path in (*sorted(packed.iterdir()), *code):
        content = path.read_bytes()
        digest.update(f"{path.name}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def _complete(packed: Path, base: Base, folder: Path) -> None:
    """Write into ``folder`` the complete model folder of the small folder ``packed``."""
    for path in packed.iterdir():
        shutil.copyfile(path, folder / path.name)
    set_base_reference(folder, base.reference)
    model = ModelFolder(folder)
    config = _record(model)["config"]
    tokenizer = load_tokenizer(base.folder)
    install_template(tokenizer, embedding_template(config["template"]))
    write_embedding_files(
        folder,
        tokenizer,
        template=config["template"],
        max_seq_length=config["max_seq_length"],
        config=load_config(base.folder),
        format="custom" if model.is_activated else "native",
    )


def pack_model(
    folder: str | Path, target: str | Path, *, results: list[dict[str, Any]] | None = None, overwrite: bool = False
) -> Path:
    """Write the small folder that the package ships, from a trained model on an embedded base.

    The adapter's weights are rounded to bfloat16. The small folder is then completed in a scratch folder and loaded,
    and is kept only if the settings and the rounded weights are unchanged.

    Args:
        folder: Folder that ``sempa train`` wrote.
        target: Folder to write; its name is the name of the model.
        results: Tables of measured figures for the run record and the model card, each with ``title``, ``columns`` and
            ``rows``.
        overwrite: Replace ``target`` if it exists.

    Raises:
        SempaError: If ``folder`` holds no trained adapter on an embedded base, or the completed folder differs.
    """
    import torch
    from safetensors.torch import load_file, save_file

    model, target = ModelFolder(Path(folder)), Path(target)
    if not model.is_adapter or not model.format:
        raise SempaError(f"{folder} is no adapter folder of this package. Expected one that `sempa train` wrote.")
    record = _record(model)
    base = resolve_base(model.base)
    if base.name not in EMBEDDED_BASES:
        raise SempaError(f"{folder} is an adapter on {base.name!r}. Expected one on: {', '.join(EMBEDDED_BASES)}.")
    record = portable_record({**record, "base": base.name, "config": {**record["config"], "base": base.name}})
    record |= {"results": results} if results else {}
    check_not_inside(target, [model.path, base.folder])
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(model.path / ADAPTER_WEIGHTS).items()}
    with atomic_folder(target, overwrite=overwrite) as packed, tempfile.TemporaryDirectory() as scratch:
        shutil.copyfile(model.path / ADAPTER_CONFIG, packed / ADAPTER_CONFIG)
        set_base_reference(packed, base.name)
        write_json(packed / RUN_RECORD, record)
        save_file(rounded, packed / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_notices(base, packed)
        complete = Path(scratch)
        _complete(packed, base, complete)
        _check_same(model, ModelFolder(complete), base, rounded)
        write_card(complete, target.name, base, record)
        shutil.copyfile(complete / _CARD, packed / _CARD)
    return target


def _check_same(trained: ModelFolder, complete: ModelFolder, base: Base, rounded: dict[str, Any]) -> None:
    """Raise :class:`SempaError` unless ``complete`` has the settings of ``trained`` and the ``rounded`` adapter."""
    import torch
    from peft import get_peft_model_state_dict

    for name in ("template", "max_seq_length"):
        own, recorded = getattr(trained, name), getattr(complete, name)
        if own != recorded:
            raise SempaError(f"{trained.path} says {own!r}, its run record {recorded!r}. Restore one of them.")
    tuned = attach_adapter(load_causal_lm(base.folder, torch.float32), complete.path, base.name)
    live = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    if live.keys() != rounded.keys() or any(not torch.equal(live[name], rounded[name].float()) for name in rounded):
        raise SempaError(f"The adapter of {trained.path} does not come back as it was packed. Check the peft version.")


def _record(folder: ModelFolder) -> dict[str, Any]:
    if folder.record is None:
        raise SempaError(
            f"{folder.path} has no {RUN_RECORD}, so what it was trained on is unknown. Expected a trained model."
        )
    return folder.record
