"""The SentenceTransformer that :func:`sempa_st.load` returns: its batches hold texts with common prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import sentence_transformers
import torch
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.util import quantize_embeddings
from tqdm.auto import tqdm

from sempa_st.errors import SempaError
from sempa_st.forward.batching import batches_by_length, min_batch_characters
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.utils.finite import NotFiniteError, check_finite, check_texts

_PLAIN = {"output_value": "sentence_embedding", "precision": "float32", "pool": None}


class Saver(Protocol):
    """Writes a model to a folder in place of sentence-transformers; see :class:`sempa_st.folder.saving.FolderSaver`."""

    def for_hub(self, model: Any) -> Saver:
        """Return a saver of folders that other machines can use."""

    def __call__(self, model: Any, path: str | Path, *, name: str, card: bool) -> bool:
        """Write the model and return True, or do nothing and return False."""


# The same class name, since sentence-transformers writes it into model cards. "sentence_transformers" is in the name of
# this file since BERTopic looks for it in str(type(model)), and takes another model in silence without it.
class SentenceTransformer(sentence_transformers.SentenceTransformer):
    """sentence-transformers' own class, with another order of the texts if the module packs them.

    Packing runs common prefixes of a batch once, and fits texts of different lengths into one pack.

    Attributes:
        saver: What saves the model; sentence-transformers does when None, or if it declines.
    """

    saver: Saver | None = None

    def save(
        self, path: str, model_name: str | None = None, create_model_card: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Save the model as the folder that it was loaded from, with what has changed; arguments as of the base class.

        Raises:
            SempaError: If the folder cannot be written.
        """
        name = model_name or Path(path).resolve().name
        if self.saver is None or not self.saver(self, path, name=name, card=create_model_card):
            super().save(path, model_name, create_model_card, *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:
        """Upload what :meth:`save` writes, with a base that other machines find; arguments as of the base class.

        Raises:
            SempaError: If nobody else has the base of the model's adapter.
        """
        saver = self.saver
        self.saver = saver.for_hub(self) if saver else None
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            self.saver = saver

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Embed texts; arguments and return value are those of sentence-transformers' own ``encode``.

        So are the vectors, except that a model which normalises does so again after a cut to ``truncate_dim``.

        Raises:
            SempaError: If a text holds a lone surrogate, or a vector holds an infinity or NaN, or nothing but zeros.
        """
        texts: Any = args[0] if args else kwargs.get("inputs")
        singular = self.is_singular_input(texts)
        listed = [texts] if singular else list(texts)
        check_texts([*(text["text"] if isinstance(text, dict) and "text" in text else text for text in listed)])
        check_texts([kwargs.get("prompt")])
        if normalizes(self) and (kwargs.get("truncate_dim") or self.truncate_dim):
            kwargs["normalize_embeddings"] = True
        precision = kwargs.get("precision") or "float32"
        if precision != "float32":
            return self._quantised(listed, {**kwargs, "precision": "float32"}, precision, singular=singular)
        output = kwargs.get("output_value", "sentence_embedding")
        # With output_value None, a method that has no token embeddings is not asked for them.
        tokens = output == "token_embeddings" or (output is None and isinstance(self[0], PromptEOL))
        vectors = self._encode(texts, args, {**kwargs, "token_embeddings": True} if tokens else kwargs)
        never_zero = output != "token_embeddings" and getattr(self[0], "never_zero", False)
        for checked, names in _with_names([vectors] if singular else vectors, listed, output):
            try:
                check_finite(checked, names, nonzero=never_zero)
            except NotFiniteError as error:
                raise self._by_themselves(error, output) from None
        return vectors

    def _by_themselves(self, error: NotFiniteError, output: str | None) -> NotFiniteError:
        """Return the error with the texts alone that are at fault: in a pack, one spoils others."""
        if output != "sentence_embedding" or not (error.spreads and getattr(self[0], "packs_batches", False)):
            return error
        vectors = {
            text: super(SentenceTransformer, self).encode([text], show_progress_bar=False) for text in error.texts
        }
        bad = [(index, text) for index, text in error.bad if not np.isfinite(vectors[text]).all()]
        return error.naming(bad or error.bad, error.total)

    @classmethod
    def _load_with_module_classes(cls, model_name_or_path: str, module_classes: Any, **kwargs: Any) -> Any:
        """Load a trainer's checkpoint, a folder of format native too, with the module of the model that is trained."""
        name = f"{Transformer.__module__}.{Transformer.__qualname__}"
        return super()._load_with_module_classes(model_name_or_path, {**module_classes, name: PromptEOL}, **kwargs)

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


def normalizes(model: sentence_transformers.SentenceTransformer) -> bool:
    """Whether a model divides its vectors by their norm, in its last module."""
    return isinstance(model[-1], Normalize)


def reads_prompt_eol(model: sentence_transformers.SentenceTransformer) -> bool:
    """Whether a model is one :class:`PromptEOL` module, normalised or not, and nothing else."""
    return isinstance(model[0], PromptEOL) and len(model) - normalizes(model) == 1


def hidden_states(model: sentence_transformers.SentenceTransformer) -> sentence_transformers.SentenceTransformer:
    """Return a model whose vectors are the pooled hidden states of ``model``, not divided by their norm.

    Both share their modules. A model without a :class:`PromptEOL` module is returned as it is.
    """
    if not (isinstance(model[0], PromptEOL) and normalizes(model)):
        return model
    return SentenceTransformer(
        modules=[*model][:-1],
        device=str(model.device),
        prompts=dict(model.prompts),  # type: ignore[arg-type]
        default_prompt_name=model.default_prompt_name,
        truncate_dim=model.truncate_dim,
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
