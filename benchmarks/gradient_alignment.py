"""Measure how far the first step of each objective points where the embedding has to go.

    python -m benchmarks.gradient_alignment --data-dir DIR --output benchmarks/results/gradient-alignment.json

At the start of training, policy and reference are the same. The gradient of each objective with respect to a new
adapter, on one half of the triplets, is compared with that of InfoNCE on the other half:

- ``cosine``: of the two gradients,
- ``adam``: the decrease of InfoNCE that a first step of Adam (the sign of the gradient) brings, to first order, as a
  share of what the sign of InfoNCE's own gradient on that half would bring,
- ``loss``: InfoNCE on that half after one such step of size ``--step``.

At this point the sigmoid loss of DPO and the square of IPO have the same direction: the gradient of
log pi(y-|x) - log pi(y+|x). SimPO's is that of ``per token``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sempa_st.data.nli import Triplet
from sempa_st.data.preferences import DEFAULT_PARAPHRASE, ranked_answers
from sempa_st.model.chat_formats import chat_template
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.templates import DEFAULT_TEMPLATE, EMBEDDING_TEMPLATES
from sempa_st.training.batches import AnswerInputs, EmbeddingInputs
from sempa_st.training.config import TrainConfig
from sempa_st.training.forward import answer_token_logps, last_states, word_logits
from sempa_st.training.inputs import load_inputs
from sempa_st.training.losses import in_batch_loss, similarity_score, word_score
from sempa_st.training.tuned import tuned_model
from sempa_st.training.word_bags import WordBags
from sempa_st.utils.files import write_json
from sempa_st.utils.run_info import run_info
from sempa_st.utils.tables import table

_TEMPERATURE = 0.05
_CHUNK = 16
"""Triplets of a forward pass over answers."""
_TEMPLATE = EMBEDDING_TEMPLATES[DEFAULT_TEMPLATE]
_EMBEDDING_PROMPT = _TEMPLATE.prefix + "{sentence}" + _TEMPLATE.suffix
Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]
FORMS: dict[str, Weigh] = {
    "": lambda logps, answers, differ: logps,
    ", per token": lambda logps, answers, differ: logps / answers.bincount()[answers],
    ", differing tokens": lambda logps, answers, differ: logps * differ,
    ", entailed alone": lambda logps, answers, differ: logps * (answers % 2 == 0),
}
"""Weighed log-probabilities of answer tokens, from these, the number of each one's answer, and whether the other answer
lacks it. Even answers are entailed."""
PROMPTS = {
    "dpo": (DEFAULT_PARAPHRASE, "none"),
    "dpo, chat format": (DEFAULT_PARAPHRASE, "chatml"),
    "dpo, embedding prompt": (_EMBEDDING_PROMPT, "none"),
}
"""Paraphrase template and chat format, by name."""


def main() -> None:
    """Compare the objectives, write the figures and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="gemma3-270m")
    parser.add_argument("--data-dir", required=True, help="folder with nli/triplets.parquet")
    parser.add_argument("--triplets", type=int, default=64, help="triplets of each half")
    parser.add_argument("--step", type=float, default=1e-3, help="size of the step after which the loss is taken")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", required=True, help="JSON file to write")
    args = parser.parse_args()
    config = TrainConfig(
        base=args.base, data=f"{args.data_dir}/nli/triplets.parquet", dev="sample", dtype="float32", device="cpu",
        output=args.output + ".unused", objective="contrastive", max_triplets=2 * args.triplets, seed=args.seed,
    )  # fmt: skip
    inputs = load_inputs(config, "cpu")
    torch.manual_seed(args.seed)
    model = tuned_model(inputs).train()
    start = Start(model, inputs.scorer.module(model), inputs.tokenizer)
    found = compare(start, inputs.data.triplets[: args.triplets], inputs.data.triplets[args.triplets :], args.step)
    settings = {name: getattr(args, name) for name in ("base", "triplets", "step", "seed")}
    write_json(args.output, {**run_info(), **settings, **found})
    print(f"InfoNCE at the start: {found['loss']:.4f}")
    print(
        table(["objective", "cosine", "adam", "loss"], [[name, *row.values()] for name, row in found["rows"].items()])
    )


@dataclass(frozen=True)
class Start:
    """A base with a new adapter, its embedding module, and the tokenizer of text without the embedding template."""

    model: Any
    module: PromptEOL
    tokenizer: Any

    @property
    def parameters(self) -> list[Tensor]:
        """The adapter's weights."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def gradients(self, losses: Iterator[Tensor]) -> list[Tensor]:
        """Return the gradients of a sum of losses, which are computed one at a time."""
        self.model.zero_grad()
        for loss in losses:
            loss.backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]


def compare(start: Start, first: Sequence[Triplet], second: Sequence[Triplet], step: float) -> dict[str, Any]:
    """Return InfoNCE on the second half at the start, and the figures of each objective on the first half."""
    loss = contrastive_loss(start, second)
    target = start.gradients(iter([loss]))
    found: dict[str, Any] = {"loss": float(loss.detach()), "rows": {}}
    best = sum(float(gradient.abs().sum()) for gradient in target)
    for name, gradients in all_gradients(start, first):
        signs = [gradient.sign() for gradient in gradients]
        lengths = (_dot(gradients, gradients) * _dot(target, target)) ** 0.5
        with torch.no_grad():
            _add(start.parameters, signs, -step)
            after = float(contrastive_loss(start, second))
            _add(start.parameters, signs, step)
        found["rows"][name] = {"cosine": _dot(gradients, target) / lengths, "adam": _dot(signs, target) / best}
        found["rows"][name]["loss"] = after
        print(name, found["rows"][name], flush=True)
    return found


def all_gradients(start: Start, triplets: Sequence[Triplet]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield the name and the gradients of each objective."""
    yield "contrastive", start.gradients(iter([contrastive_loss(start, triplets)]))
    yield "one-word-listwise", start.gradients(iter([word_loss(start, triplets)]))
    for prompt, (paraphrase, chat_format) in PROMPTS.items():
        for form, weigh in FORMS.items():
            yield prompt + form, start.gradients(answer_losses(start, triplets, paraphrase, chat_format, weigh))


def contrastive_loss(start: Start, triplets: Sequence[Triplet]) -> Tensor:
    """Return the loss of ``contrastive`` on one batch."""
    roles = ("premise", "entailed", "contradicted")
    batch = EmbeddingInputs(start.module, roles, roles[1:], None)(triplets)
    states = last_states(start.module, batch["input_ids"], batch["attention_mask"]).states
    scores = similarity_score(states[: len(triplets)], states[len(triplets) :], _TEMPERATURE)
    return in_batch_loss(scores, batch["same_premise"], batch["has_neutral"], neutral="none").loss


def word_loss(start: Start, triplets: Sequence[Triplet]) -> Tensor:
    """Return the loss of ``one-word-listwise`` on one batch."""
    bagger = WordBags(start.tokenizer)
    batch = EmbeddingInputs(start.module, ("premise",), ("entailed", "contradicted"), bagger)(triplets)
    states = last_states(start.module, batch["input_ids"], batch["attention_mask"]).states
    logits = word_logits(start.module.causal_lm, states, batch["words"])
    scores = word_score(logits, logits.detach(), batch["bags"], beta=1.0)
    return in_batch_loss(scores, batch["same_premise"], batch["has_neutral"], neutral="none").loss


def answer_losses(
    start: Start, triplets: Sequence[Triplet], paraphrase: str, chat_format: str, weigh: Weigh
) -> Iterator[Tensor]:
    """Yield parts of the mean of log pi(y-|x) - log pi(y+|x), with each token's log-probability weighed."""
    start.tokenizer.chat_template = chat_template(chat_format, start.tokenizer)
    answers = AnswerInputs(start.tokenizer, ranked_answers(triplets, start.tokenizer, paraphrase=paraphrase), 2, 1024)
    for first in range(0, len(triplets), _CHUNK):
        batch = answers(range(first, min(first + _CHUNK, len(triplets))))
        logps, numbers = answer_token_logps(start.module.causal_lm, batch)
        tokens = [row[mask].tolist() for row, mask in zip(batch["answer_input_ids"], batch["answer_mask"], strict=True)]
        differ = [token not in tokens[number ^ 1] for number, own in enumerate(tokens) for token in own]
        weighed = weigh(logps, numbers, torch.tensor(differ))
        yield (weighed * torch.where(numbers % 2 == 0, -1.0, 1.0)).sum() / len(triplets)


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return sum(float((one * other).sum()) for one, other in zip(first, second, strict=True))


def _add(parameters: Sequence[Tensor], changes: Sequence[Tensor], scale: float) -> None:
    for parameter, change in zip(parameters, changes, strict=True):
        parameter += scale * change


if __name__ == "__main__":
    main()
