"""Turn NLI triplets into preference data (arXiv 2601.05075, section "Preference data")."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sempa_st.data.nli import Triplet
from sempa_st.errors import SempaError
from sempa_st.model.tokenizer import own_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Preference = dict[str, Any]
"""An example in TRL's preference format: ``prompt``, ``chosen``, ``rejected``, as text or as chat messages."""


def preference_rows(
    triplets: Iterable[Triplet], tokenizer: PreTrainedTokenizerBase, *, paraphrase: str
) -> list[Preference]:
    """Turn each triplet into a paraphrase prompt with the entailed sentence chosen and the contradicted one rejected.

    If the tokenizer has a chat template, prompt and answers are chat messages, with the system prompt unless the
    template rejects system messages. Otherwise they are plain text, and the prompt ends in a newline, a token boundary
    in every tokenizer.

    Args:
        triplets: NLI triplets.
        tokenizer: The base model's tokenizer, with the chat template of the run's chat format.
        paraphrase: Key of :data:`PARAPHRASE_TEMPLATES`, or a template; see :func:`paraphrase_template`.

    Raises:
        SempaError: If there is no such paraphrase template, or the chat template cannot be rendered.
    """
    rows = ranked_answers(triplets, tokenizer, paraphrase=paraphrase)
    return [{"prompt": prompt, "chosen": answers[0], "rejected": answers[-1]} for prompt, answers in rows]


def ranked_answers(
    triplets: Iterable[Triplet], tokenizer: PreTrainedTokenizerBase, *, paraphrase: str
) -> list[tuple[Any, list[Any]]]:
    """Turn each triplet into a paraphrase prompt and its answers, best first: entailed, neutral if any, contradicted.

    See :func:`preference_rows` for the arguments and for the form of prompt and answers.
    """
    chat = own_chat_template(tokenizer) is not None
    system = _system_messages(tokenizer) if chat else []
    template = paraphrase_template(paraphrase)
    rows: list[tuple[Any, list[Any]]] = []
    for triplet in triplets:
        prompt: Any = template.replace(PLACEHOLDER, triplet.premise) + ("" if chat else "\n")
        answers: list[Any] = [triplet.entailed, *filter(None, [triplet.neutral]), triplet.contradicted]
        if chat:
            prompt = [*system, {"role": "user", "content": prompt}]
            answers = [[{"role": "assistant", "content": answer}] for answer in answers]
        rows.append((prompt, answers))
    return rows


def _system_messages(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Return the system message, or an empty list if the chat template rejects one."""
    question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}
    cause: Exception | None = None
    for system in ([{"role": "system", "content": SYSTEM_PROMPT}], []):
        try:
            text = tokenizer.apply_chat_template([*system, question, answer], tokenize=False)
        except Exception as error:  # a template is a program and may raise anything
            cause = error
            continue
        if _ANSWER not in str(text):
            raise SempaError("The chat template leaves out the answers. Fix it, or choose another --chat-format.")
        return system
    raise SempaError(
        f"The chat template cannot be rendered ({type(cause).__name__}: {cause}). Fix it, or choose another "
        "--chat-format."
    ) from cause


_ANSWER = "An animal is asleep."
SYSTEM_PROMPT = "You are a helpful assistant"
"""System prompt of the preference data (arXiv 2601.05075, section "Training")."""
PARAPHRASE_TEMPLATES: dict[str, str] = {
    "keep": 'Keep the same meaning of this sentence: "{sentence}", while making some changes.',
    "keep-syntax": 'Keep the meaning of this sentence: "{sentence}", but vary its syntax.',
    "generate": 'Generate a paraphrase of this sentence: "{sentence}".',
    "generate-syntax": 'Generate a paraphrase of this sentence: "{sentence}", with a different syntactic structure.',
    "rewrite": 'Rewrite the sentence "{sentence}" so that its syntax changes and its meaning does not.',
}
"""Instructions whose preferred answer is the entailed sentence. ``keep`` is the paper's wording. The other four belong
to families that the paper names (generate, keep, rewrite, with a constraint on syntax); their wording is ours."""
DEFAULT_PARAPHRASE = "keep"


PLACEHOLDER = "{sentence}"
"""Where the premise stands in a paraphrase template."""


def paraphrase_template(paraphrase: str) -> str:
    """Return the paraphrase template of that name, or ``paraphrase`` itself if it is a template.

    Args:
        paraphrase: Key of :data:`PARAPHRASE_TEMPLATES`, or an instruction with :data:`PLACEHOLDER` in it once.

    Raises:
        SempaError: If it is neither.
    """
    if template := PARAPHRASE_TEMPLATES.get(paraphrase):
        return template
    if (count := paraphrase.count(PLACEHOLDER)) != 1:
        raise SempaError(
            f"paraphrase is {paraphrase!r:.200}. Expected one of: {', '.join(PARAPHRASE_TEMPLATES)}; or a text of your "
            f"own with {PLACEHOLDER} in it once (found {count} times)."
        )
    return paraphrase
