from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.families import make_causal_lm
from helpers.tiny import CHAT_TEMPLATE, add_random_adapter, make_gemma, make_llama, make_tokenizer, randomise
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from sempa_st.data.nli import Triplet, load_nli
from sempa_st.data.preferences import DEFAULT_PARAPHRASE, preference_rows, ranked_answers
from sempa_st.model.adapter import lora_config
from sempa_st.training.batches import AnswerInputs
from sempa_st.training.forward import answer_log_probabilities, full_logits, shared_states, word_logits
from sempa_st.training.losses import (
    ranked_answers_loss,
)

pytestmark = [pytest.mark.names_dtype, pytest.mark.usefixtures("prefix_pass")]

TRIPLETS = load_nli("sample").triplets[:8]


@pytest.fixture(scope="module", params=["chat", "text"])
def trls(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[DPOTrainer, Any]:
    """TRL's trainer with a random adapter on a tiny Llama that chats, and on a tiny Gemma that does not."""
    model = make_llama() if request.param == "chat" else make_gemma()
    tokenizer = make_tokenizer(chat=CHAT_TEMPLATE if request.param == "chat" else None)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            per_device_train_batch_size=len(TRIPLETS),
            use_cpu=True,
            bf16=False,
            report_to="none",
            beta=0.1,
        ),
        train_dataset=Dataset.from_list(preference_rows(TRIPLETS, tokenizer, paraphrase=DEFAULT_PARAPHRASE)),
        processing_class=tokenizer,
        peft_config=lora_config(model),
    )
    randomise(trainer.model)
    # In float64, so that the formula is compared: a sum of twenty float32 log-probabilities rounds by more than 1e-6.
    trainer.model.double().eval()
    return trainer, tokenizer


def answers_of(
    tokenizer: Any, triplets: Sequence[Triplet], num_answers: int, max_length: int = 1024
) -> dict[str, Tensor]:
    examples = ranked_answers(triplets, tokenizer, paraphrase=DEFAULT_PARAPHRASE)
    return AnswerInputs(tokenizer, examples, num_answers, max_length)(range(len(triplets)))


def test_answers_are_tokenised_as_trl_does(trls: tuple[DPOTrainer, Any]) -> None:
    trainer, tokenizer = trls
    batch = answers_of(tokenizer, TRIPLETS, 2)
    rows = [
        ids[mask.bool()] for ids, mask in zip(batch["answer_input_ids"], batch["answer_attention_mask"], strict=True)
    ]
    starts = batch["answer_mask"].int().argmax(dim=1).tolist()
    split = [(ids[:start].tolist(), ids[start:].tolist()) for ids, start in zip(rows, starts, strict=True)]
    for index, (chosen, rejected) in enumerate(zip(split[::2], split[1::2], strict=True)):
        expected = trainer.train_dataset[index]
        assert chosen == (expected["prompt_ids"], expected["chosen_ids"])
        assert rejected == (expected["prompt_ids"], expected["rejected_ids"])


@pytest.mark.parametrize("cut", [0, 6])
def test_two_answers_give_trls_dpo_loss(
    trls: tuple[DPOTrainer, Any], monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    trainer, tokenizer = trls
    longest = answers_of(tokenizer, TRIPLETS, 2)["answer_input_ids"].shape[1]
    monkeypatch.setattr(trainer.data_collator, "max_length", longest - cut)
    batch = answers_of(tokenizer, TRIPLETS, 2, longest - cut)
    causal_lm = trainer.model.get_base_model()
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        policy = answer_log_probabilities(causal_lm, batch).view(-1, 2)
        with trainer.model.disable_adapter():
            reference = answer_log_probabilities(causal_lm, batch).view(-1, 2)
    outcome = ranked_answers_loss(policy, reference, batch["answer_counts"], beta=0.1)
    assert abs(float(expected) - math.log(2)) > 1e-3  # the adapter says something
    assert float(outcome.loss) == pytest.approx(float(expected), abs=1e-6)
    chosen, rejected = (policy - reference).unbind(1)
    torch.testing.assert_close(outcome.margins, 0.1 * (chosen - rejected), rtol=0, atol=1e-5)


def test_log_probabilities_of_answers_token_by_token() -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    batch = answers_of(tokenizer, TRIPLETS[:3], 2)
    with torch.no_grad():
        actual = answer_log_probabilities(model, batch)
        for row, ids in enumerate(batch["answer_input_ids"]):
            length = int(batch["answer_attention_mask"][row].sum())
            logits = model(ids[None, :length]).logits[0].log_softmax(-1)
            places = [place for place in range(length) if batch["answer_mask"][row, place]]
            total = sum(float(logits[place - 1, ids[place]]) for place in places)
            assert float(actual[row]) == pytest.approx(total, abs=1e-3)
            assert places[-1] == length - 1


@pytest.mark.parametrize("cut", [0, 20])
def test_a_request_run_once_has_the_gradients_of_one_run_per_answer(cut: int) -> None:
    """Layers that are run again for their gradients keep no cache, so with them every answer runs its own request."""
    tokenizer = make_tokenizer()
    model: Any = add_random_adapter(make_llama())
    causal_lm = model.get_base_model()
    batch = answers_of(tokenizer, [replace(triplet, neutral="A short one.") for triplet in TRIPLETS], 3)
    if cut:
        batch = answers_of(tokenizer, TRIPLETS, 3, batch["answer_input_ids"].shape[1] - cut)
    found = []
    for again in (False, True):
        if again:
            causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        log_probabilities = answer_log_probabilities(causal_lm, batch)
        (log_probabilities / 100).square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        found.append((log_probabilities.detach(), gradients))
    (shared, shared_gradients), (whole, gradients) = found
    torch.testing.assert_close(shared, whole, rtol=1e-6, atol=1e-5)
    assert all("lora_" in name for name in gradients)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients.values())
    torch.testing.assert_close(shared_gradients, gradients, rtol=1e-3, atol=1e-5)


def test_shared_states_of_sequences_without_a_shared_prefix() -> None:
    decoder = make_llama().base_model
    ids = torch.tensor([[5, 6, 7], [5, 6, 8], [9, 6, 7], [4, 6, 7]])
    with torch.no_grad():
        expected = decoder(input_ids=ids).last_hidden_state
        for rows in ([0, 1], [2, 3], [0, 1, 2, 3]):
            found = shared_states(decoder, ids[rows], torch.ones_like(ids[rows]))
            torch.testing.assert_close(found, expected[rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "bias", "soft cap"])
def test_logits_of_some_words_are_the_models(kind: str) -> None:
    model = make_gemma() if kind == "soft cap" else make_llama()
    if kind == "soft cap":
        model.config.final_logit_softcapping = 3.0
    if kind == "bias":
        model.lm_head.bias = torch.nn.Parameter(2 * torch.randn(600, generator=torch.Generator().manual_seed(0)))
    ids, words = torch.tensor([[1, 7, 30], [1, 99, 4]]), torch.tensor([5, 17, 400])
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        states = model.model(ids).last_hidden_state[:, -1]
        torch.testing.assert_close(word_logits(model, states, words), expected[:, words], rtol=0, atol=1e-5)
    assert kind != "soft cap" or expected.abs().max() < 3


SCALED = {
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "falcon_h1": {"lm_head_multiplier": 0.5},
    "gemma2": {"final_logit_softcapping": 3.0},
}


@pytest.mark.parametrize("family", SCALED)
def test_logits_are_scaled_as_the_model_does(family: str) -> None:
    """A log ratio of unscaled logits is another model's."""
    model = make_causal_lm(family, **SCALED[family])
    ids, words = torch.tensor([[1, 7, 30], [1, 99, 4]]), torch.tensor([5, 17, 400])
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1].float()
        states = model.base_model(ids, use_cache=False).last_hidden_state[:, -1]
        torch.testing.assert_close(full_logits(model, states), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(word_logits(model, states, words), expected[:, words], rtol=1e-5, atol=1e-5)
