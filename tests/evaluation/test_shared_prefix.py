from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tiny import make_gemma, make_llama, make_tokenizer
from lm_eval.models.huggingface import HFLM
from peft import get_peft_model

from sempa_st.errors import SempaError
from sempa_st.evaluation import shared_prefix
from sempa_st.evaluation.shared_prefix import SharedPrefixLM
from sempa_st.model.adapter import lora_config

INVOCATION = [301, 302]


def with_lora(model: Any, invocation: list[int] | None = None) -> Any:
    torch.manual_seed(3)
    tuned = get_peft_model(model, lora_config(model, invocation=invocation))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return tuned.eval()


def some_requests() -> list[Any]:
    """Nested prefixes, none at all, several answers to one prompt, single tokens, and a long text."""
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, 300) for _ in range(count)]

    start = tokens(60)
    prompts = [start + tokens(draw.randrange(5, 40)) for _ in range(9)]
    pairs = [(prompt, tokens(draw.choice([1, 1, 3, 6]))) for prompt in prompts for _ in range(3)]
    pairs += [(tokens(draw.randrange(1, 50)), tokens(draw.randrange(1, 9))) for _ in range(6)]
    pairs += [(prompts[0], [token]) for token in (5, 6, 7)]
    pairs += [(start[:10], start[10:]), ([1], tokens(300)), (tokens(520), tokens(4))]
    return [(None, *pair) for pair in pairs]


def arguments(model: Any) -> dict[str, Any]:
    return {"pretrained": model, "tokenizer": make_tokenizer(), "backend": "causal", "batch_size": 4}


@pytest.mark.parametrize("worth", [1, 64, 10**9])
@pytest.mark.parametrize("logits", [1 << 27, 600 * 16])
@pytest.mark.parametrize("make", [make_llama, make_gemma, lambda: with_lora(make_gemma())])
def test_log_likelihoods_equal_the_harness(
    make: Callable[[], Any], worth: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prefix, "_WORTH_ON_CPU", worth)
    monkeypatch.setattr(shared_prefix, "_LOGITS", logits)
    model, requests = make(), some_requests()
    expected = HFLM(**arguments(model))._loglikelihood_tokens(requests, disable_tqdm=True)
    fast = SharedPrefixLM(**arguments(model))
    read = []
    model.register_forward_pre_hook(lambda _, __, named: read.append(named["input_ids"].numel()), with_kwargs=True)
    found = fast._loglikelihood_tokens(requests, disable_tqdm=True)
    # The harness adds up in float32, which rounds the sum of a long text by more than 1e-4.
    assert [answer[0] for answer in found] == pytest.approx([answer[0] for answer in expected], abs=1e-4, rel=1e-7)
    assert [answer[1] for answer in found] == [answer[1] for answer in expected]
    assert fast.cut == 1
    if worth < 100:
        assert sum(read) < 0.6 * sum(len(context) + len(answer) for _, context, answer in requests)


def test_greedy_answers_are_found() -> None:
    model = make_llama()
    with torch.no_grad():
        likeliest = int(model(torch.tensor([[1, 9, 30]])).logits[0, -1].argmax())
    requests: Any = [(None, [1, 9, 30], [token]) for token in (likeliest, (likeliest + 1) % 600)]
    found = SharedPrefixLM(**arguments(model))._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


def test_an_activated_adapter_sees_its_tokens_in_one_piece() -> None:
    model = with_lora(make_llama(), INVOCATION)
    plain = some_requests()
    middle = [(None, context[:12] + INVOCATION + context[12:], answer) for _, context, answer in plain[:12]]
    requests = [*plain, *middle]
    expected = HFLM(**arguments(model))._loglikelihood_tokens(requests, disable_tqdm=True)
    found = SharedPrefixLM(**arguments(model))._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [answer[0] for answer in found] == pytest.approx([answer[0] for answer in expected], abs=1e-4, rel=1e-7)
    with model.disable_adapter():
        base = SharedPrefixLM(**arguments(model))._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [answer[0] for answer in found[:-12]] == pytest.approx([answer[0] for answer in base[:-12]])
    assert all(abs(one[0] - other[0]) > 1e-3 for one, other in zip(found[-12:], base[-12:], strict=True))


def test_an_answer_that_is_too_long_is_refused() -> None:
    with pytest.raises(SempaError, match="An answer of 513 tokens cannot be scored: the model takes 512"):
        SharedPrefixLM(**arguments(make_llama()))._loglikelihood_tokens([(None, [1], [5] * 513)], disable_tqdm=True)


@pytest.mark.parametrize("shared", [True, False])
def test_a_log_likelihood_that_is_no_number_is_told(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness would take the first answer for the best, which is the true one of TruthfulQA."""
    model = make_llama()
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    if not shared:
        monkeypatch.setattr(shared_prefix, "can_cache", lambda *_: False)
    with pytest.raises(SempaError, match=r"2 of 2 log-likelihoods are infinite or NaN: of 'Is it\? yes'"):
        requests: Any = [(("Is it?", " yes"), [5, 6], [7]), (("Is it?", " no"), [5, 6], [8])]
        SharedPrefixLM(**arguments(model))._loglikelihood_tokens(requests)
