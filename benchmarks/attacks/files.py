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
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.attacks.changes import (
    Change,
    all_of,
    edit,
    edited,
    header,
    merge,
    pipe,
    post_processors,
    put,
    tensors,
)
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


def _keys(name: str) -> dict[str, Change]:
    """Return changes of a JSON file, one for each value of each key and one for each patch."""
    settings, patches = _MALFORMED["settings"][name], _MALFORMED["patches"].get(name, {})
    changes = {f"{key} {value!r:.60}": edit(name, **{key: value}) for key in settings for value in settings[key]}
    return changes | {what: edit(name, partial(merge, patch=patch)) for what, patch in patches.items()}


def _contents(*names: str) -> dict[str, Change]:
    return {f"{name} {kind}": put(name, content) for name in names for kind, content in _CONTENTS.items()}


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
    "a key twice": edited("config.json", lambda raw: raw.replace(b"{", b'{"hidden_size": -1, "vocab_size": "x",', 1)),
    "a BOM": edited("config.json", lambda raw: b"\xef\xbb\xbf" + raw), "none": put(_W, None),
    "truncated": edited(_W, lambda raw: raw[:-100]), "more at the end": edited(_W, lambda raw: raw + bytes(100)),
    "a huge header": edited(_W, lambda raw: struct.pack("<Q", 1 << 62) + raw[8:]),
    "a header of 90 MB": edited(_W, lambda raw: struct.pack("<Q", 90 << 20) + raw[8:] + bytes(90 << 20)),
    **{name: header(_W, _NORM, patch) for name, patch in _MALFORMED["headers"].items()},
    **{name: tensors(_W, shapes) for name, shapes in _MALFORMED["tensors"][_W].items()},
    "a folder": all_of(put(_W, None), put(f"{_W}/x", "x")), "a pipe": all_of(put(_W, None), pipe(_W)),
    "beside": put("pytorch_model.bin", PICKLE), "alone": all_of(put(_W, None), put("pytorch_model.bin", PICKLE)),
    "by an index": all_of(put(_W, None), put("x.bin", PICKLE), put(
        "pytorch_model.bin.index.json", json.dumps({"weight_map": {_NORM: "x.bin"}}))),
    **{f"an index of {name!r}": all_of(put(_W, None), put(f"{_W}.index.json", json.dumps({"weight_map": {"x": name}})))
       for name in _MALFORMED["names"]["index"]},
    **{f"{name} a link to {to}": put(name, Path(to)) for name in ("config.json", _W, "tokenizer.json")
       for to in (f"../../../base/{name}", "/dev/zero", name)},
}  # fmt: skip
_FOLDERS: dict[str, Change] = {
    **{f"{key} {name!r}": edit("modules.json", lambda found, key=key, name=name: found[1].update({key: name}))
       for key in ("type", "path") for name in _MALFORMED["names"][key]},
    **_contents("modules.json"),
    "modules twice": edit("modules.json", lambda found: found.extend(found * 20)),
    **_keys("1_Pooling/config.json"), **_keys("sentence_bert_config.json"), **_keys("config_sentence_transformers.json")
}  # fmt: skip
_ADAPTERS: dict[str, Change] = {
    **_contents("adapter_config.json", _A), **_keys("adapter_config.json"),
    "a long expression": edit("adapter_config.json", target_modules="(" * 5000),
    "a long base": edit("adapter_config.json", base_model_name_or_path="x" * 5000),
    "pickled": all_of(put(_A, None), put("adapter_model.bin", PICKLE)), "none": put(_A, None),
    **{name: tensors(_A, shapes) for name, shapes in _MALFORMED["tensors"][_A].items()},
}  # fmt: skip
_TOKENIZERS: dict[str, Change] = {
    **_contents("tokenizer.json", "tokenizer_config.json"), **_keys("tokenizer_config.json"), **_keys("tokenizer.json"),
    "truncated": edited("tokenizer.json", lambda raw: raw[:9000]), "missing": put("tokenizer.json", None),
    **{name: edit("tokenizer.json", post_processor=made) for name, made in post_processors().items()},
    "texts that swell": edit("tokenizer.json", normalizer={"type": "Prepend", "prepend": "x" * 1_000_000}),
    "a long pad token": edit("tokenizer_config.json", pad_token="x" * 5_000_000),
}  # fmt: skip
_TEMPLATES = _MALFORMED["templates"] | {"deep": "{{ " + "(" * 5000, "long": "x" * (2 << 20)}
_TABLE = {name: [text] * 99 for name, text in {"sent0": "A cat.", "sent1": "An animal.", "hard_neg": "No cat."}.items()}
_SOUND_FILES = {"data": ("x.csv", ",".join(_TABLE) + "\nA cat.,An animal.,No cat.\n"), "texts": ("x.txt", "A cat.")}


def _table(**columns: Any) -> Change:
    """Return a change that writes a parquet file."""
    return lambda folder: pq.write_table(pa.table({**_TABLE, **columns}), folder / "x.parquet")


_FILES: dict[str, Change] = {
    **{name: put(*pair) for name, pair in _MALFORMED["data"].items()},
    "csv in latin-1": put("x.csv", b"a,b\n\xe9,\n"), "csv binary": put("x.csv", bytes(range(256))),
    "csv of a huge field": put("x.csv", _SOUND_FILES["data"][1] + "x" * 5_000_000 + ",b,c\n"),
    "csv of many columns": put("x.csv", ",".join(map(str, range(10**6))) + "\n1\n"),
    "a device": put("x.csv", Path("/dev/zero")), "a pipe": pipe("x.csv"),
    "a link to nothing": put("x.csv", Path("nothing")), "deep jsonl": put("x.jsonl", _CONTENTS["deep"]),
    "deep json": put("x.json", _CONTENTS["deep"]), "a long number": put("x.jsonl", "9" * 5000),
    "jsonl of a 5-MB line": put("x.jsonl", json.dumps(dict.fromkeys(_TABLE, "a " * 2_500_000))),
    "jsonl of 1-MB texts": put("x.jsonl", json.dumps(dict.fromkeys(_TABLE, "a " * 499_999))),
    "parquet cut": all_of(_table(), edited("x.parquet", lambda raw: raw[:500])),
    "parquet overwritten": all_of(_table(), edited("x.parquet", lambda raw: bytes(90) + raw[90:])),
    "parquet nested": _table(sent0=[["a"]] * 99, sent1=[{"x": ["b"]}] * 99),
    "parquet without rows": _table(sent0=[], sent1=[], hard_neg=[]), "parquet of bytes": _table(sent0=[b"\xff"] * 99),
}  # fmt: skip
_TEXTS: dict[str, Change] = {
    **{name: put(*pair) for name, pair in _MALFORMED["texts"].items()}, "no UTF-8": put("x.txt", b"A cat.\n\xff\n"),
    "half a character": put("x.txt", b"\xc3"), "5 MB": put("x.txt", "a " * 2_500_000),
    "two kinds": all_of(put("x/a.txt", "x"), put("x/b.csv", "x")), "a device": put("x.txt", Path("/dev/zero")),
    "a pipe": pipe("x.txt"), "nested": _table(sent0=[["a"]] * 99),
}  # fmt: skip
_PLACES = {"base": "chat_template.jinja", "native": "additional_chat_templates/prompteol.jinja"}
CORPUS: dict[str, dict[str, dict[str, Change]]] = {
    "model folders": {"base": _BASES, "native": _FOLDERS, "activated": {"code": put("prompt_eol.py", CODE)}},
    "adapters": {"native": _ADAPTERS},
    "tokenizers": {"base": _TOKENIZERS},
    "chat templates": {of: {name: put(_PLACES[of], _TEMPLATES[name]) for name in _TEMPLATES} for of in _PLACES},
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
                _try(world, outcome, (of, "sound", command), put(*_SOUND_FILES.get(of, ("README.md", ""))))
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
