from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from helpers.tiny import CHAT_TEMPLATE, make_tokenizer
from transformers import LlamaTokenizer

from sempa_st.data.nli import Triplet
from sempa_st.data.preferences import preference_rows
from sempa_st.errors import SempaError
from sempa_st.model.chat_formats import CHAT_TEMPLATES, chat_template
from sempa_st.training.answers import answer_ids

QUESTION = 'Keep the same meaning of this sentence: "A man plays.", while making some changes.'
GOLDEN = {
    "llama2": (
        f"<bos>[INST] <<SYS>>\nYou are a helpful assistant\n<</SYS>>\n\n{QUESTION} [/INST]",
        " Someone makes music.<eos>",
    ),
    "llama3": (
        "<bos><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Someone makes music.<|eot_id|>",
    ),
    "chatml": (
        "<bos><|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        "Someone makes music.<|im_end|>\n",
    ),
}
MARKERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]


def example(tokenizer: Any) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    row = preference_rows([Triplet("A man plays.", "Someone makes music.", "No")], tokenizer, paraphrase="keep")[0]
    return row["prompt"], row["chosen"]


def with_format(name: str, tokenizer: Any) -> Any:
    tokenizer.chat_template = chat_template(name, tokenizer)
    return tokenizer


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_prompt_and_answer_are_the_golden_text(name: str) -> None:
    tokenizer = with_format(name, make_tokenizer(chat=None))
    prompt, answer = example(tokenizer)
    golden = GOLDEN[name]
    assert tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) == golden[0]
    assert tokenizer.apply_chat_template(prompt + answer, tokenize=False) == golden[0] + golden[1]
    prompt_ids, ids = answer_ids(tokenizer, prompt, answer)
    assert tokenizer.decode(prompt_ids) == golden[0]
    assert tokenizer.decode(ids) == golden[1]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_bos_is_there_only_if_the_tokenizer_adds_it(name: str) -> None:
    tokenizer = with_format(name, make_tokenizer(bos=False, chat=None))
    prompt, answer = example(tokenizer)
    whole = "".join(GOLDEN[name]).removeprefix("<bos>")
    assert tokenizer.apply_chat_template(prompt + answer, tokenize=False) == whole
    tokenizer.bos_token = None
    assert tokenizer.apply_chat_template(prompt + answer, tokenize=False) == whole


def test_without_a_system_prompt_and_over_several_turns() -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "A"), ("user", "R"))]
    texts = [
        with_format(name, make_tokenizer(chat=None)).apply_chat_template(turns, tokenize=False)
        for name in CHAT_TEMPLATES
    ]
    start, end, stop = "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"
    assert texts == [
        "<bos>[INST] Q [/INST] A<eos><bos>[INST] R [/INST]",
        f"<bos>{start}user{end}Q{stop}{start}assistant{end}A{stop}{start}user{end}R{stop}",
        "<bos><|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nR<|im_end|>\n",
    ]


@pytest.mark.parametrize(("name", "file"), [("llama3", "llama3.jinja"), ("chatml", "qwen2_5.jinja")])
def test_tokens_are_those_of_the_template_that_the_models_ship(name: str, file: str) -> None:
    """TRL has the templates of Meta-Llama-3-8B-Instruct and Qwen2.5-7B-Instruct; Qwen's tokenizer adds no BOS."""
    tokenizer = make_tokenizer(bos=name == "llama3", chat=None)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    theirs = (Path(trl.__file__).parent / "chat_templates" / file).read_text()
    with_format(name, tokenizer)
    prompt, answer = example(tokenizer)
    for messages, add_prompt in ((prompt, True), (prompt + answer, False)):
        ids = [
            tokenizer.apply_chat_template(messages, chat_template=text, add_generation_prompt=add_prompt)["input_ids"]
            for text in (None, theirs)
        ]
        assert ids[0] == ids[1]
    end = tokenizer.convert_ids_to_tokens(answer_ids(tokenizer, prompt, answer)[1][-2:])
    assert end[-1] == "<|eot_id|>" if name == "llama3" else end[0] == "<|im_end|>"


def test_llama2s_tokens_are_those_of_its_parts() -> None:
    """As a program gets them that tokenises the prompt, the answer and the end of the sequence one by one."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    characters = "".join(GOLDEN["llama2"]).replace(" ", "▁")
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys([*pieces, *characters, "▁S", "▁So"]))}
    tokenizer: Any = LlamaTokenizer(vocab=vocab, merges=[("▁", "S"), ("▁S", "o")], add_bos_token=True)
    prompt_ids, ids = answer_ids(with_format("llama2", tokenizer), *example(tokenizer))
    prompt, answer = (text.replace("<bos>", "<s>").removesuffix("<eos>").strip() for text in GOLDEN["llama2"])
    assert prompt_ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids == [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.convert_ids_to_tokens([prompt_ids[0], ids[0], ids[-1]]) == ["<s>", "▁So", "</s>"]


def test_auto_is_the_bases_own_and_none_is_plain_text() -> None:
    tokenizer = make_tokenizer()
    assert chat_template("auto", tokenizer) == CHAT_TEMPLATE
    assert chat_template("none", tokenizer) is None
    assert chat_template("auto", make_tokenizer(chat=None)) is None
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "prompteol": "x"}  # type: ignore[assignment]
    assert chat_template("auto", tokenizer) == CHAT_TEMPLATE


def test_a_file_is_read_and_checked(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    path = tmp_path / "format.jinja"
    path.write_text("\ufeff{% for m in messages %}{{ m['content'] }}|{% endfor %}", encoding="utf-8")
    assert chat_template(str(path), tokenizer) == "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    for content, message in {
        "{% for": "is not a Jinja template",
        "Hello": "gives the same text for two sentences",
        "{{ raise_exception('no') }}": "cannot be rendered for one sentence",
        "{% for i in range(10 ** 9) %}{{ messages }}{% endfor %}": "takes too much time or memory",
        "x" * (1 << 20) + "{{ messages }}": "characters. Expected at most",
    }.items():
        path.write_text(content)
        with pytest.raises(SempaError, match=message):
            chat_template(str(path), tokenizer)
    path.write_bytes(b"\xff\xfe{{ messages }}")
    with pytest.raises(SempaError, match="Expected a file in UTF-8"):
        chat_template(str(path), tokenizer)
    for name in (str(tmp_path), "llama4", str(tmp_path / "nowhere.jinja")):
        with pytest.raises(
            SempaError, match=r"Unknown chat format .*Expected auto, none, llama2, llama3, chatml, or a"
        ):
            chat_template(name, tokenizer)
