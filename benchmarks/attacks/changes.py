"""Changes of a folder that make what is in it malformed."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Change = Callable[[Path], Any]


def put(name: str, content: str | bytes | Path | None) -> Change:
    """Return a change that writes a file, a link if the content is a path, or nothing in the place of a file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if isinstance(content, Path):
            path.symlink_to(content)
        elif content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def edited(name: str, edit: Callable[[bytes], bytes]) -> Change:
    """Return a change of the bytes of a file, by a function."""
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def edit(name: str, edit: Callable[[Any], Any] | None = None, **keys: Any) -> Change:
    """Return a change of the content of a JSON file: of some keys, or by a function."""

    def change(raw: bytes) -> bytes:
        content = json.loads(raw)
        _ = edit(content) if edit else content.update(keys)
        return json.dumps(content).encode()

    return edited(name, change)


def merge(content: Any, patch: dict[str, Any]) -> None:
    """Change some keys of nested objects; None removes one."""
    for key, value in patch.items():
        if value is None:
            del content[key]
        elif isinstance(value, dict):
            merge(content.setdefault(key, {}), value)
        else:
            content[key] = value


def header(name: str, tensor: str, patch: dict[str, Any]) -> Change:
    """Return a change of what the header of a safetensors file says of a tensor."""

    def change(raw: bytes) -> bytes:
        end = 8 + struct.unpack("<Q", raw[:8])[0]
        content = json.loads(raw[8:end])
        merge(content[tensor], patch)
        header = json.dumps(content).encode()
        return struct.pack("<Q", len(header)) + header + raw[end:]

    return edited(name, change)


def tensors(name: str, shapes: dict[str, list[int] | None]) -> Change:
    """Return a change of tensors in weights: each gets another shape, or is removed if that is None."""

    def change(folder: Path) -> None:
        weights = {key: tensor for key, tensor in load_file(folder / name).items() if key not in shapes}
        weights |= {key: torch.ones(shape) for key, shape in shapes.items() if shape is not None}
        save_file(weights, folder / name, metadata={"format": "pt"})

    return change


def all_of(*changes: Change) -> Change:
    """Return a change that makes several, one after the other."""
    return lambda folder: [change(folder) for change in changes]


def pipe(name: str) -> Change:
    """Return a change that puts a named pipe into a folder."""
    return lambda folder: os.mkfifo(folder / name)


def post_processors() -> dict[str, Any]:
    """Return post-processors that make millions of tokens of one: by long pieces, and by doubling."""
    token, text = {"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}

    def template(single: list[Any], ids: int) -> dict[str, Any]:
        tokens = {"x": {"id": "x", "ids": [5] * ids, "tokens": ["a"] * ids}}
        return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": tokens}

    doubling = {"type": "Sequence", "processors": [template([text, text], 1)] * 40}
    return {"tokens around a text": template([text, *[token] * 5000], 50_000), "a text doubled": doubling}
