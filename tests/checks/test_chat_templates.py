from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

import sempa_st
from sempa_st.data.preferences import preference_rows
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model
from sempa_st.model import chat_templates, template_trial
from sempa_st.model.chat_templates import check_chat_templates, check_embedding_template
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.model.tokenizer import load_tokenizer

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
    "a power": LAST + "{{ 9 ** (9 ** 9) }}{{ s }}",
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
FOREVER = {
    "a macro in itself": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "numbers by a name": "{% set r = range(90000) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "a format": '{{ "%9999999999d" % 1 }}',
    "a format by a method": '{{ "{:>9999999999}".format(1) }}',
    "letters in letters": "{% for a in messages[-1].content %}{% for b in messages[-1].content %}"
    "{% for c in messages[-1].content %}{% endfor %}{% endfor %}{% endfor %}",
    "an answer alone": "{% if add_generation_prompt %}{{ 'a' * 10**10 }}{% endif %}",
    "doubling by turns": HOSTILE["a namespace"],
    "much for each sentence": "{% for i in range(90000) %}{% for j in 'abcdefghijklmnop' %}{% endfor %}{% endfor %}",
    "a special token": "{% for a in bos_token %}{{ bos_token }}{% endfor %}",
}
"""Templates that are too slow or large although their syntax looks harmless."""
HARMLESS = {
    "an indentation": "{% macro show(depth) %}{{ '-' * (depth * 2) }}{% endmacro %}{{ show(3) }}",
    "short numbers in numbers": "{% for i in range(4) %}{% for j in range(3) %}{{ i * j }}{% endfor %}{% endfor %}",
    "a power": "{{ 9 ** 9 ** 9 }}",  # Jinja evaluates it from the left: 78 digits
    "a refusal": "{{ raise_exception('Conversation roles must alternate') }}",
    "an error": "{{ messages[0].content + 1 }}",
    "much": "{%- macro show(m, n=1) -%}{{ '  ' * n }}{{ m | tojson(indent=2) }}{%- endmacro -%}"
    "{%- set n = namespace(i=0) -%}{%- for m in messages -%}{% generation %}{{ show(m) }}{% endgeneration %}"
    "{%- for part in m.content -%}{% if not part %}{% continue %}{% endif %}{{ part }}{%- endfor -%}"
    "{%- for i in range(messages | length) -%}{{ i }}{%- endfor -%}{%- set n.i = n.i + 1 -%}{%- endfor -%}",
    "a date": "{{ strftime_now('%Y') }}",
    "none": "",
}
TOKENS = {"bos_token": "<s>"}


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "_SECONDS", 1)


@pytest.mark.parametrize("name", EMBEDDING_TEMPLATES)
def test_our_own_templates_need_no_trial(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [EMBEDDING_TEMPLATES[name].jinja(start=start) for start in ("", "<s>", "<s> ", "another")]
    check_embedding_template(name, texts[-1], TOKENS)
    monkeypatch.setattr(chat_templates, "_tried", None)
    for text in texts[:-1]:
        check_embedding_template(name, text, TOKENS)


@pytest.mark.parametrize("name", PLAUSIBLE)
def test_plausible_templates_are_taken(name: str) -> None:
    check_embedding_template(name, PLAUSIBLE[name], TOKENS)
    check_chat_templates({name: PLAUSIBLE[name]}, "here", TOKENS)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("name", HOSTILE)
def test_what_could_grow_is_refused(name: str) -> None:
    with pytest.raises(SempaError, match="It") as error:
        check_embedding_template("It", HOSTILE[name], TOKENS)
    assert len(str(error.value)) < 1000


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    "text",
    [
        *(HOSTILE[name] for name in ("numbers in numbers", "numbers", "a repeated text", "a repeated list")),
        *(HOSTILE[name] for name in ("a power", "depth", "no end")),
        *FOREVER.values(),
    ],
)
def test_a_base_of_its_own_may_do_more_but_not_that(text: str) -> None:
    with pytest.raises(SempaError, match=r"The chat template 'default' in here"):
        check_chat_templates(text, "here", {"bos_token": "<s>" * 10_000})


@pytest.mark.parametrize("name", HARMLESS)
def test_a_base_of_its_own_may_do_more(name: str) -> None:
    check_chat_templates(HARMLESS[name], "here", TOKENS)


def test_an_answer_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "{{ messages[0].content }} is asked once"
    check_embedding_template("It", text, TOKENS)
    monkeypatch.setattr(sys, "executable", "/no/python")
    check_embedding_template("It", text, TOKENS)


@pytest.mark.parametrize(
    ("executable", "message"),
    [
        ("/no/python", r"^It cannot be tried out by '/no/python' in a process of its own \(.*No such file"),
        ("", r"^It cannot be tried out by '' in a process of its own \("),
        (shutil.which("false"), r"^It cannot be tried out \(exit code 1"),
        (shutil.which("true"), r"^It cannot be tried out \(exit code 0"),
    ],
)
def test_what_cannot_be_tried_is_refused(executable: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(SempaError, match=message):
        check_embedding_template("It", "{{ messages[0].content }}" + f" by {executable}", TOKENS)


def test_a_process_that_gives_no_answer_is_left_and_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "{{ messages[0].content }} in no time"
    with monkeypatch.context() as busy:
        busy.setattr(chat_templates, "_WAIT", 0.01)
        with pytest.raises(SempaError, match=r"^It cannot be tried out .* timed out after 0.01 seconds"):
            check_embedding_template("It", text, TOKENS)
    check_embedding_template("It", text, TOKENS)


@pytest.mark.parametrize(
    "text",
    [
        *PLAUSIBLE.values(),
        *HARMLESS.values(),
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% if add_generation_prompt %}\n  {% set x = {'ö': '<'} %}\n  {{ x | tojson }}\n{% endif %}\n",
    ],
)
def test_a_trial_renders_as_transformers_does(text: str) -> None:
    messages = [{"role": "user", "content": "A cat's\n sleep."}]
    task = {"template": text, "tokens": TOKENS, "conversations": [(messages, True)], "fixed": 1000, "times": 1}
    outcome = template_trial.answer(task)["outcomes"][0]
    try:
        expected, _ = render_jinja_template([messages], chat_template=text, add_generation_prompt=True, **TOKENS)
    except Exception as error:
        assert outcome == {"error": repr(error)}
    else:
        assert outcome == {"text": expected[0]}


@pytest.mark.usefixtures("soon")
def test_a_template_is_looked_at_by_every_route(adapter_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter_folder, tmp_path / "model")
    (folder / "additional_chat_templates" / "prompteol.jinja").write_text(HOSTILE["letters"])
    for open_it in (
        lambda: sempa_st.load(folder, dtype="float32", device="cpu"),
        lambda: sempa_st.load(folder, dtype="float32", device="cpu", reader="native"),
        lambda: copy_model(str(folder), tmp_path / "copied"),
    ):
        with pytest.raises(SempaError, match=r"template 'prompteol' in .*model takes too much"):
            open_it()
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "chat_template.jinja").write_text(FOREVER["numbers by a name"])
    for open_it in (lambda: load_tokenizer(base), lambda: sempa_st.load(base, dtype="float32", device="cpu")):
        with pytest.raises(SempaError, match=r"The chat template 'default' in .*base takes too much"):
            open_it()


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("place", ["sentence_bert_config.json", "chat_template.jinja"])
def test_one_of_a_plain_model_is_looked_at_too(adapter_folder: Path, tmp_path: Path, place: str) -> None:
    folder = shutil.copytree(adapter_folder, tmp_path / "model")
    (folder / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 32, "pooling_mode": "mean"}')
    file = folder / place
    if file.suffix == ".json":
        settings = json.loads(file.read_text())
        settings["processing_kwargs"]["chat_template"]["chat_template"] = FOREVER["a format"]
        file.write_text(json.dumps(settings))
    else:
        file.write_text(FOREVER["a format"])
    with pytest.raises(SempaError, match=r"The chat template 'default' in .*model takes too much"):
        sempa_st.load(folder, dtype="float32", device="cpu")


def test_a_chat_template_that_fails_is_named(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.chat_template = "{{ messages[0].content + 1 }}"
    with pytest.raises(SempaError, match=r"chat template cannot be rendered \(TypeError"):
        preference_rows([], tokenizer, paraphrase="keep")
