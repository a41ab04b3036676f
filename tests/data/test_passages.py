"""Ordinary text from a file for the KL term."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from helpers.tiny import make_config, make_tokenizer, sample_sentences
from tokenizers.processors import TemplateProcessing

from sempa_st.data.passages import PASSAGE_TOKENS, read_passages
from sempa_st.errors import SempaError
from sempa_st.training.run import train
from sempa_st.training.run_folder import RunFolder

pytestmark = pytest.mark.names_dtype


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(sample_sentences()[:120]), encoding="utf-8")
    return file


@pytest.mark.parametrize("bos", [True, False])
def test_passages_are_the_text_in_pieces_that_begin_as_any_text_does(text: Path, bos: bool) -> None:
    tokenizer = make_tokenizer(bos=bos)
    passages = read_passages(str(text), tokenizer).token_ids
    assert len(passages) > 5 and {len(passage) for passage in passages} == {PASSAGE_TOKENS}
    start = [tokenizer.bos_token_id] if bos else []
    assert all(passage[: len(start)] == start for passage in passages)
    joined = [token for passage in passages for token in passage[len(start) :]]
    assert text.read_text(encoding="utf-8").startswith(tokenizer.decode(joined))


@pytest.mark.parametrize(("single", "beginning"), [("<eos> $A", [2]), ("$A <eos>", []), ("<bos> $A <eos>", [1])])
def test_what_a_tokenizer_puts_behind_a_text_is_no_beginning(text: Path, single: str, beginning: list[int]) -> None:
    tokenizer = make_tokenizer(bos=False)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    row = read_passages(str(text), tokenizer).token_ids[0]
    assert row[: len(beginning)] == beginning and not {1, 2} & set(row[len(beginning) :])


def test_a_text_that_is_too_short_or_no_text_is_refused(text: Path) -> None:
    text.write_text("Too short.", encoding="utf-8")
    with pytest.raises(SempaError, match=r"text\.txt has \d+ tokens of text\. Expected at least 127"):
        read_passages(str(text), make_tokenizer())
    text.write_bytes(b"\xff\xfe\xff")
    for name in (text, text.with_name("absent.txt")):
        with pytest.raises(SempaError, match=f"The text .*{name.name} cannot be read"):
            read_passages(str(name), make_tokenizer())


def test_a_run_learns_with_it_and_records_it(text: Path, tiny_base: Path, tmp_path: Path) -> None:
    config = make_config(tiny_base, tmp_path / "model", objective="contrastive", kl=0.1, kl_text=str(text))
    record = train(config).record
    assert record["training"][0]["kl"] == pytest.approx(0, abs=1e-6)
    assert record["training"][-1]["kl"] > 0
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    assert record["data"]["kl_text_sha256"] == digest
    assert (
        "kl_text_sha256"
        not in train(make_config(tiny_base, tmp_path / "other", objective="contrastive")).record["data"]
    )


def test_a_text_that_is_gone_or_too_short_is_refused_before_anything_is_touched(
    text: Path, tiny_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "model"
    earlier = RunFolder(output).path
    earlier.mkdir()
    (earlier / "mine").touch()
    text.write_text("Too short.", encoding="utf-8")
    for file, message in ((text, "Expected at least"), (tmp_path / "absent.txt", "cannot be read")):
        settings = {"objective": "contrastive", "kl": 0.1, "kl_text": str(file), "overwrite": True}
        with pytest.raises(SempaError, match=message):
            train(make_config(tiny_base, output, **settings))
        assert not output.exists() and (earlier / "mine").is_file()


def test_a_text_inside_the_output_is_not_overwritten(text: Path, tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    output.mkdir()
    inside = output / "text.txt"
    inside.write_bytes(text.read_bytes())
    with pytest.raises(SempaError, match=r"text\.txt"):
        train(make_config(tiny_base, output, objective="contrastive", kl=0.1, kl_text=str(inside), overwrite=True))
    assert inside.is_file()


def test_a_text_that_never_ends_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SempaError, match="is no file"):
        read_passages(str(tmp_path / "pipe"), make_tokenizer())
