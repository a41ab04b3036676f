"""Bad input on the command line: one paragraph, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.tiny import sample_sentences
from transformers import BertConfig, BertModel

import sempa_st
from sempa_st import encoding
from sempa_st.errors import SempaError

Cli = Callable[..., tuple[int, str, str]]


def assert_refused(result: tuple[int, str, str], *parts: str) -> None:
    code, _, err = result
    assert code == 2, err
    assert "Traceback" not in err
    message = err.strip().splitlines()[-1]
    assert message.startswith("sempa: ")
    for part in parts:
        assert part in message, message


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "sentences.txt"
    path.parent.mkdir()
    path.write_text("\n".join(sample_sentences()[:10]) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize("kind", [".txt", ".csv", ".jsonl", ".parquet"])
def test_encode_writes_the_models_vectors(
    run_cli: Cli, adapter_folder: Path, tmp_path: Path, text_file: Path, kind: str, suffix: str
) -> None:
    sentences = sample_sentences()[:10]
    source, output = tmp_path / f"s{kind}", tmp_path / "out" / f"v{suffix}"
    table = pa.table({"id": range(10), "text": sentences})
    if kind == ".txt":
        shutil.copy(text_file, source)
    elif kind == ".csv":
        import csv

        with source.open("w", newline="") as handle:
            csv.writer(handle).writerows([["id", "text"], *enumerate(sentences)])
    elif kind == ".jsonl":
        source.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        pq.write_table(table, source)
    column = [] if kind == ".txt" else ["--column", "text"]
    code, out, err = run_cli(
        "encode", adapter_folder, source, "--output", output, "--dtype", "float32", "--device", "cpu", *column
    )
    assert code == 0, err
    assert "Wrote 10 vectors of width 32" in out
    expected = sempa_st.load(adapter_folder, dtype="float32", device="cpu").encode(sentences)
    if suffix == ".npy":
        vectors = np.load(output, allow_pickle=False)
    else:
        written = pq.read_table(output).to_pydict()
        assert written["sentence"] == sentences
        assert written["row"] == list(range(1, 11))
        vectors = np.array(written["embedding"], dtype=np.float32)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_encode_goes_through_windows(
    run_cli: Cli, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding.shard_writer, "WINDOW", 4)
    sentences = [sample_sentences()[number] for number in (0, 1, 0, 2, 3, 4, 4, 4, 4, 5, 0)]
    source = tmp_path / "s.txt"
    source.write_text("\n".join(sentences))
    model = sempa_st.load(adapter_folder, dtype="float32", device="cpu")
    asked: list[int] = []
    original = model.encode

    def encode(texts: list[str], **kwargs: Any) -> Any:
        asked.append(len(texts))
        return original(texts, **kwargs)

    monkeypatch.setattr(model, "encode", encode)
    found = encoding.read_sentences(source)
    for output in (tmp_path / "v.npy", tmp_path / "v.parquet"):
        assert encoding.encode_file(model, found, output) == (11, 32)
    assert asked == [3, 2, 3] * 2
    expected = original(sentences)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)
    table = pq.read_table(tmp_path / "v.parquet")
    assert (table["sentence"].to_pylist(), table["row"].to_pylist()) == (sentences, list(range(1, 12)))
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), expected, atol=1e-5)

    source.write_text("\n".join(sentences[:-1]))
    (tmp_path / "v.npy").unlink()
    with pytest.raises(SempaError, match="changed while it was read: 10 sentences instead of 11"):
        encoding.encode_file(model, found, tmp_path / "v.npy")
    assert not list(tmp_path.glob("*v*.npy"))


def test_encode_counts_and_skips_empty_rows(run_cli: Cli, adapter_folder: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "s.txt", tmp_path / "v.parquet"
    source.write_text("a cat\n\na dog\n")
    assert_refused(
        run_cli("encode", adapter_folder, source, "--output", output), "1 empty", "row(s) 2", "--skip-bad-rows"
    )
    code, out, _ = run_cli("encode", adapter_folder, source, "--output", output, "--skip-bad-rows", "--device", "cpu")
    assert code == 0
    assert "1 empty rows skipped" in out
    assert pq.read_table(output)["row"].to_pylist() == [1, 3]


def test_encode_refuses_what_it_cannot_do(run_cli: Cli, adapter_folder: Path, tmp_path: Path, text_file: Path) -> None:
    refuse = ["encode", adapter_folder]
    assert_refused(run_cli(*refuse, text_file, "--output", tmp_path / "v.csv"), "unknown ending", ".npy, .parquet")
    assert_refused(run_cli(*refuse, text_file, "--output", tmp_path / "v.npy", "--column", "a"), "no columns")
    assert_refused(run_cli(*refuse, tmp_path / "no.txt", "--output", tmp_path / "v.npy"), "no.txt")
    table = tmp_path / "t.jsonl"
    table.write_text('{"a": "x", "b": "y"}\n')
    assert_refused(run_cli(*refuse, table, "--output", tmp_path / "v.npy"), "No --column", "a, b")
    assert_refused(run_cli(*refuse, table, "--output", tmp_path / "v.npy", "--column", "c"), "no column 'c'", "a, b")
    assert not (tmp_path / "v.npy").exists()


def test_unwritable_output(run_cli: Cli, adapter_folder: Path, tmp_path: Path, text_file: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, not a folder")
    for output in (blocked / "v.npy", Path("/proc/v.npy")):
        assert_refused(
            run_cli("encode", adapter_folder, text_file, "--output", output, "--device", "cpu"), "cannot be written"
        )
    train = ["train", "--base", "x", "--data", "sample", "--dev", "sample", "--output"]
    assert_refused(run_cli("copy", adapter_folder, blocked / "m"), "may be written")
    assert_refused(run_cli(*train, blocked), "is a file")
    assert_refused(run_cli(*train, tmp_path / "new"), "Unknown model 'x'")


def test_models_that_cannot_be_used(
    run_cli: Cli, adapter_folder: Path, tiny_gemma: Path, tmp_path: Path, text_file: Path
) -> None:
    tail = [text_file, "--output", tmp_path / "v.npy", "--device", "cpu"]
    assert_refused(run_cli("encode", "no-such/model", *tail), "Unknown model 'no-such/model'")
    assert_refused(run_cli("encode", tmp_path, *tail), "no config.json")
    small = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=20, **small)).save_pretrained(tmp_path / "bert")
    assert_refused(run_cli("encode", tmp_path / "bert", *tail), "not a decoder", "BertModel")
    assert_refused(run_cli("copy", tmp_path / "bert", tmp_path / "copy"), "not a decoder", "BertModel")
    assert_refused(run_cli("generation", tmp_path / "bert", "--tasks", "wikitext"), "not a decoder", "BertModel")
    assert not (tmp_path / "copy").exists()
    assert_refused(run_cli("encode", adapter_folder, *tail, "--base", tiny_gemma), "cannot be used on the base")
    assert_refused(run_cli("encode", adapter_folder, *tail, "--template", "prompteol"), "brings its own template")

    broken = shutil.copytree(adapter_folder, tmp_path / "broken")
    weights = broken / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:64])
    assert_refused(run_cli("encode", broken, *tail), "adapter_model.safetensors is corrupted")
    weights.unlink()
    torch.save({}, broken / "adapter_model.bin")
    assert_refused(run_cli("encode", broken, *tail), "never loaded")
    (broken / "modules.json").unlink()
    assert_refused(run_cli("encode", broken, *tail), "Pickled weights are never loaded")
    (broken / "adapter_model.bin").unlink()
    assert_refused(run_cli("encode", broken, *tail), "bare adapter")
    assert not (tmp_path / "v.npy").exists()


def test_training_refuses_before_it_writes(run_cli: Cli, tiny_base: Path, adapter_folder: Path, tmp_path: Path) -> None:
    nli = tmp_path / "nli.csv"
    nli.write_text("sent0,sent1,hardneg\na,b,c\n")
    output = tmp_path / "out" / "model"
    train = ["train", "--base", tiny_base, "--dev", "sample", "--device", "cpu", "--output", output]
    assert_refused(run_cli(*train, "--data", nli), "holds pairs alone", "hard_neg", "--columns")
    nli.write_text("sent0,sent1,hard_neg\na,,c\n")
    assert_refused(run_cli(*train, "--data", nli), "row(s) 1", "--skip-bad-rows")
    assert_refused(run_cli(*train, "--data", nli, "--skip-bad-rows"), "no usable triplet")
    assert_refused(run_cli(*train, "--data", "nonsense"), "Unknown data 'nonsense'")
    assert_refused(run_cli(*train, "--data", "sample", "--dev", "stsb"), "STS-B dev is needed", "--dev sample")
    assert_refused(run_cli(*train, "--data", "sample", "--beta", "-1"), "beta is -1.0")
    assert_refused(run_cli(*train, "--data", "sample", "--max-seq-length", "5"), "max_seq_length 5 leaves no room")
    assert_refused(run_cli(*train, "--data", "sample", "--device", "gpu"), "device 'gpu'")
    one = tmp_path / "one.jsonl"
    one.write_text('{"sentence1": "a", "sentence2": "b", "score": 1}\n')
    assert_refused(run_cli(*train, "--data", "sample", "--dev", one), "cannot rank a model")
    assert_refused(run_cli(*train, "--data", "sample", "--base", adapter_folder), "is an adapter", "--from")
    assert not output.parent.exists()
    output.mkdir(parents=True)
    (output / "mine").write_text("x")
    assert_refused(run_cli(*train, "--data", "sample"), "not empty", "--overwrite")
    assert [path.name for path in output.parent.iterdir()] == ["model"]


def test_copy_refuses_what_it_cannot_do(run_cli: Cli, adapter_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "m"
    assert_refused(run_cli("copy", tiny_base, output, "--merge"), "nothing to merge")
    assert_refused(run_cli("copy", adapter_folder, output, "--template", "prompteol"), "brings its own")
    assert_refused(run_cli("copy", tiny_base, output, "--base", tiny_base), "leave out --base")
    assert not output.exists()


def test_upper_case_endings_are_files_too(run_cli: Cli, adapter_folder: Path, tmp_path: Path, text_file: Path) -> None:
    output = tmp_path / "out" / "V.NPY"
    code, _, err = run_cli("encode", adapter_folder, text_file, "--output", output, "--device", "cpu")
    assert code == 0, err
    assert np.load(output).shape == (10, 32)
    assert [path.name for path in output.parent.iterdir()] == ["V.NPY"]


def test_options_that_would_be_ignored_or_cannot_be_met(
    run_cli: Cli, adapter_folder: Path, tiny_base: Path, tmp_path: Path, text_file: Path
) -> None:
    tail = [text_file, "--output", tmp_path / "v.npy"]
    assert_refused(run_cli("encode", adapter_folder, *tail, "--reader", "native", "--base", tiny_base), "--base")
    assert_refused(run_cli("encode", tiny_base, *tail, "--base", tiny_base), "--base")
    assert_refused(run_cli("encode", adapter_folder, *tail, "--device", "gpu"), "device 'gpu' cannot be used")
    code, _, err = run_cli("encode", adapter_folder, *tail, "--batch-size", "0")
    assert code == 2
    assert "above 0" in err
    broken = shutil.copytree(adapter_folder, tmp_path / "broken")
    weights = broken / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:64])
    assert_refused(run_cli("encode", broken, *tail, "--reader", "native"), "adapter_model.safetensors is corrupted")
    weights.write_bytes(whole)
    (broken / "tokenizer.json").unlink()
    assert_refused(run_cli("encode", broken, *tail), "The tokenizer in")


def test_an_unexpected_error_is_one_line(run_cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("sempa_st.folder.copying.copy_model", fail)
    code, _, err = run_cli("copy", "x", tmp_path / "y")
    assert code == 1
    assert err.startswith("sempa: ZeroDivisionError: by zero")
    assert "Traceback" not in err


@pytest.mark.parametrize("header", [",".join(f"\x1b]0;{n}\u202e" for n in range(100_000)), "x" * 9000 + ",\x1b[31m"])
def test_an_error_prints_neither_control_characters_nor_endless_names(
    run_cli: Cli, tmp_path: Path, header: str
) -> None:
    (tmp_path / "x.csv").write_text(f"{header}\n1\n", encoding="utf-8")
    code, out, err = run_cli("train", "--data", tmp_path / "x.csv", "--output", tmp_path / "out")
    assert_refused((code, out, err), "has the columns (", "\\x1b", "Expected (sent0, sent1, hard_neg)", "--columns.")
    assert err.removesuffix("\n").isprintable() and len(err) < 2000


def test_a_panic_of_the_tokenizer_while_it_runs_is_bad_input(run_cli: Cli, tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    settings = json.loads((base / "tokenizer.json").read_text())
    endless = {"type": "Replace", "pattern": {"Regex": "(([a-zA-Z ]+)+)+[0-9]$"}, "content": ""}
    (base / "tokenizer.json").write_text(json.dumps({**settings, "normalizer": endless}))
    (tmp_path / "x.txt").write_text("The sentence is longer than the one that a tokenizer is tried with.\n")
    result = run_cli("encode", base, tmp_path / "x.txt", "--output", tmp_path / "x.npy")
    assert_refused(result, "A library gave up (", "Restore or download the model again")


def test_the_demo_replaces_only_an_earlier_demo(run_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert_refused(run_cli("demo", "--output", tmp_path / "mine"), "not empty")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    from sempa_st.cli.main import main

    with pytest.raises(sempa_st.SempaError, match="Unknown model"):
        main(["copy", "no-such/model", str(tmp_path / "m"), "--debug"])


def test_the_installed_command_answers() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sempa_st", "encode", "no-such/model", "x.txt", "--output", "x.npy"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 2
    assert result.stderr.startswith("sempa: The file x.txt does not exist")
