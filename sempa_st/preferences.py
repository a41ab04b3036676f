"""From NLI triplets to preference data (PAPER section "Preference data")."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sempa_st.errors import SempaError
from sempa_st.nli import Triplet
from sempa_st.prompts import SYSTEM_PROMPT, paraphrase_prompt

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
        paraphrase: Name of a paraphrase template of :mod:`sempa_st.prompts`.

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


def own_chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the base's own chat template (not one that this package added), or None."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return template.get("default")
    return template


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
