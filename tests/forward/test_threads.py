"""One model, many threads: no pass sees anything of another thread's pass, whatever the two are."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread, current_thread
from typing import Any

import pytest
import torch
from helpers.tiny import finish_adapter, make_gemma, make_llama, make_tokenizer, sample_sentences, save_base
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer

import sempa_st
from sempa_st.folder.copying import copy_model
from sempa_st.model.patching import edited
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.model.tokenizer import install_template, load_tokenizer, suffix_tokens

pytestmark = pytest.mark.names_dtype

SENTENCES = sample_sentences()[:12]
TEXTS = ["A rainy Sunday is", 'This sentence : "Snow" means in one word:"']
TOKENIZER = make_tokenizer()
INPUTS = [TOKENIZER(TEXTS[0], return_tensors="pt"), TOKENIZER(TEXTS, return_tensors="pt", padding=True)]
LAYERS = 3
MODELS = ["base", "gemma", "native", "sentence", "template", "custom", "mean:layer=2", "token-prepending:exit=2"]
Load = Callable[[str], SentenceTransformer]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Load a fresh model by its kind; ``sentence`` and ``template`` are activated, ``custom`` is the latter by ST."""
    root = tmp_path_factory.mktemp("threads")
    base = save_base(root / "base", make_llama(), make_tokenizer())
    tokenizer = load_tokenizer(base)
    install_template(tokenizer, EMBEDDING_TEMPLATES["prompteol"])
    native = finish_adapter(root / "native", base, make_llama())
    folders = {
        "gemma": save_base(root / "gemma", make_gemma(), make_tokenizer()),
        "native": native,
        "sentence": copy_model(str(native), root / "sentence", activate=True),
        "template": finish_adapter(
            root / "template", base, make_llama(), format="custom", invocation=suffix_tokens(tokenizer, "prompteol")
        ),
    }

    def load(kind: str) -> SentenceTransformer:
        if kind == "custom":
            return SentenceTransformer(str(folders["template"]), trust_remote_code=True, device="cpu")
        method = kind if kind not in MODELS[:5] else None
        return sempa_st.load(folders.get(kind, base), method=method, dtype="float32", device="cpu")

    return load


def generate(model: Any) -> torch.Tensor:
    """Return new tokens and the logits that chose them."""
    found = model[0].model.generate(
        **INPUTS[0], max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return torch.cat([found.sequences[0].double(), torch.cat(found.logits).flatten().double()])


@torch.no_grad()
def forward(model: Any) -> torch.Tensor:
    return model[0].model(**INPUTS[1]).logits


def encode(model: Any) -> torch.Tensor:
    return torch.as_tensor(model.encode(SENTENCES, batch_size=4))


def decoder_of(model: Any) -> Any:
    module = model[0]
    return module.decoder


@contextmanager
def stopped_inside(model: Any, layer: int, work: Callable[[], object]) -> Iterator[Thread]:
    """Run ``work`` in a thread of its own, stopped when it first comes to a layer, for the time of a block."""
    reached, go_on = Event(), Event()

    def wait(*args: Any) -> None:
        if current_thread() is thread:
            reached.set()
            assert go_on.wait(60)

    handle = decoder_of(model).layers[layer].mlp.register_forward_pre_hook(wait)
    thread = Thread(target=work)
    thread.start()
    try:
        assert reached.wait(60)
        yield thread
    finally:
        go_on.set()
        handle.remove()
        thread.join(60)


@pytest.mark.parametrize("kind", MODELS)
def test_a_pass_within_anothers_is_what_it_is_alone(load: Load, kind: str) -> None:
    """Wherever the other thread's pass stands; generation and plain passes bit for bit, vectors within 1e-5."""
    model = load(kind)
    alone = {work: work(model) for work in (encode, generate, forward)}
    for layer in range(LAYERS - 1 if ":" in kind else LAYERS):
        for outer in alone:
            found: list[torch.Tensor] = []
            with stopped_inside(model, layer, lambda outer=outer, found=found: found.append(outer(model))):
                inner = {work: work(model) for work in alone}
            check({**inner, outer: found[0]}, alone)
            check(inner, alone)
    check({work: work(model) for work in alone}, alone)


def check(found: dict[Any, torch.Tensor], expected: dict[Any, torch.Tensor]) -> None:
    for work, result in found.items():
        if work is encode:
            torch.testing.assert_close(result, expected[work], rtol=0, atol=1e-5)
        else:
            assert torch.equal(result, expected[work]), work.__name__


@pytest.mark.parametrize("kind", MODELS)
def test_many_threads_at_once(load: Load, kind: str) -> None:
    model = load(kind)
    alone = {work: work(model) for work in (encode, generate, forward)}
    faults: list[BaseException] = []

    def run(work: Callable[[Any], torch.Tensor]) -> None:
        try:
            for _ in range(4):
                check({work: work(model)}, alone)
        except BaseException as error:
            faults.append(error)

    def tokenize() -> None:
        for number in range(100):
            model.tokenizer(TEXTS, padding=number % 2 == 0, truncation=True, max_length=8 + number % 2)

    threads = [Thread(target=run, args=(work,)) for work in [*alone] * 3] + [Thread(target=tokenize)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not faults
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("kind", ["native", "sentence", "template", "custom"])
def test_an_exception_in_a_pass_leaves_nothing_behind(load: Load, kind: str) -> None:
    model = load(kind)
    alone = {work: work(model) for work in (encode, generate, forward)}

    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    for layer in decoder_of(model).layers:
        handle = layer.mlp.register_forward_pre_hook(fail)
        for work in alone:
            with pytest.raises(ZeroDivisionError):
                work(model)
        handle.remove()
        check({work: work(model) for work in alone}, alone)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.parametrize("kind", ["native", "sentence", "mean:layer=2"])
def test_a_fork_within_anothers_pass_does_not_hang(load: Load, kind: str) -> None:
    model = load(kind)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's own threads do not live on in a child process
    try:
        expected = encode(model)
        with stopped_inside(model, 1, lambda: encode(model)):
            child = os.fork()
            if not child:  # pytest must not go on in it
                try:
                    os._exit(0 if torch.allclose(encode(model), expected, rtol=0, atol=1e-5) else 3)
                finally:
                    os._exit(4)
            assert wait_for(child) == 0
    finally:
        torch.set_num_threads(threads)


def wait_for(child: int, seconds: float = 60) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child process hangs")


def test_a_wrapper_of_an_edited_module_can_be_edited_itself() -> None:
    """PEFT's wrapper of a saved module passes on what it is asked for to the module within."""
    model = make_llama()
    ids = torch.tensor([[1, 7, 30]])

    def zeroed() -> bool:
        with torch.no_grad(), edited(model.get_output_embeddings(), after=lambda output: output * 0):
            return not model(ids).logits.any()

    assert zeroed()
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert zeroed()
    assert tuned(ids).logits.any()
