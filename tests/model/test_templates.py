from __future__ import annotations

import pytest
from helpers.tiny import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from sempa_st.data.preferences import PARAPHRASE_TEMPLATES, paraphrase_template
from sempa_st.errors import SempaError
from sempa_st.model.templates import EMBEDDING_TEMPLATES, EmbeddingTemplate, embedding_template, normalize_sentence

TOKENIZER = make_tokenizer()
PLAIN_TEMPLATES = [*EMBEDDING_TEMPLATES.values(), EmbeddingTemplate("raw", "a\n'\\ {{ x }}\U0001f600", '"\n', False)]


def render(tokenizer: PreTrainedTokenizerFast, template: EmbeddingTemplate, messages: list[dict], start: str) -> str:
    text = tokenizer.apply_chat_template(messages, chat_template=template.jinja(start=start), tokenize=False)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("A cat", "A cat."),
        ("A cat.", "A cat."),
        ("A cat?", "A cat."),
        ("A cat!", "A cat!."),
        ('He said "yes"', "He said 'yes'"),
        ('Who said "yes"?', "Who said 'yes'."),
        ("the cats'", "the cats'"),
        ("", ""),
        ("?", "."),
        ("Ünï 😀", "Ünï 😀."),
    ],
)
def test_normalisation_follows_the_paper(sentence: str, expected: str) -> None:
    assert normalize_sentence(sentence) == expected


def test_the_two_templates_are_the_papers() -> None:
    assert EMBEDDING_TEMPLATES["prompteol"].text("A cat") == 'This sentence : "A cat." means in one word:"'
    assert (
        EMBEDDING_TEMPLATES["pretended-cot"].text("A cat")
        == 'After thinking step by step , this sentence : "A cat." means in one word:"'
    )


@settings(max_examples=300, deadline=None)
@given(
    sentence=st.text(max_size=60),
    prompt=st.text(max_size=20),
    template=st.sampled_from(PLAIN_TEMPLATES),
    start=st.sampled_from(["", "<bos>", "<s> "]),
)
def test_python_and_jinja_render_the_same_text(
    sentence: str, prompt: str, template: EmbeddingTemplate, start: str
) -> None:
    system = [{"role": "system", "content": prompt}] if prompt else []
    rendered = render(TOKENIZER, template, [*system, {"role": "user", "content": sentence}], start)
    assert rendered == start + template.text(sentence, prompt)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "a"}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "system", "content": "s"}],
    ],
)
def test_other_conversations_are_refused(messages: list[dict]) -> None:
    with pytest.raises(TemplateError, match="one user message"):
        render(TOKENIZER, EMBEDDING_TEMPLATES["prompteol"], messages, "")


def test_paraphrase_templates_are_named_or_the_users_own() -> None:
    assert len(PARAPHRASE_TEMPLATES) == 5
    for name, template in PARAPHRASE_TEMPLATES.items():
        assert paraphrase_template(name) == template
        assert template.count("{sentence}") == 1
    assert paraphrase_template("keep") == (
        'Keep the same meaning of this sentence: "{sentence}", while making some changes.'
    )
    own = "Say {sentence} in {other} words / dans d'autres mots."
    assert paraphrase_template(own) == own


@pytest.mark.parametrize(
    ("text", "count"), [("Say it again.", 0), ("{sentence} and {sentence}", 2), ("{ sentence }", 0), ("", 0)]
)
def test_a_paraphrase_text_has_its_placeholder_once(text: str, count: int) -> None:
    with pytest.raises(SempaError, match=rf"one of: keep, .*own with {{sentence}} in it once \(found {count} times\)"):
        paraphrase_template(text)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(SempaError, match=r"'nope'.*prompteol, pretended-cot"):
        embedding_template("nope")
    with pytest.raises(SempaError, match=r"'nope'.*keep, keep-syntax"):
        paraphrase_template("nope")
