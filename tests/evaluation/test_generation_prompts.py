"""The prompt of each of the paper's tasks, as the model gets it, against a golden text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.generation_data import write_drop_data, write_generation_data
from helpers.tiny import make_llama, make_tokenizer, save_base

import sempa_st
from sempa_st.evaluation.generation import MEASURES, GenerationEvaluator, load_tasks
from sempa_st.evaluation.shared_prefix import SharedPrefixLM

GOLDEN = Path(__file__).parent.parent / "fixtures" / "prompts"
Rendered = Callable[..., str]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drop_data(write_generation_data(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny Llama with a chat template, like an Instruct base, and room for the examples."""
    base = make_llama()
    base.config.max_position_embeddings = 4096
    folder = save_base(tmp_path_factory.mktemp("bases") / "tiny-instruct", base, make_tokenizer())
    return sempa_st.load(folder, dtype="float32", device="cpu")


@pytest.fixture
def rendered(model: Any, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Rendered:
    """Return the prompt of a task's first document, decoded from the tokens, and what may follow or ends the answer."""

    def prompt_of(task: str, *, chat: bool = False) -> str:
        prompts: list[list[int]] = []
        after: list[str] = []

        def score(self: Any, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            for _, context, continuation in requests:
                prompts.append(context)
                after.append(self.tok_decode(continuation))
            return [(0.0, False)] * len(requests)

        def generate(self: Any, context: torch.Tensor, stop: list[str], **_: Any) -> torch.Tensor:
            prompts.extend(context.tolist())
            after.extend(stop)
            return context

        monkeypatch.setattr(SharedPrefixLM, "_loglikelihood_tokens", score)
        monkeypatch.setattr(SharedPrefixLM, "_model_generate", generate)
        evaluator = GenerationEvaluator(model[0], chat=chat)
        evaluator.score(load_tasks([task], data_dir=str(data_dir), limits={task: 1})[0])
        assert all(prompt == prompts[0] for prompt in prompts)
        assert evaluator.lm.cut == 0
        text: str = model.tokenizer.decode(prompts[0])
        return f"{text}\n=== {json.dumps(after)}\n"

    return prompt_of


@pytest.mark.parametrize("task", ["gsm8k", "mmlu", "hellaswag", "drop", "truthfulqa_mc1"])
def test_the_prompt_is_the_golden_one(rendered: Rendered, task: str) -> None:
    assert rendered(task) == (GOLDEN / f"{task}.txt").read_text(encoding="utf-8")


def test_the_chat_template_is_used_on_request_only(rendered: Rendered) -> None:
    plain, chat = (rendered("drop", chat=chat) for chat in (False, True))
    assert "[user]" not in plain
    assert chat.count("[user] Passage: ") == chat.count("[assistant] ") == 4
    assert "[assistant] 23.5\n" in chat


def test_the_harness_still_asks_drop_wrong(rendered: Rendered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once this fails, the changes to its task may no longer be needed."""
    monkeypatch.setitem(MEASURES, "drop", replace(MEASURES["drop"], changes={}))
    prompt, _, ends = rendered("drop").rpartition("\n=== ")
    assert prompt.count("?number,date,spans,worker_id,hit_id\n") == 3
    assert json.loads(ends) == [".", "<eos>"]
