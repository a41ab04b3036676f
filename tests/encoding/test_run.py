from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.rows import LONE_SURROGATE, write_rows
from helpers.tiny import sample_sentences
from sentence_transformers.util import quantize_embeddings

import sempa_st
from sempa_st.encoding import encode_file, read_sentences
from sempa_st.encoding.sentences import SHARD_ROWS
from sempa_st.errors import SempaError
from sempa_st.utils.files import locked
from sempa_st.utils.leftovers import publish

pytestmark = pytest.mark.names_dtype

Cli = Callable[..., tuple[int, str, str]]
SENTENCES = sample_sentences()[:20]
FLOAT32 = ("--dtype", "float32", "--device", "cpu")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(SENTENCES) + "\n")
    return path


def vectors_of(path: Path) -> Any:
    if path.suffix.lower() == ".npy":
        return np.load(path)
    return np.array(pq.read_table(path)["embedding"].to_pylist())


def test_encode_names_the_row_or_skips_it(tmp_path: Path, adapter_folder: Path, run_cli: Cli) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"s": "A cat."}, {"s": LONE_SURROGATE}, {"s": "A dog\x00 barks."}])
    command = ("encode", adapter_folder, path, "--output", tmp_path / "out.npy", "--dtype", "float32")
    code, _, err = run_cli(*command)
    assert (code, "lone surrogate" in err, "in row(s) 2." in err) == (2, True, True), err
    code, _, err = run_cli(*command, "--skip-bad-rows")
    assert code == 0, err
    assert np.load(tmp_path / "out.npy").shape == (2, 32)
    assert np.isfinite(np.load(tmp_path / "out.npy")).all()


def test_parquet_keeps_all_columns_and_their_types(model: Any, tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": pa.array(range(20), pa.int32()),
            "when": [datetime(2024, 1, day) for day in range(1, 21)],
            "tags": [["a"] * (number % 3) for number in range(20)],
            "text": [*SENTENCES[:19], None],
            "source": pa.array(["x", "y"] * 10).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=7)
    output = tmp_path / "out.parquet"
    encode_file(model, tmp_path / "in.parquet", output, column="text", skip_bad_rows=True, shard_size=6)
    written = pq.read_table(output)
    assert written.column_names == ["row", "sentence", *table.column_names, "embedding"]
    assert written.select(table.column_names).equals(table.slice(0, 19))
    assert written["row"].to_pylist() == list(range(1, 20))
    np.testing.assert_allclose(vectors_of(output), model.encode(SENTENCES[:19]), atol=1e-5)


def test_jsonl_and_csv_keep_all_columns(model: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": SENTENCES[0], "n": 1}, {"text": SENTENCES[1], "n": 0.5, "who": {"a": 1}}]
    for name, kept in {"in.jsonl": [{**row, "who": row.get("who")} for row in rows], "in.csv": None}.items():
        source = write_rows(tmp_path / name, rows if kept else [{"text": t, "n": ""} for t in SENTENCES[:2]])
        encode_file(model, source, tmp_path / "out.parquet", column="text", overwrite=True, shard_size=1)
        written = pq.read_table(tmp_path / "out.parquet")
        expected = kept or [{"text": t, "n": ""} for t in SENTENCES[:2]]
        assert written.drop_columns(["row", "sentence", "embedding"]).to_pylist() == expected


def test_columns_that_cannot_be_kept_are_refused(model: Any, tmp_path: Path) -> None:
    mixed = write_rows(tmp_path / "mixed.jsonl", [{"text": "A cat.", "n": 1}, {"text": "A dog.", "n": "one"}])
    with pytest.raises(SempaError, match="values of several types"):
        encode_file(model, mixed, tmp_path / "v.parquet", column="text")
    encode_file(model, mixed, tmp_path / "v.npy", column="text")
    taken = write_rows(tmp_path / "taken.jsonl", [{"text": "A cat.", "embedding": [1.0]}])
    with pytest.raises(SempaError, match="column 'embedding' already"):
        encode_file(model, taken, tmp_path / "v.parquet", column="text")
    assert not list(tmp_path.glob("v.parquet*"))


def test_a_corpus_of_one_vector_has_no_range(model: Any, tmp_path: Path) -> None:
    (tmp_path / "same.txt").write_text("A cat sleeps.\n" * 3)
    with pytest.raises(SempaError, match="all sentences here have one vector"):
        encode_file(model, tmp_path / "same.txt", tmp_path / "v.npy", precision="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["same.txt"]


@pytest.mark.parametrize("output", ["v.npy", "v.parquet"])
@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_vectors_are_cut_normalised_and_quantised(
    model: Any, tmp_path: Path, text_file: Path, precision: str, output: str
) -> None:
    asked: dict[str, Any] = {"truncate_dim": 16, "prompt": "query: "}
    exact = model.encode(SENTENCES, normalize_embeddings=True, **asked)
    path = tmp_path / output
    assert encode_file(model, text_file, path, normalize=True, **asked) == (20, 16)
    np.testing.assert_allclose(vectors_of(path), exact, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors_of(path), axis=1), 1, atol=1e-5)
    assert not np.allclose(exact, model.encode(SENTENCES, normalize_embeddings=True, truncate_dim=16), atol=1e-3)
    encode_file(model, text_file, path, normalize=True, precision=precision, overwrite=True, shard_size=8, **asked)
    ranges = tmp_path / f"{output}.ranges.npy"
    assert ranges.exists() == (precision in ("int8", "uint8"))
    if ranges.exists():
        np.testing.assert_allclose(np.load(ranges), [exact.min(axis=0), exact.max(axis=0)], atol=1e-5)
    expected: Any = quantize_embeddings(exact, precision=precision)  # type: ignore[arg-type]
    # Rounding differs from batch to batch, and with it a value at the edge of a step.
    assert vectors_of(path).shape == expected.shape
    assert (np.abs(vectors_of(path).astype(int) - expected) <= (1 if ranges.exists() else 0)).all()


def test_wrong_vector_settings_are_refused(model: Any, tmp_path: Path, text_file: Path) -> None:
    for settings, message in (
        ({"precision": "int4"}, "Unknown precision 'int4'"),
        ({"truncate_dim": 33}, "vectors have 32 numbers"),
        ({"prompt_name": "no"}, "Unknown prompt 'no'"),
        ({"engine": "spark"}, "Unknown engine 'spark'"),
        ({"engine": "ray"}, "needs the name or folder"),
    ):
        with pytest.raises(SempaError, match=message):
            encode_file(model, text_file, tmp_path / "v.npy", **settings)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["sentences.txt"]


def test_an_output_is_replaced_only_when_asked(
    run_cli: Cli, adapter_folder: Path, tmp_path: Path, text_file: Path
) -> None:
    for name in ("v.npy", "v.parquet", "folder"):
        output = tmp_path / name
        if name == "folder":
            output.mkdir()
        (output / "mine" if name == "folder" else output).write_text("mine")
        command = ("encode", adapter_folder, text_file, "--output", output, *FLOAT32)
        code, _, err = run_cli(*command)
        assert (code, "--overwrite" in err) == (2, True), err
        assert (output / "mine" if name == "folder" else output).read_text() == "mine"
        code, _, err = run_cli(*command, "--overwrite")
        assert code == 0, err
        assert vectors_of(output).shape == (20, 32)
    code, _, err = run_cli("encode", adapter_folder, text_file, "--output", text_file.with_suffix(""), *FLOAT32)
    assert code == 0, err
    code, _, err = run_cli(
        "encode", adapter_folder, tmp_path / "v.parquet", "--column", "sentence", "--output", tmp_path / "v.parquet",
        "--overwrite", *FLOAT32,
    )  # fmt: skip
    assert code == 2, err


@pytest.mark.parametrize("suffix", [".npy", ""])
def test_an_output_that_another_process_writes_is_not_replaced(
    model: Any, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """The other one has the lock, and later has finished before this one gets it."""
    output = tmp_path / f"v{suffix}"
    lock = tmp_path / f".{output.name}.encoding.lock"
    with locked(lock, "", ""), pytest.raises(SempaError, match="is being written by another process"):
        encode_file(model, text_file, output)
    assert not list(tmp_path.glob("*.encoding"))
    encode_file(model, text_file, tmp_path / f"other{suffix}", normalize=True)

    @contextmanager
    def late(path: Path, *messages: str) -> Iterator[None]:
        (tmp_path / f"other{suffix}").rename(output)
        with locked(path, *messages):
            yield

    monkeypatch.setattr("sempa_st.encoding.shard_folder.locked", late)
    with pytest.raises(SempaError, match=f"{output.name} exists|is not empty"):
        encode_file(model, text_file, output)
    assert not list(tmp_path.glob("*.encoding"))
    np.testing.assert_allclose(np.linalg.norm(vectors_of(output), axis=1), 1, atol=1e-5)


def test_standard_input_is_read(
    run_cli: Cli, adapter_folder: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {
        "txt": "\n".join(SENTENCES).encode(),
        "jsonl": b"".join(json.dumps({"text": sentence, "id": 1}).encode() + b"\n" for sentence in SENTENCES),
    }
    for kind, content in inputs.items():
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        flags = () if kind == "txt" else ("--input-format", kind, "--column", "text")
        output = tmp_path / f"{kind}.npy"
        code, out, err = run_cli("encode", adapter_folder, "-", "--output", output, *FLOAT32, *flags)
        assert code == 0, err
        assert out.startswith("Wrote 20 vectors")
        np.testing.assert_allclose(np.load(output), model.encode(SENTENCES), atol=1e-5)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    code, _, err = run_cli("encode", adapter_folder, "-", "--output", tmp_path / "none.npy", *FLOAT32)
    assert (code, "holds no sentence" in err) == (2, True)
    code, _, err = run_cli("encode", adapter_folder, "x.txt", "--input-format", "csv", "--output", tmp_path / "n.npy")
    assert (code, "is for standard input" in err) == (2, True)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("name", ["v.npy", "v.parquet", "folder"])
def test_an_interrupted_run_goes_on(
    model: Any, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    output, original = tmp_path / name, model.encode
    asked: list[str] = []

    def encode(texts: list[str], **kwargs: Any) -> Any:
        if len(asked) >= 12:
            raise KilledError
        asked.extend(texts)
        return original(texts, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(model, "encode", encode)
        encode_file(model, text_file, output, shard_size=6)
    unfinished = tmp_path / f"{name}.encoding"
    parts = sorted(path.name for path in unfinished.glob("part-*"))
    assert [part[:10] for part in parts] == ["part-00000", "part-00001"]
    assert not output.exists()
    (unfinished / ".half-written").write_text("of a process that was killed")

    with pytest.raises(SempaError, match="another input, model or setting"):
        encode_file(model, text_file, output, shard_size=6, normalize=True)
    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(model, "encode", encode)
        assert encode_file(model, text_file, output, shard_size=6) == (20, 32)
    assert sorted(asked) == sorted(SENTENCES[12:])
    assert not unfinished.exists()
    np.testing.assert_allclose(vectors_of(output), original(SENTENCES), atol=1e-5)
    if name != "v.npy":
        assert pq.read_table(output)["row"].to_pylist() == list(range(1, 21))


def test_a_changed_input_is_another_run(
    model: Any, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done > 1:
            raise KilledError
        return type(model).encode(model, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(model, "encode", fail)
        encode_file(model, text_file, tmp_path / "v.npy", shard_size=6)
    text_file.write_text("\n".join(reversed(SENTENCES)))
    with pytest.raises(SempaError, match="another input"):
        encode_file(model, text_file, tmp_path / "v.npy", shard_size=6)
    encode_file(model, text_file, tmp_path / "v.npy", shard_size=6, overwrite=True)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), model.encode(SENTENCES[::-1]), atol=1e-5)


def test_a_folder_of_files_becomes_a_folder_of_shards(model: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, part in {"a.csv": SENTENCES[:9], "b.csv": SENTENCES[9:]}.items():
        write_rows(tmp_path / "in" / name, [{"text": text, "id": str(SENTENCES.index(text))} for text in part])
    assert encode_file(model, tmp_path / "in", tmp_path / "out", column="text", shard_size=4) == (20, 32)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [f"part-{number:05d}.parquet" for number in range(6)]
    table = pq.read_table(tmp_path / "out")
    assert table["text"].to_pylist() == SENTENCES
    assert table["row"].to_pylist() == list(range(1, 21))
    assert table["id"].to_pylist() == list(map(str, range(20)))
    (tmp_path / "in" / "c.txt").write_text("A cat.")
    with pytest.raises(SempaError, match=r"2 kinds \(\.csv, \.txt\)"):
        read_sentences(tmp_path / "in")


@pytest.mark.parametrize("name", ["v.npy", "v.parquet", "folder"])
def test_shards_stay_until_the_output_is_in_its_place(
    model: Any, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise KilledError

    def publish_all_but_the_output(file: Path, target: Path, **kwargs: Any) -> None:
        fail() if target.name == name else publish(file, target, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr("sempa_st.utils.files.publish", publish_all_but_the_output)
        encode_file(model, text_file, tmp_path / name, shard_size=6)
    assert len(list((tmp_path / f"{name}.encoding").glob("part-*"))) == 4
    with monkeypatch.context() as patch:
        patch.setattr(model, "encode", fail)
        assert encode_file(model, text_file, tmp_path / name, shard_size=6) == (20, 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "sentences.txt"])


def run_and_die(folder: Path, text_file: Path, output: Path, step: str, **options: Any) -> None:
    """Encode in a process that is killed right after the output is in its place, or while its shards are removed."""
    code = f"""
import os, pathlib, shutil, sempa_st
from sempa_st.encoding import encode_file
from sempa_st.utils import files, leftovers
original = {{"publish": files.publish, "rmtree": shutil.rmtree}}
def publish(source, target, **rest):
    original["publish"](source, target, **rest)
    if target.name == {output.name!r}:
        os._exit(9)
def rmtree(path, **rest):
    if {f".{output.name}.encoding.partial"!r} in str(path) and any(pathlib.Path(path).glob("*/part-*")):
        next(pathlib.Path(path).glob("*/part-*")).unlink()
        os._exit(9)
    original["rmtree"](path, **rest)
if {step!r} == "publish":
    files.publish = publish
else:
    leftovers.shutil.rmtree = rmtree
model = sempa_st.load({str(folder)!r}, dtype="float32", device="cpu")
encode_file(model, {str(text_file)!r}, {str(output)!r}, shard_size=6, **{options!r})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9


@pytest.mark.parametrize("name", ["v.npy", "V.NPY", "v.parquet", "folder"])
def test_a_run_that_was_killed_after_the_output_is_finished(
    adapter_folder: Path, tmp_path: Path, text_file: Path, name: str
) -> None:
    """What is beside the output is all that is left to be removed."""
    model: Any = sempa_st.load(adapter_folder, dtype="float32", device="cpu")
    output = tmp_path / name
    earlier = encode_file(model, text_file, output, shard_size=6, normalize=True)
    run_and_die(adapter_folder, text_file, output, "publish", overwrite=True)
    assert len(list(tmp_path.iterdir())) > 3  # shards, scratch folders, an earlier folder
    written = vectors_of(output)
    with pytest.raises(SempaError, match="exists"):
        encode_file(model, text_file, output, shard_size=6, normalize=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "encode", None)
        assert encode_file(model, text_file, output, shard_size=6) == (20, 32) == earlier
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "sentences.txt"])
    np.testing.assert_array_equal(vectors_of(output), written)


def test_shards_that_were_being_removed_are_a_leftover(adapter_folder: Path, tmp_path: Path, text_file: Path) -> None:
    output = tmp_path / "v.npy"
    run_and_die(adapter_folder, text_file, output, "rmtree")
    assert list(tmp_path.glob(".v.npy.encoding.partial-*/*/part-*"))
    with pytest.raises(SempaError, match="exists"):
        encode_file(str(adapter_folder), text_file, output, shard_size=6, dtype="float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sentences.txt", "v.npy"]


def test_an_output_that_came_after_a_killed_run_is_not_taken_for_its_own(
    adapter_folder: Path, tmp_path: Path, text_file: Path
) -> None:
    output = tmp_path / "v.npy"
    run_and_die(adapter_folder, text_file, output, "publish")
    output.with_name("mine.npy").write_bytes(output.read_bytes())
    output.with_name("mine.npy").replace(output)
    options: dict[str, Any] = {"shard_size": 6, "dtype": "float32", "device": "cpu"}
    with pytest.raises(SempaError, match="exists"):
        encode_file(str(adapter_folder), text_file, output, **options)
    assert encode_file(str(adapter_folder), text_file, output, overwrite=True, **options) == (20, 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sentences.txt", "v.npy"]


def test_links_are_followed(model: Any, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output's to another folder, and that of the unfinished run to another disk."""
    elsewhere, other_disk = tmp_path / "elsewhere", tmp_path / "disk"
    elsewhere.mkdir()
    other_disk.mkdir()
    (tmp_path / "v.npy").symlink_to(elsewhere / "real.npy")
    (elsewhere / "real.npy.encoding").symlink_to(other_disk)
    assert encode_file(model, text_file, tmp_path / "v.npy", shard_size=6) == (20, 32)
    assert (tmp_path / "v.npy").is_symlink()
    assert sorted(path.name for path in elsewhere.iterdir()) == ["real.npy", "real.npy.encoding"]
    assert not list(other_disk.iterdir())
    np.testing.assert_allclose(np.load(elsewhere / "real.npy"), model.encode(SENTENCES), atol=1e-5)
    with pytest.raises(SempaError, match="exists"):
        encode_file(model, text_file, tmp_path / "v.npy")


def test_vectors_never_stand_beside_the_ranges_of_others(
    model: Any, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, ranges = tmp_path / "v.npy", tmp_path / "v.npy.ranges.npy"
    encode_file(model, text_file, output, precision="int8")
    before = ranges.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr("sempa_st.encoding.shard_folder._join_npy", Mock(side_effect=KilledError))
        encode_file(model, text_file, output, precision="int8", prompt="What: ", overwrite=True)
    assert not output.exists()
    encode_file(model, text_file, output, precision="int8", prompt="What: ", overwrite=True)
    assert output.exists() and ranges.read_bytes() != before
    encode_file(model, text_file, output, overwrite=True)
    assert output.exists() and not ranges.exists()


def test_a_link_to_itself_is_told(model: Any, tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "v.npy").symlink_to(tmp_path / "v.npy")
    with pytest.raises(SempaError, match="without links to itself"):
        encode_file(model, text_file, tmp_path / "v.npy")


@pytest.mark.parametrize("name", ["sentences.txt/v.npy", "x" * 251 + ".npy"])
def test_an_output_that_cannot_be_is_told(model: Any, tmp_path: Path, text_file: Path, name: str) -> None:
    with pytest.raises(SempaError, match="cannot be"):
        encode_file(model, text_file, tmp_path / name)
    (tmp_path / "w.npy.encoding").write_text("mine")
    with pytest.raises(SempaError, match=r"w\.npy\.encoding"):
        encode_file(model, text_file, tmp_path / "w.npy")


@pytest.mark.parametrize(
    "change", [{"default_prompt_name": "query"}, {"truncate_dim": 8}, {"max_seq_length": 24}, {}], ids=str
)
def test_a_model_whose_settings_or_weights_changed_is_another_one(
    adapter_folder: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    model: Any = sempa_st.load(adapter_folder, dtype="float32", device="cpu", prompts={"query": "What: "})
    done: list[int] = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        done.append(1)
        if len(done) > 1:
            raise KilledError
        return type(model).encode(model, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(model, "encode", fail)
        encode_file(model, text_file, tmp_path / "v.npy", shard_size=6)
    for name, value in change.items():
        setattr(model, name, value)
    if not change:
        with torch.no_grad():  # as a step of an optimizer does
            next(weight for name, weight in model.named_parameters() if "lora_B" in name)[0, 0] += 1e-6
    with pytest.raises(SempaError, match="another input, model or setting"):
        encode_file(model, text_file, tmp_path / "v.npy", shard_size=6)


def test_the_model_that_is_read_is_not_replaced(
    adapter_folder: Path, tmp_path: Path, text_file: Path, run_cli: Cli
) -> None:
    folder = shutil.copytree(adapter_folder, tmp_path / "model")
    code, _, err = run_cli("encode", folder, text_file, "--output", folder, "--overwrite", *FLOAT32)
    assert (code, "which is read from" in err) == (2, True), err
    assert (folder / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "rows",
    [[{"n": 2**70}], [{"n": "\ud800"}], [{"n": {}}], [{"n": 2**60 + 1}] * SHARD_ROWS + [{"n": 1.5}]],
    ids=["number", "surrogate", "struct", "float"],
)
def test_values_that_no_column_holds_are_told(model: Any, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "A cat.", **row} for row in rows])
    with pytest.raises(SempaError, match=r"rows\.jsonl holds values of several types, or such as no parquet file"):
        encode_file(model, path, tmp_path / "v.parquet", column="text", batch_size=256)
