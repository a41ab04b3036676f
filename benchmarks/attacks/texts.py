"""Embed random strings through every reader: finite, equal everywhere, and independent of batch and order."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from helpers.readers import encode_without_sempa_st
from helpers.server import load_float32, running_server
from openai import OpenAI
from sentence_transformers import SentenceTransformer

import sempa_st
from benchmarks.attacks.world import CPU, Child, Outcome, World
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model

_TEXTS, _QUICK_TEXTS = 100_000, 400
_ROWS = 2_000
"""Texts of one call."""
_COSINE = 0.9999
_EQUAL = 1e-5
_PIECES = (
    "a", "The cat", " ", "\n", "\t", "\r\n", "\x00", "\x1b[31m", "\x7f", "\u00a0", "\u200b", "\u200d", "\u202e",
    "\u2028", "\ufeff", "\ufffd", "\ufffe", "é", "e\u0301", "ß", "İ", "漢字", "한글", "עברית", "العربية", "😀",
    "\U0001f468\u200d\U0001f469", "🇩🇪", "\U0010ffff", '"', "'", "\\", "{", "}", "{{ x }}", "{% for %}", "{sentence}",
    "%s", "<s>", "</s>", "<bos>", "<eos>", "<pad>", "[INST]", "<|im_start|>", '" means in one word:"',
    'This sentence : "', "0", "1e400", "-", "../..", "nan", "NULL", "<script>", "'; DROP TABLE", "=1+1",
)  # fmt: skip
"""What strings are made of: control, bidirectional and joining characters, templates, special tokens, code."""


def strings(count: int, seed: int = 0) -> list[str]:
    """Return random strings: of the pieces or of any character but surrogates, now and then empty or long."""
    draw = random.Random(seed)

    def character() -> str:
        code = draw.choice((draw.randrange(0x80), draw.randrange(0x3000), draw.randrange(0x110000)))
        return chr(code) if not 0xD800 <= code < 0xE000 else "x"

    found = []
    for _ in range(count):
        length = draw.choice((0, 1, 2, 3, 5, 8, 13, 40 if draw.random() < 0.2 else 5))
        made: Callable[[], str] = draw.choice((character, lambda: draw.choice(_PIECES)))
        found.append("".join(made() for _ in range(length)))
    return found


def attack(world: World) -> Iterator[Outcome]:
    """Yield what became of random strings in each reader, on the command line and in the server, and of surrogates."""
    texts = strings(_QUICK_TEXTS if world.quick else _TEXTS)
    ours = sempa_st.load(world.root / "native", dtype="float32", device="cpu")
    started = time.perf_counter()
    expected = np.concatenate([ours.encode(texts[at : at + _ROWS]) for at in range(0, len(texts), _ROWS)])
    outcome = Outcome("texts: vectors are finite", seconds=time.perf_counter() - started)
    for index, row in enumerate(np.isfinite(expected).all(axis=1)):
        outcome.check(bool(row), f"text {index}: {texts[index]!r}")
    yield outcome
    yield _order(ours, texts, expected)
    for name, embed in _readers(world).items():
        yield _compare(name, embed, texts, expected)
    yield _command_line(world, texts, expected)
    yield _served(world, texts)
    yield _surrogates(ours)


def _readers(world: World) -> dict[str, Callable[[list[str]], Any]]:
    """Return the ways to embed that must agree with ``sempa_st.load`` on a folder of format native."""
    native = world.root / "native"
    custom = copy_model(str(native), world.root / "custom", format="custom")
    merged = copy_model(str(native), world.root / "merged", merge=True)
    settings: dict[str, Any] = {"device": "cpu", "model_kwargs": {"dtype": "float32"}}
    plain = SentenceTransformer(str(native), trust_remote_code=False, **settings)
    with_code = SentenceTransformer(str(custom), trust_remote_code=True, **settings)
    return {
        "plain sentence-transformers, format native": plain.encode,
        "plain sentence-transformers, format custom": with_code.encode,
        "sempa_st.load, format custom": load_float32(custom).encode,
        "sempa_st.load, merged": load_float32(merged).encode,
        "without sempa-st installed": lambda texts: encode_without_sempa_st(
            native, texts, trust=False, cwd=world.folder("elsewhere")
        ),
    }


def _compare(name: str, embed: Callable[[list[str]], Any], texts: list[str], expected: np.ndarray) -> Outcome:
    outcome, started = Outcome(f"texts: {name}"), time.perf_counter()
    found = np.concatenate([np.asarray(embed(texts[at : at + _ROWS])) for at in range(0, len(texts), _ROWS)])
    for index, cosine in enumerate((found * expected).sum(axis=1) / np.linalg.norm(found, axis=1)):
        outcome.check(bool(cosine >= _COSINE), f"text {index} ({texts[index]!r:.60}): cosine {cosine}")
    outcome.seconds = time.perf_counter() - started
    return outcome


def _order(model: Any, texts: Sequence[str], expected: np.ndarray) -> Outcome:
    """Embed all texts in another order and in batches of another size."""
    outcome, started = Outcome("texts: another order and batch size"), time.perf_counter()
    order = np.random.default_rng(1).permutation(len(texts))
    for at in range(0, len(texts), 777):
        rows = order[at : at + 777]
        distance = np.abs(model.encode([texts[row] for row in rows], batch_size=5) - expected[rows]).max(axis=1)
        for row, far in zip(rows, distance, strict=True):
            outcome.check(bool(far <= _EQUAL), f"text {row} ({texts[row]!r:.60}) moved by {far}")
    outcome.seconds = time.perf_counter() - started
    return outcome


def _command_line(world: World, texts: Sequence[str], expected: np.ndarray) -> Outcome:
    outcome, started = Outcome("texts: sempa encode, from a jsonl file"), time.perf_counter()
    rows = world.root / "hostile.jsonl"
    kept = [index for index, text in enumerate(texts) if text.strip()]  # a file with blank sentences is refused
    rows.write_text("".join(json.dumps({"text": texts[index]}) + "\n" for index in kept), encoding="utf-8")
    output = world.root / "hostile.npy"
    words = world.words(f"encode NATIVE {rows} --column text --output {output} {CPU}", output)
    child = Child.start(words, world.root / "log.txt")
    if child.wait():
        outcome.check(False, child.last_line)
        return outcome
    for index, row in zip(kept, np.abs(np.load(output) - expected[kept]).max(axis=1), strict=True):
        outcome.check(bool(row <= _EQUAL), f"text {index} ({texts[index]!r:.60}) differs by {row}")
    outcome.seconds = time.perf_counter() - started
    return outcome


def _served(world: World, texts: Sequence[str]) -> Outcome:
    """Ask the server for lists of texts, by the openai package."""
    outcome, started = Outcome("texts: sempa serve, asked by the openai package"), time.perf_counter()
    model = load_float32(world.root / "activated")
    with running_server(model) as server, OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        for at in range(0, len(texts), 200):
            asked = [text for text in texts[at : at + 200] if text]  # an empty input is an error of the API
            answer = client.embeddings.create(model="tiny", input=asked)
            found, expected = np.array([item.embedding for item in answer.data]), model.encode(asked)
            for text, far in zip(asked, np.abs(found - expected).max(axis=1), strict=True):
                outcome.check(bool(far <= _EQUAL), f"{text!r:.60} differs by {far}")
    outcome.seconds = time.perf_counter() - started
    return outcome


def _surrogates(model: Any) -> Outcome:
    """A lone surrogate, wherever it stands in a text or a batch, is an error that names the text."""
    outcome, started = Outcome("texts: a lone surrogate is refused by index"), time.perf_counter()
    draw = random.Random(2)
    for text in strings(50, seed=3):
        place, index = draw.randrange(len(text) + 1), draw.randrange(20)
        batch = ["a"] * 20
        batch[index] = text[:place] + chr(draw.randrange(0xD800, 0xE000)) + text[place:]
        try:
            model.encode(batch)
            outcome.check(False, f"{batch[index]!r:.60} was embedded")
        except SempaError as error:
            outcome.check(f"text {index} " in str(error), str(error))
    outcome.seconds = time.perf_counter() - started
    return outcome
