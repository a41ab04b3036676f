"""The SentenceTransformer that :func:`sempa_st.load` returns: its batches hold texts that begin alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import sentence_transformers
import torch
from sentence_transformers.util import quantize_embeddings
from tqdm.auto import tqdm

from sempa_st.forward.batching import batches_by_length, min_batch_characters
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.utils.finite import check_finite, check_texts

_PLAIN = {"output_value": "sentence_embedding", "precision": "float32", "pool": None}


# Of the same name, which stands in the model cards that sentence-transformers writes.
class SentenceTransformer(sentence_transformers.SentenceTransformer):
    """sentence-transformers' own class, with another order of the texts where the module runs them in packs.

    What texts of a batch begin with alike is run once there, and texts of different lengths fit into a pack.
    """

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Embed texts: arguments and return value of sentence-transformers' own ``encode``, the vectors too.

        Raises:
            SempaError: If a text holds half a character, or a vector is infinite or no number.
        """
        texts: Any = args[0] if args else kwargs.get("inputs")
        alone = self.is_singular_input(texts)
        listed = [texts] if alone else list(texts)
        check_texts([*(text["text"] if isinstance(text, dict) and "text" in text else text for text in listed)])
        check_texts([kwargs.get("prompt")])
        precision = kwargs.get("precision") or "float32"
        if precision != "float32":
            return self._quantised(listed, {**kwargs, "precision": "float32"}, precision, alone=alone)
        output = kwargs.get("output_value", "sentence_embedding")
        # A method has none to give, and is asked for them only by name.
        tokens = output == "token_embeddings" or (output is None and isinstance(self[0], PromptEOL))
        found = self._encode(texts, args, {**kwargs, "token_embeddings": True} if tokens else kwargs)
        for vectors, names in _with_names([found] if alone else found, listed, output):
            check_finite(vectors, names)
        return found

    def _quantised(self, texts: list[Any], kwargs: dict[str, Any], precision: Any, *, alone: bool) -> Any:
        """Return vectors of a smaller type, once those that they are made of have been checked."""
        kwargs = {name: value for name, value in kwargs.items() if name != "inputs"}
        asked = {**kwargs, "convert_to_numpy": True, "convert_to_tensor": False}
        found: Any = quantize_embeddings(self.encode(texts, **asked), precision=precision)
        if kwargs.get("convert_to_tensor") or not kwargs.get("convert_to_numpy", True):
            found = torch.as_tensor(found)
            found = found if kwargs.get("convert_to_tensor") else list(found)
        return found[0] if alone else found

    def _encode(self, texts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        size = kwargs.get("batch_size", 32)
        if len(args) > 1 or not self._may_reorder(texts, kwargs) or not 0 < size < len(texts):
            return super().encode(*args, **kwargs)
        show = bool(kwargs.get("show_progress_bar"))
        options = {**kwargs, "show_progress_bar": False}
        options.pop("inputs", None)
        found, places = [], []
        with tqdm(total=len(texts), desc="texts", disable=not show, dynamic_ncols=True) as bar:
            for batch in batches_by_length(texts, size, min_batch_characters(self, size)):
                part = [texts[place] for place in batch]
                found.append(super().encode(part, **{**options, "batch_size": len(part)}))
                places += batch
                bar.update(len(part))
        order = np.argsort(places)
        if isinstance(found[0], torch.Tensor):
            return torch.cat(found)[torch.as_tensor(order, device=found[0].device)]
        if isinstance(found[0], np.ndarray):
            return np.concatenate(found)[order]
        vectors = [vector for part in found for vector in part]
        return [vectors[place] for place in order]

    def _may_reorder(self, texts: Any, kwargs: dict[str, Any]) -> bool:
        """Whether texts may be run in parts: equal to one call, and the module gains from it."""
        return (
            isinstance(texts, list)
            and all(isinstance(text, str) for text in texts)
            and all(kwargs.get(name, plain) == plain for name, plain in _PLAIN.items())
            and not isinstance(kwargs.get("device"), list)
            and getattr(self[0], "packs_batches", False)
        )


def _with_names(found: Any, texts: Sequence[Any], output: str | None) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Yield vectors, as ``encode`` returned them, each beside what they stand for."""
    if output == "sentence_embedding" and len(texts):
        listed = isinstance(found, list) and isinstance(found[0], torch.Tensor)
        yield (torch.stack(found) if listed else found if isinstance(found, torch.Tensor) else np.asarray(found)), texts
    elif output == "token_embeddings":
        yield from ((tokens, [text] * len(tokens)) for tokens, text in zip(found, texts, strict=True))
    elif output is None:
        yield from ((features["sentence_embedding"][None], [text]) for features, text in zip(found, texts, strict=True))
