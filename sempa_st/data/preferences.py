"""From NLI triplets to preference data (PAPER section "Preference data")."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sempa_st.data.nli import Triplet
from sempa_st.errors import SempaError
from sempa_st.model.templates import look_up_name
from sempa_st.model.tokenizer import own_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Preference = dict[str, Any]
"""A row of TRL's preference format: ``prompt``, ``chosen``, ``rejected``, as text or as chat messages."""


def preference_rows(
    triplets: Iterable[Triplet], tokenizer: PreTrainedTokenizerBase, *, paraphrase: str
) -> list[Preference]:
    """Turn each triplet into a paraphrase request with the entailed sentence chosen, the contradicted one rejected.

    The base's own chat template is used when it has one (with the system prompt, unless the template refuses system
    messages); otherwise the prompt is plain text that ends in a newline, a token boundary in every tokenizer.

    Args:
        triplets: NLI triplets.
        tokenizer: The base's tokenizer.
        paraphrase: Name of a paraphrase template of :mod:`sempa_st.model.templates`.

    Raises:
        SempaError: If there is no paraphrase template of that name.
    """
    rows = ranked_answers(triplets, tokenizer, paraphrase=paraphrase)
    return [{"prompt": prompt, "chosen": answers[0], "rejected": answers[-1]} for prompt, answers in rows]


def ranked_answers(
    triplets: Iterable[Triplet], tokenizer: PreTrainedTokenizerBase, *, paraphrase: str
) -> list[tuple[Any, list[Any]]]:
    """Turn each triplet into a paraphrase request and its answers, best first: entailed, neutral if any, contradicted.

    The arguments and the form of request and answers are those of :func:`preference_rows`.
    """
    chat = own_chat_template(tokenizer) is not None
    system = _system_messages(tokenizer) if chat else []
    rows: list[tuple[Any, list[Any]]] = []
    for triplet in triplets:
        prompt: Any = paraphrase_prompt(paraphrase, triplet.premise) + ("" if chat else "\n")
        answers: list[Any] = [triplet.entailed, *filter(None, [triplet.neutral]), triplet.contradicted]
        if chat:
            prompt = [*system, {"role": "user", "content": prompt}]
            answers = [[{"role": "assistant", "content": answer}] for answer in answers]
        rows.append((prompt, answers))
    return rows


def _system_messages(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Return the system message, or none where the chat template refuses one."""
    refused: Exception | None = None
    for system in ([{"role": "system", "content": SYSTEM_PROMPT}], []):
        try:
            tokenizer.apply_chat_template([*system, {"role": "user", "content": "?"}], tokenize=False)
            return system
        except Exception as error:  # a template is a program, and may raise anything
            refused = error
    raise SempaError(
        f"The base's own chat template cannot be rendered ({type(refused).__name__}: {refused}). Mend it, or remove it "
        "from the base's tokenizer."
    ) from refused


SYSTEM_PROMPT = "You are a helpful assistant"
"""System prompt of the preference data (PAPER section "Training")."""
PARAPHRASE_TEMPLATES: dict[str, str] = {
    "keep": 'Keep the same meaning of this sentence: "{sentence}", while making some changes.',
    "keep-syntax": 'Keep the meaning of this sentence: "{sentence}", but vary its syntax.',
    "generate": 'Generate a paraphrase of this sentence: "{sentence}".',
    "generate-syntax": 'Generate a paraphrase of this sentence: "{sentence}", with a different syntactic structure.',
    "rewrite": 'Rewrite the sentence "{sentence}" so that its syntax changes and its meaning does not.',
}
"""Instructions whose preferred answer is the entailed sentence. ``keep`` is the paper's own wording; the paper names
the families of the other four (generate, keep, rewrite, with a constraint on syntax) and these are our wordings."""
DEFAULT_PARAPHRASE = "keep"


def paraphrase_prompt(name: str, sentence: str) -> str:
    """Fill the paraphrase template called ``name`` with ``sentence``; raises :class:`SempaError` if unknown."""
    return look_up_name(PARAPHRASE_TEMPLATES, name, "paraphrase template").replace("{sentence}", sentence)
