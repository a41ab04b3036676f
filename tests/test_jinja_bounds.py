from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

import sempa_st
from sempa_st.bases import load_tokenizer
from sempa_st.copying import copy_model
from sempa_st.errors import SempaError
from sempa_st.jinja_bounds import check_chat_templates, check_embedding_template
from sempa_st.preferences import preference_rows
from sempa_st.prompts import EMBEDDING_TEMPLATES

pytestmark = pytest.mark.names_dtype

LAST = "{% set s = messages[-1].content %}"
PLAUSIBLE = {
    "a text": 'This sentence: "{{ messages[-1].content }}" means in one word: "',
    "the start token": "{{ bos_token }}Query: {{ messages[-1]['content'] | trim }}\n",
    "a loop": "{% for m in messages %}<{{ m.role }}>{{ m['content'] }}{% if not loop.last %}\n{% endif %}{% endfor %}",
    "a loop over some": "{% for m in messages[-1:] if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "a join": "{{ messages | map(attribute='content') | join('\\n') }} Answer:",
    "a block": "{% set s %}{{ messages[-1].content.strip().replace('\"', '') }}{% endset %}{{ s }}:",
    "a refusal": "{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}{{ messages[0].content }}",
    "a case": "{{ messages[-1].content | lower if lower is defined else messages[-1].content }}",
}
HOSTILE = {
    "numbers in numbers": LAST
    + "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ s }}",
    "numbers": LAST + "{% for i in range(10**12) %}{{ i }}{% endfor %}{{ s }}",
    "letters in letters": LAST + "{% for a in s %}{% for b in s %}{{ s }}{% endfor %}{% endfor %}",
    "letters": LAST + "{% for a in s %}{{ s }}{% endfor %}",
    "a repeated text": LAST + "{{ 'a' * 10000000000 }}{{ s }}",
    "a repeated list": LAST + "{{ [0] * 10000000000 }}{{ s }}",
    "a power": LAST + "{{ 9 ** 9 ** 9 }}{{ s }}",
    "doubling": LAST + "{% set s = s + s %}" * 60 + "{{ s }}",
    "doubling by two names": LAST + "{% set t = s ~ s %}{% set s = t ~ t %}" * 30 + "{{ s }}",
    "doubling by a list": LAST + "{% set s = [s, s] | join %}" * 60 + "{{ s }}",
    "growing replacements": LAST + "{% set s = s | replace('a', 'aaaaaaaaaa') %}" * 20 + "{{ s }}",
    "growing escapes": LAST + "{% set s = [s] | string %}" * 60 + "{{ s }}",
    "growing lists": LAST + "{% set s = s | list | string %}" * 60 + "{{ s }}",
    "padding": LAST + "{{ s.center(10000000000) }}",
    "padding by a filter": LAST + "{{ s | center(10000000000) }}",
    "padding of all": LAST + "{{ messages | map('center', 10000000000) | join }}",
    "a format": LAST + "{{ '%10000000000d' % 1 }}{{ s }}",
    "a format by a filter": LAST + "{{ '%10000000000d' | format(1) }}{{ s }}",
    "a format by a method": LAST + "{{ '{:10000000000}'.format(s) }}",
    "an indentation": LAST + "{{ s | indent(width=10000000000) }}",
    "a macro": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}{{ messages[-1].content }}",
    "a recursive loop": "{% for m in messages recursive %}{{ loop([m, m]) }}{{ m.content }}{% endfor %}",
    "a namespace": LAST
    + "{% set n = namespace(s=s) %}{% for m in messages %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "another file": "{% include 'x' %}{{ messages[-1].content }}",
    "another template": "{% extends 'x' %}{{ messages[-1].content }}",
    "nothing": "",
    "no sentence": "This sentence means in one word:",
    "no end": "{{ messages[-1].content",
    "an unknown tag": "{% nothing %}{{ messages[-1].content }}",
    "depth": "{{ " + "(" * 10_000 + "messages" + ")" * 10_000 + " }}",
    "length": "x" * (2 << 20) + "{{ messages[-1].content }}",
}


@pytest.mark.parametrize("name", EMBEDDING_TEMPLATES)
def test_our_own_templates_are_taken(name: str) -> None:
    for start in ("", "<bos>", "<bos> "):
        check_embedding_template(name, EMBEDDING_TEMPLATES[name].jinja(start=start))


@pytest.mark.parametrize("name", PLAUSIBLE)
def test_plausible_templates_are_taken(name: str) -> None:
    check_embedding_template(name, PLAUSIBLE[name])
    check_chat_templates({name: PLAUSIBLE[name]}, "here")


@pytest.mark.parametrize("name", HOSTILE)
def test_what_could_grow_is_refused(name: str) -> None:
    with pytest.raises(SempaError, match="It") as error:
        check_embedding_template("It", HOSTILE[name])
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "name", ["numbers in numbers", "numbers", "a repeated text", "a repeated list", "a power", "depth"]
)
def test_a_base_of_its_own_may_do_more_but_not_that(name: str) -> None:
    with pytest.raises(SempaError, match=r"The chat template 'default' in here"):
        check_chat_templates(HOSTILE[name], "here")


def test_a_base_of_its_own_may_do_more() -> None:
    check_chat_templates(
        "{%- macro show(m, n=1) -%}{{ '  ' * n }}{{ m | tojson(indent=2) }}{%- endmacro -%}"
        "{%- set n = namespace(i=0) -%}{%- for m in messages -%}{% generation %}{{ show(m) }}{% endgeneration %}"
        "{%- for part in m.content -%}{% if not part %}{% continue %}{% endif %}{{ part }}{%- endfor -%}"
        "{%- for i in range(messages | length) -%}{{ i }}{%- endfor -%}{%- set n.i = n.i + 1 -%}{%- endfor -%}",
        "here",
    )


PIECES = st.sampled_from(
    [
        "{% set s = s + '.' %}",
        "{% set s = s + s %}",
        "{% set t = s ~ messages[0].content %}",
        "{% set s = t | string + [s] | string %}",
        "{% set s = s | replace('a', 'bb') %}",
        "{% set t %}{{ s }}{{ t }}{% endset %}",
        "{% set s = (messages | map(attribute='content') | join('--')) if s else t %}",
        "{% if s and s[-1] == 'a' %}{{ t }}{% else %}{{ s[:3] }}{% endif %}",
        "{% for m in messages %}{{ s }}{{ m.content }}{% set s = s + m.content %}{% endfor %}",
        "{{ s | list }}",
        "{{ [s, t] | join(', ') }}",
    ]
)


@given(st.lists(PIECES, max_size=6), st.text("ab\\'\"\n", max_size=20))
def test_the_bound_is_one(pieces: list[str], sentence: str) -> None:
    """No template that is taken writes more than the bound that it is taken for."""
    text = LAST + "{% set t = '' %}" + "".join(pieces) + "{{ s }}"
    try:
        check_embedding_template("It", text)
    except SempaError:
        return
    messages = [{"role": "system", "content": sentence}, {"role": "user", "content": sentence}]
    written = ImmutableSandboxedEnvironment().from_string(text).render(messages=messages)
    assert len(written) <= 100_000 + 64 * 2 * len(sentence)


def test_a_template_is_looked_at_by_every_route(adapter_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter_folder, tmp_path / "model")
    (folder / "additional_chat_templates" / "prompteol.jinja").write_text(HOSTILE["letters"])
    for open_it in (
        lambda: sempa_st.load(folder, dtype="float32", device="cpu"),
        lambda: sempa_st.load(folder, dtype="float32", device="cpu", reader="native"),
        lambda: copy_model(str(folder), tmp_path / "copied"),
    ):
        with pytest.raises(SempaError, match=r"The template 'prompteol' in .*model has a For in line 1"):
            open_it()
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "chat_template.jinja").write_text(HOSTILE["numbers in numbers"])
    with pytest.raises(SempaError, match=r"The chat template 'default' in .*base has a loop over numbers"):
        load_tokenizer(base)


def test_a_chat_template_that_fails_is_named(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.chat_template = "{{ messages[0].content + 1 }}"
    with pytest.raises(SempaError, match=r"own chat template cannot be rendered \(TypeError"):
        preference_rows([], tokenizer, paraphrase="keep")
