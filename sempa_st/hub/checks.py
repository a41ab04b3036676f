"""What a model folder must fulfil before it is sent to the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from sempa_st.checks.inspection import check_folder
from sempa_st.errors import SempaError
from sempa_st.folder.card import check_card
from sempa_st.folder.layout import ModelFolder
from sempa_st.loading import load
from sempa_st.model.base_model import Base
from sempa_st.model.prompt_eol import SOURCES
from sempa_st.utils.assets import PACKAGE
from sempa_st.utils.files import read_json

_SENTENCES = ("A man is playing a guitar.", "Is anyone there?", 'She said "no", twice.', "Snow fell all night")
_TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}
"""How far the cosine of two readers' vectors may be below 1, by the type that both compute in."""
_TEXTS = (".json", ".md", ".jinja", ".txt", ".py", "")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "merges.txt")
"""Files whose strings are tokens, among them slashes."""


def check_publishable(folder: Path, base: Base, *, private_paths: Sequence[Path], dtype: str = "float32") -> None:
    """Check a folder as strangers will use it: base, card, notices, paths, and the vectors of both readers.

    Args:
        folder: The folder that is going to be sent, and nothing else in it.
        base: The base that it was derived from.
        private_paths: Folders of this machine that no file may name.
        dtype: Type in which the readers' vectors are compared.

    Raises:
        SempaError: On the first thing that is wrong; the message says how to mend it.
    """
    check_folder(folder)
    _refuse_foreign_code(folder)
    _check_base(ModelFolder(folder))
    check_card(folder)
    if base.is_gemma and not (folder / "NOTICE").is_file():
        raise SempaError(f"{folder.name} is derived from Gemma and has no file NOTICE. `sempa copy` writes it.")
    for name, text in local_paths(folder, private_paths):
        raise SempaError(f"{name} names a folder of this machine: {text!r:.200}. Remove it from the file.")
    _check_readers(folder, dtype)


def _refuse_foreign_code(folder: Path) -> None:
    """Raise :class:`SempaError` if a settings file names classes (``auto_map``) that a reader would fetch and run."""
    for path in sorted(folder.rglob("*.json")):
        if path.name in _VOCABULARIES:
            continue
        if any(isinstance(value, dict) and value.get("auto_map") for value in _values(read_json(path))):
            raise SempaError(
                f"{path.relative_to(folder).as_posix()} names code of its own (auto_map), which is never run here, and "
                "would be run by others. Remove the setting, or make the folder anew with `sempa copy`."
            )


def _values(value: Any) -> Iterator[Any]:
    """Yield JSON content and all that is in it, at any depth."""
    yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inner:
        yield from _values(each)


def _check_base(model: ModelFolder) -> None:
    reference = str((model.adapter_settings or {}).get("base_model_name_or_path", ""))
    if model.is_adapter and (reference.count("/") != 1 or Path(reference).exists()):
        raise SempaError(
            f"The adapter names its base {reference!r}, which nobody else has. Push the whole model with --merged, or "
            "a copy over a base of the Hub: sempa copy FOLDER DIR --base HUB_ID"
        )


def local_paths(folder: Path, known: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yield the local paths in a folder's files, each with the file's name.

    A setting that is an absolute path counts, and any text that has one of the ``known`` folders in it.

    Args:
        folder: Model folder.
        known: Folders of this machine, such as the user's home.
    """
    names = "|".join(re.escape(str(path)) for path in known if path != Path(path.anchor))
    mention = re.compile(rf"(?<![\w.:/])(?:{names})(?![\w.-])") if names else None
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix not in _TEXTS or path.name in _VOCABULARIES:
            continue
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json":
            texts = (value for value in _values(read_json(path)) if isinstance(value, str))
            yield from ((name, text) for text in texts if _is_absolute(text))
        found = mention.search(path.read_text(encoding="utf-8", errors="replace")) if mention else None
        if found:
            yield name, found[0]


def _is_absolute(text: str) -> bool:
    windows = PureWindowsPath(text)
    return bool(re.match(r"(/|~/)[\w.-]+/[^<>\s]+$", text) or (windows.drive and windows.is_absolute()))


def _check_readers(folder: Path, dtype: str) -> None:
    """Raise :class:`SempaError` unless plain sentence-transformers and our module give the same vectors."""
    from sentence_transformers.util import pairwise_cos_sim

    ours = load(folder, dtype=dtype).encode(list(_SENTENCES), convert_to_tensor=True)
    plain = _plain(folder, dtype).encode(list(_SENTENCES), convert_to_tensor=True)
    worst = float(pairwise_cos_sim(ours.float(), plain.float()).min())
    if not worst >= 1 - _TOLERANCES[dtype]:
        raise SempaError(
            f"Plain sentence-transformers and sempa-st read {folder.name} differently: cosine {worst:.5f} in {dtype}, "
            f"expected at least {1 - _TOLERANCES[dtype]}. Make the folder anew with `sempa copy`."
        )


def _plain(folder: Path, dtype: str) -> Any:
    if ModelFolder(folder).format == "native":
        return load(folder, dtype=dtype, reader="native")
    from sentence_transformers import SentenceTransformer

    from sempa_st.utils.devices import pick_device, pick_dtype

    # Only code that is this package's own is run.
    for name in SOURCES:
        if (folder / name).read_bytes() != (PACKAGE / "model" / name).read_bytes():
            raise SempaError(f"{name} in {folder.name} is not this version's. Make the folder anew with `sempa copy`.")
    device = pick_device(None)
    return SentenceTransformer(
        str(folder), device=device, trust_remote_code=True, model_kwargs={"dtype": pick_dtype(dtype, device)}
    )
