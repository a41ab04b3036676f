from __future__ import annotations

import random
from typing import Any

import pytest
from helpers.tiny import make_tokenizer, sample_sentences, train_bpe
from tokenizers import AddedToken, Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerFast

from sempa_st.errors import SempaError
from sempa_st.model.embedded import embedded_base
from sempa_st.model.server_tokenizer import tokenizer_with_template
from sempa_st.model.templates import EMBEDDING_TEMPLATES, embedding_template
from sempa_st.model.tokenizer import install_template, load_tokenizer, template_ids

ALPHABET = [*"abc .?!\"'\n\t\r\\<>é😀_-0{}$^", "The ", "dog ", '?"', ". ", "\u200d", "\x00"]


def random_texts(count: int, extra: list[str] = ()) -> list[str]:  # type: ignore[assignment]
    rng = random.Random(0)
    alphabet = [*ALPHABET, *extra]
    drawn = ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(count)]
    return [text for text in drawn if text not in extra]


def with_tags() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ("<b>", "</b>", "<br>")])
    return tokenizer


def of_sentencepiece_style() -> Any:
    """A tokenizer with a normaliser of its own, that marks the beginning of a text and spaces, as Llama 2's."""
    core: Tokenizer = train_bpe(["<unk>", "<s>", "</s>"])
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("\u2581", " ")])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize("template", EMBEDDING_TEMPLATES)
@pytest.mark.parametrize("make", [make_tokenizer, lambda: make_tokenizer(bos=False), with_tags, of_sentencepiece_style])
def test_texts_get_the_tokens_of_the_chat_template(make: Any, template: str) -> None:
    tokenizer, definition = make(), embedding_template(template)
    install_template(tokenizer, definition)
    moved = tokenizer_with_template(tokenizer, definition)
    tags = ["<b>", "</b>", "<br>"] if make is with_tags else []
    for text in [*sample_sentences()[:30], *random_texts(400, tags)]:
        assert moved.encode(text).ids == template_ids(tokenizer, template, text), repr(text)


def test_the_text_of_a_special_token_is_text() -> None:
    tokenizer, template = make_tokenizer(), embedding_template("prompteol")
    install_template(tokenizer, template)
    ids = tokenizer_with_template(tokenizer, template).encode("a <eos> b").ids
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids[1:]) == template.text("a <eos> b")


def test_a_tokenizer_that_would_give_other_tokens_is_refused() -> None:
    tokenizer, template = make_tokenizer(), embedding_template("prompteol")
    tokenizer.add_tokens([AddedToken("cat", normalized=False, single_word=True, lstrip=True)])
    install_template(tokenizer, template)
    tokenizer.chat_template["prompteol"] = tokenizer.chat_template["prompteol"].replace("one word", "two words")
    with pytest.raises(SempaError, match="cannot be moved into the tokenizer"):
        tokenizer_with_template(tokenizer, template)


@pytest.mark.integration
def test_texts_get_the_same_tokens_with_gemma() -> None:
    tokenizer, template = load_tokenizer(embedded_base()), embedding_template("prompteol")
    install_template(tokenizer, template)
    moved = tokenizer_with_template(tokenizer, template)
    texts = [*random_texts(1900, ["<b>", "</table>"]), *sample_sentences()[:100]]
    prompts = [template_ids(tokenizer, "prompteol", text) for text in texts]
    assert [encoding.ids for encoding in moved.encode_batch(texts)] == prompts
