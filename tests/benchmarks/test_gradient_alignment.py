"""The program that compares the objectives' first steps, on a tiny base."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.rows import write_rows
from helpers.tiny import make_config

from benchmarks import gradient_alignment
from benchmarks.gradient_alignment import Start, answer_losses, compare, contrastive_loss
from sempa_st.data.nli import load_nli
from sempa_st.training.collator import AnswerInputs
from sempa_st.training.forward import answer_log_probabilities
from sempa_st.training.inputs import load_inputs
from sempa_st.training.tuned import tuned_model

pytestmark = pytest.mark.names_dtype


@pytest.fixture
def start(tiny_base: Path, tmp_path: Path) -> Start:
    inputs = load_inputs(make_config(tiny_base, tmp_path / "model", objective="contrastive"), "cpu")
    torch.manual_seed(0)
    model = tuned_model(inputs).train()
    return Start(model, inputs.scorer.module(model), inputs.tokenizer)


def test_on_the_same_triplets_infonce_points_where_it_points(start: Start) -> None:
    triplets = load_nli("sample").triplets[:8]
    before = [parameter.clone() for parameter in start.parameters]
    found = compare(start, triplets, triplets, step=1e-3)
    own = found["rows"]["contrastive"]
    assert own["cosine"] == pytest.approx(1, abs=1e-5) and own["adam"] == pytest.approx(1, abs=1e-5)
    assert own["loss"] < found["loss"]
    for name, row in found["rows"].items():
        assert abs(row["cosine"]) <= 1 + 1e-5, name
        # To first order the loss falls by the step times what Adam's sign brings.
        assert row["adam"] <= 1 + 1e-5, name
    assert all(torch.allclose(one, other) for one, other in zip(before, start.parameters, strict=True))


def test_the_losses_of_answers_are_the_mean_log_ratio(start: Start) -> None:
    triplets = load_nli("sample").triplets[:20]  # more than one chunk
    paraphrase, chat_format = gradient_alignment.PROMPTS["dpo"]
    forms = gradient_alignment.FORMS
    with torch.no_grad():
        losses = {
            name: float(sum(answer_losses(start, triplets, paraphrase, chat_format, weigh)))
            for name, weigh in forms.items()
        }
        examples = [(prompt, answers) for prompt, answers in gradient_alignment.ranked_answers(
            triplets, start.tokenizer, paraphrase=paraphrase
        )]  # fmt: skip
        batch = AnswerInputs(start.tokenizer, examples, 2, 1024)(range(20))
        logps = answer_log_probabilities(start.module.causal_lm, batch).view(20, 2)
        lengths = batch["answer_mask"].sum(1).view(20, 2)
    assert losses[""] == pytest.approx(float((logps[:, 1] - logps[:, 0]).mean()), rel=1e-4)
    per_token = (logps / lengths)[:, 1] - (logps / lengths)[:, 0]
    assert losses[", per token"] == pytest.approx(float(per_token.mean()), rel=1e-3, abs=1e-5)
    assert losses[", entailed alone"] == pytest.approx(float(-logps[:, 0].mean()), rel=1e-4)
    assert losses[", differing tokens"] not in (losses[""], 0.0)


def test_the_program_writes_its_figures(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nli").mkdir()
    rows = [{"sent0": t.premise, "sent1": t.entailed, "hard_neg": t.contradicted} for t in load_nli("sample").triplets]
    write_rows(tmp_path / "nli" / "triplets.parquet", rows)
    output = tmp_path / "found.json"
    words = f"x --base {tiny_base} --data-dir {tmp_path} --triplets 4 --output {output}"
    monkeypatch.setattr(sys, "argv", words.split())
    gradient_alignment.main()
    found = json.loads(output.read_text())
    assert len(found["rows"]) == 2 + 3 * len(gradient_alignment.FORMS)
    assert found["loss"] == pytest.approx(float(found["loss"])) and found["triplets"] == 4


def test_a_step_along_infonces_own_gradient_lowers_it_as_the_gradient_says(start: Start) -> None:
    triplets = load_nli("sample").triplets[:8]
    gradients = start.gradients(iter([contrastive_loss(start, triplets)]))
    with torch.no_grad():
        before = float(contrastive_loss(start, triplets))
        for parameter, gradient in zip(start.parameters, gradients, strict=True):
            parameter -= 1e-5 * gradient
        after = float(contrastive_loss(start, triplets))
    expected = 1e-5 * sum(float((gradient**2).sum()) for gradient in gradients)
    assert before - after == pytest.approx(expected, rel=0.1)
