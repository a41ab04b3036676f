"""The vocabulary tokens that an embedding is aligned with: the embedding is put through the decoder's own LM head.

An embedding that is the hidden state of the last layer, after the final norm, is what the LM head reads. Its largest
logits name the tokens that the model would say next: under PromptEOL, the one word for the sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sempa_st.errors import SempaError
from sempa_st.forward.decoder import final_logits
from sempa_st.forward.sentence_transformers import hidden_states
from sempa_st.methods.module import MethodModule
from sempa_st.methods.registry import parse_method
from sempa_st.model.peft_models import is_peft_model
from sempa_st.model.prompt_eol import PromptEOL

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

_CHUNK = 16_384
"""Rows of the LM head that are multiplied at once, in float32."""


@dataclass(frozen=True)
class AlignedToken:
    """A vocabulary token that an embedding is aligned with.

    Args:
        id: Token id.
        text: Its text; a space at its beginning is shown as ``▁``.
        logit: What the decoder computes for it, its scale and soft cap included.
    """

    id: int
    text: str
    logit: float


def aligned_tokens(
    model: SentenceTransformer, sentences: Sequence[str], *, k: int = 10, batch_size: int = 32
) -> list[list[AlignedToken]]:
    """Return the vocabulary tokens with the largest logits for each sentence's embedding, the largest first.

    Args:
        model: What :func:`sempa_st.load` returned: a decoder read at its last layer.
        sentences: The sentences.
        k: Number of tokens for each sentence.
        batch_size: Sentences per batch.

    Raises:
        SempaError: If the model has no LM head, its embedding is not what the LM head reads, or ``k`` is out of range.
    """
    head = LanguageHead(model)
    states = hidden_states(model)
    vectors = states.encode(
        list(sentences),
        batch_size=batch_size,
        convert_to_tensor=True,
        show_progress_bar=False,
        truncate_dim=cast(PromptEOL, model[0]).get_embedding_dimension(),  # whole, whatever the model's own setting
    )
    return head.aligned(vectors, k)


class LanguageHead:
    """The LM head of a loaded model, for embeddings.

    Args:
        model: What :func:`sempa_st.load` returned.

    Raises:
        SempaError: If it has no LM head, or its embedding is not what the LM head reads.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        causal_lm = _causal_lm(model)
        head = causal_lm.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise SempaError(
                f"{type(causal_lm).__name__} has the LM head {type(head).__name__}, which embeddings cannot be put "
                "through. Expected a linear layer with weights of its own."
            )
        self._head = head
        self._config: Any = causal_lm.config.get_text_config()
        self.tokenizer: PreTrainedTokenizerBase = model.tokenizer
        self._prefix = self.tokenizer("a", add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def top(self, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the ids of the tokens with the largest logits, and these logits, each of shape (sentences, k).

        The product is computed in float32 whatever the type of the weights, since in 16 bits many logits are equal.

        Args:
            vectors: Embeddings of shape (sentences, hidden), not divided by their norm.
            k: Number of tokens, at most the size of the vocabulary.

        Raises:
            SempaError: If ``k`` is out of range, or the vectors are not as wide as the decoder's hidden states.
        """
        weight, bias = self._head.weight, self._head.bias
        if not 1 <= k <= len(weight):
            raise SempaError(f"k is {k}. Expected a number from 1 to {len(weight)}, the size of the vocabulary.")
        if vectors.ndim != 2 or vectors.shape[1] != weight.shape[1]:
            raise SempaError(
                f"The embeddings have the shape {tuple(vectors.shape)}. Expected rows of width {weight.shape[1]}, "
                "which the LM head reads."
            )
        states = vectors.to(weight.device, torch.float32)
        best = states.new_zeros(len(states), 0)
        ids = best.long()
        for start in range(0, len(weight), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            logits = nn.functional.linear(states, weight[chunk].float(), None if bias is None else bias[chunk].float())
            values, places = logits.topk(min(k, logits.shape[1]))
            best, chosen = torch.cat([best, values], dim=1).topk(min(k, best.shape[1] + values.shape[1]))
            ids = torch.cat([ids, places + start], dim=1).gather(1, chosen)
        return ids, final_logits(self._config, best)  # which keeps their order

    def aligned(self, vectors: Tensor, k: int) -> list[list[AlignedToken]]:
        """Return the tokens of :meth:`top`; arguments and errors as there."""
        ids, logits = (tensor.tolist() for tensor in self.top(vectors, k))
        return [
            [AlignedToken(token, self.text(token), logit) for token, logit in zip(tokens, own, strict=True)]
            for tokens, own in zip(ids, logits, strict=True)
        ]

    def text(self, token: int) -> str:
        """Return a token's text; a space at its beginning is shown as ``▁``, and bytes without a character by name."""
        # After another token, since many tokenizers drop a space at the beginning of a text.
        before, after = (
            self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            for ids in (self._prefix, [*self._prefix, token])
        )
        text = str(after).removeprefix(str(before))
        if not text or "\ufffd" in text:
            text = str(self.tokenizer.convert_ids_to_tokens(token))
        text = "▁" + text[1:] if text.startswith(" ") else text
        return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)

    def surface(self, sentence: str) -> set[int]:
        """Return the ids of a sentence's own tokens, without special tokens and template."""
        return set(self.tokenizer(sentence, add_special_tokens=False)["input_ids"])


def _causal_lm(model: SentenceTransformer) -> Any:
    """Return the decoder with its LM head; raises :class:`SempaError` if the embedding is not what the head reads."""
    module = model[0]
    if isinstance(module, PromptEOL):
        return module.causal_lm
    if not isinstance(module, MethodModule) or (method := parse_method(module.method)).for_encoders:
        raise SempaError(
            f"{type(module).__name__} is not a decoder with an LM head, so its embeddings are aligned with no tokens. "
            "Expected a base, a SemPA folder, or a decoder read by a method."
        )
    if method.num_layers(module.decoder) != method.depth(module.decoder):
        raise SempaError(
            f"The method {module.method!r} reads a layer before the last, whose output the LM head does not read. "
            "Expected the last layer."
        )
    return module.model.get_base_model() if is_peft_model(module.model) else module.model
