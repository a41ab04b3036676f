"""Feed malformed model folders, adapters, tokenizers, chat templates and data: each is read safely or refused."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from benchmarks.attacks.world import CPU, TRAIN, Child, Outcome, World
from sempa_st.utils.files import cache_folder

_SECONDS, _WAIT, _BYTES, _MAX_MESSAGE = 60, 300, 3 << 29, 2000
"""Limits of a command: seconds of the processor and by the clock, bytes beyond its first ones, characters it prints."""
CANARY = "SEMPA_CANARY"
"""Environment variable with the path of a file that every payload makes."""
CODE = f"import os; open(os.environ['{CANARY}'], 'w').close()\n"
"""A payload; it lies beside every model as ``own.py``."""
PICKLE = b"cbuiltins\nexec\n(S" + repr(CODE).encode() + b"\ntR."
_ENCODE = f"encode INPUT TEXTS --output OUT {CPU}"
_RUN = TRAIN.replace("--max-triplets 24", "--max-triplets 8")
_FROM = _RUN.replace("--base BASE", "--from INPUT")
_COMMANDS = {
    "base": (_ENCODE, _RUN.replace("BASE", "INPUT"), "copy INPUT OUT"),
    "native": (_ENCODE, f"{_ENCODE} --reader native", "copy INPUT OUT --merge", _FROM),
    "activated": (_ENCODE, "copy INPUT OUT"),
    "data": (_RUN.replace("--data sample", "--data INPUT"),),
    "texts": (f"encode NATIVE INPUT --output OUT {CPU}",),
}
"""Commands by what an input is made from: a model of the world, or for data and texts an empty folder."""
Change = Callable[[Path], Any]


def _put(name: str, content: str | bytes | Path | None) -> Change:
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


def _bytes(name: str, edit: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def _edit(name: str, edit: Callable[[Any], Any] | None = None, **keys: Any) -> Change:
    """Return a change of the content of a JSON file: of some keys, or by a function."""

    def change(raw: bytes) -> bytes:
        content = json.loads(raw)
        _ = edit(content) if edit else content.update(keys)
        return json.dumps(content).encode()

    return _bytes(name, change)


def _merge(content: Any, patch: dict[str, Any]) -> None:
    """Change some keys of nested objects; None removes one."""
    for key, value in patch.items():
        if value is None:
            del content[key]
        elif isinstance(value, dict):
            _merge(content.setdefault(key, {}), value)
        else:
            content[key] = value


def _header(patch: dict[str, Any]) -> Change:
    """Return a change of what the header of the weights says of one tensor."""

    def change(raw: bytes) -> bytes:
        end = 8 + struct.unpack("<Q", raw[:8])[0]
        content = json.loads(raw[8:end])
        _merge(content[_NORM], patch)
        header = json.dumps(content).encode()
        return struct.pack("<Q", len(header)) + header + raw[end:]

    return _bytes(_W, change)


def _tensors(name: str, shapes: dict[str, list[int] | None]) -> Change:
    """Return a change of tensors in weights: each gets another shape, or is removed if that is None."""

    def change(folder: Path) -> None:
        weights = {key: tensor for key, tensor in load_file(folder / name).items() if key not in shapes}
        weights |= {key: torch.ones(shape) for key, shape in shapes.items() if shape is not None}
        save_file(weights, folder / name, metadata={"format": "pt"})

    return change


def _all(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def _pipe(name: str) -> Change:
    return lambda folder: os.mkfifo(folder / name)


def _keys(name: str) -> dict[str, Change]:
    """Return changes of a JSON file, one for each value of each key and one for each patch."""
    settings, patches = _MALFORMED["settings"][name], _MALFORMED["patches"].get(name, {})
    changes = {f"{key} {value!r:.60}": _edit(name, **{key: value}) for key in settings for value in settings[key]}
    return changes | {what: _edit(name, partial(_merge, patch=patch)) for what, patch in patches.items()}


def _contents(*names: str) -> dict[str, Change]:
    return {f"{name} {kind}": _put(name, content) for name in names for kind, content in _CONTENTS.items()}


_CONTENTS: dict[str, str | bytes] = {
    "empty": "", "binary": bytes(range(256)), "a list": "[]", "null": "null", "cut": '{"a": [1,', "deep": "[" * 10**5,
    "with deep objects": '{"a":' * 50_000, "in UTF-16": "{}".encode("utf-16"), "with a BOM": "\ufeff{}",
    "of a long number": '{"vocab_size": ' + "9" * 5000 + "}", "of surrogates": '{"a\\ud800": "\\udfff"}',
}  # fmt: skip
_MALFORMED = json.loads(Path(__file__).with_name("malformed.json").read_text())
"""Values of keys by file, chat templates, and the names and content of files of data and texts."""
_W, _A, _NORM = "model.safetensors", "adapter_model.safetensors", "model.norm.weight"
_BASES: dict[str, Change] = {
    **_contents("config.json", "generation_config.json", _W), **_keys("config.json"),
    "a key twice": _bytes("config.json", lambda raw: raw.replace(b"{", b'{"hidden_size": -1, "vocab_size": "x",', 1)),
    "a BOM": _bytes("config.json", lambda raw: b"\xef\xbb\xbf" + raw), "none": _put(_W, None),
    "truncated": _bytes(_W, lambda raw: raw[:-100]), "more at the end": _bytes(_W, lambda raw: raw + bytes(100)),
    "a huge header": _bytes(_W, lambda raw: struct.pack("<Q", 1 << 62) + raw[8:]),
    "a header of 90 MB": _bytes(_W, lambda raw: struct.pack("<Q", 90 << 20) + raw[8:] + bytes(90 << 20)),
    **{name: _header(patch) for name, patch in _MALFORMED["headers"].items()},
    **{name: _tensors(_W, shapes) for name, shapes in _MALFORMED["tensors"][_W].items()},
    "a folder": _all(_put(_W, None), _put(f"{_W}/x", "x")), "a pipe": _all(_put(_W, None), _pipe(_W)),
    "beside": _put("pytorch_model.bin", PICKLE), "alone": _all(_put(_W, None), _put("pytorch_model.bin", PICKLE)),
    "by an index": _all(_put(_W, None), _put("x.bin", PICKLE), _put(
        "pytorch_model.bin.index.json", json.dumps({"weight_map": {_NORM: "x.bin"}}))),
    **{f"an index of {name!r}": _all(_put(_W, None), _put(f"{_W}.index.json", json.dumps({"weight_map": {"x": name}})))
       for name in _MALFORMED["names"]["index"]},
    **{f"{name} a link to {to}": _put(name, Path(to)) for name in ("config.json", _W, "tokenizer.json")
       for to in (f"../../../base/{name}", "/dev/zero", name)},
}  # fmt: skip
_FOLDERS: dict[str, Change] = {
    **{f"{key} {name!r}": _edit("modules.json", lambda found, key=key, name=name: found[1].update({key: name}))
       for key in ("type", "path") for name in _MALFORMED["names"][key]},
    **_contents("modules.json"),
    "modules twice": _edit("modules.json", lambda found: found.extend(found * 20)),
    **_keys("1_Pooling/config.json"), **_keys("sentence_bert_config.json"), **_keys("config_sentence_transformers.json")
}  # fmt: skip
_ADAPTERS: dict[str, Change] = {
    **_contents("adapter_config.json", _A), **_keys("adapter_config.json"),
    "a long expression": _edit("adapter_config.json", target_modules="(" * 5000),
    "a long base": _edit("adapter_config.json", base_model_name_or_path="x" * 5000),
    "pickled": _all(_put(_A, None), _put("adapter_model.bin", PICKLE)), "none": _put(_A, None),
    **{name: _tensors(_A, shapes) for name, shapes in _MALFORMED["tensors"][_A].items()},
}  # fmt: skip
_TOKENIZERS: dict[str, Change] = {
    **_contents("tokenizer.json", "tokenizer_config.json"), **_keys("tokenizer_config.json"), **_keys("tokenizer.json"),
    "truncated": _bytes("tokenizer.json", lambda raw: raw[:9000]), "missing": _put("tokenizer.json", None),
    "texts that swell": _edit("tokenizer.json", normalizer={"type": "Prepend", "prepend": "x" * 1_000_000}),
    "a long pad token": _edit("tokenizer_config.json", pad_token="x" * 5_000_000),
}  # fmt: skip
_TEMPLATES = _MALFORMED["templates"] | {"deep": "{{ " + "(" * 5000, "long": "x" * (2 << 20)}
_TABLE = {name: [text] * 99 for name, text in {"sent0": "A cat.", "sent1": "An animal.", "hard_neg": "No cat."}.items()}
_SOUND_FILES = {"data": ("x.csv", ",".join(_TABLE) + "\nA cat.,An animal.,No cat.\n"), "texts": ("x.txt", "A cat.")}


def _table(**columns: Any) -> Change:
    """Return a change that writes a parquet file."""
    return lambda folder: pq.write_table(pa.table({**_TABLE, **columns}), folder / "x.parquet")


_FILES: dict[str, Change] = {
    **{name: _put(*pair) for name, pair in _MALFORMED["data"].items()},
    "csv in latin-1": _put("x.csv", b"a,b\n\xe9,\n"), "csv binary": _put("x.csv", bytes(range(256))),
    "csv of a huge field": _put("x.csv", _SOUND_FILES["data"][1] + "x" * 5_000_000 + ",b,c\n"),
    "csv of many columns": _put("x.csv", ",".join(map(str, range(10**6))) + "\n1\n"),
    "a device": _put("x.csv", Path("/dev/zero")), "a pipe": _pipe("x.csv"),
    "a link to nothing": _put("x.csv", Path("nothing")), "deep jsonl": _put("x.jsonl", _CONTENTS["deep"]),
    "deep json": _put("x.json", _CONTENTS["deep"]), "a long number": _put("x.jsonl", "9" * 5000),
    "jsonl of a 5-MB line": _put("x.jsonl", json.dumps(dict.fromkeys(_TABLE, "a " * 2_500_000))),
    "jsonl of 1-MB texts": _put("x.jsonl", json.dumps(dict.fromkeys(_TABLE, "a " * 499_999))),
    "parquet cut": _all(_table(), _bytes("x.parquet", lambda raw: raw[:500])),
    "parquet overwritten": _all(_table(), _bytes("x.parquet", lambda raw: bytes(90) + raw[90:])),
    "parquet nested": _table(sent0=[["a"]] * 99, sent1=[{"x": ["b"]}] * 99),
    "parquet without rows": _table(sent0=[], sent1=[], hard_neg=[]), "parquet of bytes": _table(sent0=[b"\xff"] * 99),
}  # fmt: skip
_TEXTS: dict[str, Change] = {
    **{name: _put(*pair) for name, pair in _MALFORMED["texts"].items()}, "no UTF-8": _put("x.txt", b"A cat.\n\xff\n"),
    "half a character": _put("x.txt", b"\xc3"), "5 MB": _put("x.txt", "a " * 2_500_000),
    "two kinds": _all(_put("x/a.txt", "x"), _put("x/b.csv", "x")), "a device": _put("x.txt", Path("/dev/zero")),
    "a pipe": _pipe("x.txt"), "nested": _table(sent0=[["a"]] * 99),
}  # fmt: skip
_PLACES = {"base": "chat_template.jinja", "native": "additional_chat_templates/prompteol.jinja"}
CORPUS: dict[str, dict[str, dict[str, Change]]] = {
    "model folders": {"base": _BASES, "native": _FOLDERS, "activated": {"code": _put("prompt_eol.py", CODE)}},
    "adapters": {"native": _ADAPTERS},
    "tokenizers": {"base": _TOKENIZERS},
    "chat templates": {of: {name: _put(_PLACES[of], _TEMPLATES[name]) for name in _TEMPLATES} for of in _PLACES},
    "data files": {"data": _FILES, "texts": _TEXTS},
}
"""Changes that make malformed inputs: by kind, by what is changed (see :data:`_COMMANDS`) and by name."""


def attack(world: World) -> Iterator[Outcome]:
    """Yield what became of each kind of inputs, and of sound ones of that kind."""
    for kind, table in CORPUS.items():
        outcome, started = Outcome(f"files: {kind}"), time.perf_counter()
        for of, changes in table.items():
            first, *others = _COMMANDS[of]
            for command in _COMMANDS[of]:
                _try(world, outcome, (of, "sound", command), _put(*_SOUND_FILES.get(of, ("README.md", ""))))
            for number, (name, change) in list(enumerate(changes.items()))[:: 5 if world.quick else 1]:
                for command in (first, *others[number % len(others or "1") :][:1]):
                    _try(world, outcome, (of, name, command), change)
        outcome.seconds = time.perf_counter() - started
        yield outcome


def _try(world: World, outcome: Outcome, trial: tuple[str, str, str], change: Change) -> None:
    """Make an input of something, with a name, and give it to a command."""
    of, name, command = trial
    folder = world.folder("files")
    given = folder / "given"
    if of in _SOUND_FILES:
        given.mkdir()
    else:
        shutil.copytree(world.root / of, given)
        (given / "own.py").write_text(CODE)
    change(given)
    path = next(given.iterdir()) if of in _SOUND_FILES else given
    words = [str(path) if word == "INPUT" else word for word in world.words(command, folder / "out" / "made")]
    fault = judge(world, words, folder, sound=name == "sound")
    outcome.check(not fault, f"{of}, {name}: {command.partition(' --output')[0]:.40}: {fault}")


def judge(world: World, words: list[str], folder: Path, *, sound: bool = False, seconds: float = _WAIT) -> str:
    """Run a command and return what it did wrong; ``out`` in the folder is all it may write, but for the cache."""
    log, canary, output, scratch = (folder / name for name in ("log.txt", "canary", "out", "scratch"))
    for made in (output, scratch):
        made.mkdir()
    apart = (output, log, cache_folder())
    before = _listing(world.root, apart)
    child = Child.start(words, log, before=partial(_confine, canary, scratch))
    code = child.kill_after(seconds, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(child.process, signal.SIGKILL)  # what the command has started and left
    if canary.exists():
        return "code of the input was run"
    after = _listing(world.root, apart)
    if changed := sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path)):
        return f"wrote outside of its output: {', '.join(changed[:3])}"
    return _fault_of_answer(code, log.read_text(encoding="utf-8", errors="replace"), sound)


def _fault_of_answer(code: int, text: str, sound: bool) -> str:
    line = text.replace("\r", "\n").strip().split("\n")[-1]
    if code not in ((0,) if sound else (0, 2)):
        return f"exit code {code}{' (out of time)' if code == -signal.SIGKILL else ''}: {line:.300}"
    if any(part in text for part in ("Traceback (most recent call last)", "(unexpected;")):
        return f"shows a traceback: {line:.300}"
    one = line.startswith("sempa: ") and line.isprintable() and text.count("sempa: ") == 1 and len(line) <= _MAX_MESSAGE
    return "" if code == 0 or one else f"is not told in one paragraph: {text[-300:]!r}"


def _confine(canary: Path, scratch: Path) -> None:
    """Limit the memory of this process, and say where its canary and temporary files are."""
    os.environ[CANARY], os.environ["TMPDIR"], tempfile.tempdir = str(canary), str(scratch), str(scratch)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _BYTES, used + _BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))  # a fork starts at 0


def _listing(folder: Path, apart: tuple[Path, ...]) -> dict[str, str]:
    """Return a digest of each entry below a folder, but for some paths apart."""
    found = {}
    for path in folder.rglob("*"):
        if any(path.is_relative_to(other) for other in apart):
            continue
        mode = path.lstat().st_mode
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) else ""
        found[str(path.relative_to(folder))] = f"{mode} {path.readlink() if path.is_symlink() else digest}"
    return found
