"""The SentenceTransformer that :func:`sempa_st.load` returns: its batches hold texts with common prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import sentence_transformers
import torch
from sentence_transformers.util import quantize_embeddings
from tqdm.auto import tqdm

from sempa_st.errors import SempaError
from sempa_st.forward.batching import batches_by_length, min_batch_characters
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.utils.finite import check_finite, check_texts

_PLAIN = {"output_value": "sentence_embedding", "precision": "float32", "pool": None}


# The same class name, since sentence-transformers writes it into model cards.
class SentenceTransformer(sentence_transformers.SentenceTransformer):
    """sentence-transformers' own class, with another order of the texts if the module packs them.

    Packing runs common prefixes of a batch once, and fits texts of different lengths into one pack.
    """

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Embed texts; arguments, return value and vectors are those of sentence-transformers' own ``encode``.

        Raises:
            SempaError: If a text holds a lone surrogate, or a vector holds an infinity or NaN.
        """
        texts: Any = args[0] if args else kwargs.get("inputs")
        singular = self.is_singular_input(texts)
        listed = [texts] if singular else list(texts)
        check_texts([*(text["text"] if isinstance(text, dict) and "text" in text else text for text in listed)])
        check_texts([kwargs.get("prompt")])
        precision = kwargs.get("precision") or "float32"
        if precision != "float32":
            return self._quantised(listed, {**kwargs, "precision": "float32"}, precision, singular=singular)
        output = kwargs.get("output_value", "sentence_embedding")
        # With output_value None, a method that has no token embeddings is not asked for them.
        tokens = output == "token_embeddings" or (output is None and isinstance(self[0], PromptEOL))
        vectors = self._encode(texts, args, {**kwargs, "token_embeddings": True} if tokens else kwargs)
        for checked, names in _with_names([vectors] if singular else vectors, listed, output):
            check_finite(checked, names)
        return vectors

    def train(self, mode: bool = True) -> Self:
        """Set training mode, as every trainer does first.

        Raises:
            SempaError: If no weight has gradients. Losses with a gradient cache would run to the end and train nothing.
        """
        if mode and not any(parameter.requires_grad for parameter in self.parameters()):
            raise SempaError("All weights of this model are frozen. To train it: sempa_st.load(..., trainable=True).")
        return super().train(mode)

    def _quantised(self, texts: list[Any], kwargs: dict[str, Any], precision: Any, *, singular: bool) -> Any:
        """Return vectors in a smaller type, quantised from float32 vectors that have been checked."""
        kwargs = {name: value for name, value in kwargs.items() if name != "inputs"}
        asked = {**kwargs, "convert_to_numpy": True, "convert_to_tensor": False}
        vectors: Any = quantize_embeddings(self.encode(texts, **asked), precision=precision)
        if kwargs.get("convert_to_tensor") or not kwargs.get("convert_to_numpy", True):
            vectors = torch.as_tensor(vectors)
            vectors = vectors if kwargs.get("convert_to_tensor") else list(vectors)
        return vectors[0] if singular else vectors

    def _encode(self, texts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        size = kwargs.get("batch_size", 32)
        if len(args) > 1 or not self._may_reorder(texts, kwargs) or not 0 < size < len(texts):
            return super().encode(*args, **kwargs)
        show = bool(kwargs.get("show_progress_bar"))
        options = {**kwargs, "show_progress_bar": False}
        options.pop("inputs", None)
        encoded, indices = [], []
        with tqdm(total=len(texts), desc="texts", disable=not show, dynamic_ncols=True) as bar:
            for batch in batches_by_length(texts, size, min_batch_characters(self, size)):
                chosen = [texts[index] for index in batch]
                encoded.append(super().encode(chosen, **{**options, "batch_size": len(chosen)}))
                indices += batch
                bar.update(len(chosen))
        order = np.argsort(indices)
        if isinstance(encoded[0], torch.Tensor):
            return torch.cat(encoded)[torch.as_tensor(order, device=encoded[0].device)]
        if isinstance(encoded[0], np.ndarray):
            return np.concatenate(encoded)[order]
        vectors = [vector for batch_vectors in encoded for vector in batch_vectors]
        return [vectors[index] for index in order]

    def _may_reorder(self, texts: Any, kwargs: dict[str, Any]) -> bool:
        """Whether several calls give what one call gives, and the module gains from another order."""
        return (
            isinstance(texts, list)
            and all(isinstance(text, str) for text in texts)
            and all(kwargs.get(name, plain) == plain for name, plain in _PLAIN.items())
            and not isinstance(kwargs.get("device"), list)
            and getattr(self[0], "packs_batches", False)
        )


def _with_names(vectors: Any, texts: Sequence[Any], output: str | None) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Yield the vectors that ``encode`` returned, each tensor with the texts of its rows."""
    if output == "sentence_embedding" and len(texts):
        if isinstance(vectors, list) and isinstance(vectors[0], torch.Tensor):
            vectors = torch.stack(vectors)
        yield vectors if isinstance(vectors, torch.Tensor) else np.asarray(vectors), texts
    elif output == "token_embeddings":
        yield from ((tokens, [text] * len(tokens)) for tokens, text in zip(vectors, texts, strict=True))
    elif output is None:
        yield from (
            (features["sentence_embedding"][None], [text]) for features, text in zip(vectors, texts, strict=True)
        )
