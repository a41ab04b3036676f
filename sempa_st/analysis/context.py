"""What a part of an analysis works with: models, data, settings, sentence vectors and a progress bar."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sempa_st.analysis.data import AnalysisData
from sempa_st.analysis.settings import AnalysisSettings
from sempa_st.analysis.vectors import Vectors, VectorStore
from sempa_st.errors import SempaError
from sempa_st.folder.resolve import Source, find_model, source_digest
from sempa_st.loading import check_method, load
from sempa_st.methods.registry import split_method
from sempa_st.utils.devices import pick_device, pick_dtype, trim_malloc
from sempa_st.utils.finite import check_finite

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_BATCHES = 16
"""Batches that are encoded between two steps of the progress bar."""
_LOADED_BYTES = 6 << 30
"""Size of the weights that stay loaded from one part to the next."""


@dataclass(frozen=True)
class AnalyzedModel:
    """A model, and the method to embed with it.

    Args:
        name: What it is called in the report.
        model: What :func:`sempa_st.load` takes.
        method: Embedding method; the model's own when None.
        source: Where the model is.
    """

    name: str
    model: str
    method: str | None
    source: Source

    def identity(self, settings: AnalysisSettings) -> dict[str, Any]:
        """Return all that decides its vectors."""
        device = pick_device(settings.device)
        return {
            "name": self.name,
            "digest": source_digest(self.source),
            "method": self.method,
            "dtype": str(pick_dtype(settings.dtype, device)),
            "device": device,
        }


def find_models(names: Sequence[str]) -> dict[str, AnalyzedModel]:
    """Find models, given as ``MODEL`` or ``METHOD:MODEL``, without loading them.

    Returns:
        The models by their names in the report: of a path, the last part.

    Raises:
        SempaError: If there are none, one is not found or does not take its method, or two have one name.
    """
    if not names:
        raise SempaError("There is no model to analyze. Name at least one.")
    found: dict[str, AnalyzedModel] = {}
    for text in names:
        method, model = split_method(text)
        shown = Path(model).name or model
        name = f"{method}:{shown}" if method else shown
        if name in found:
            raise SempaError(f"Two models have the name {name!r}. Expected names of their own: rename a folder.")
        source = find_model(model, for_method=method is not None)
        if method:
            check_method(source, method)
        found[name] = AnalyzedModel(name, model, method, source)
    return found


class Context:
    """What the parts of one analysis share.

    Args:
        models: The models by name, from :func:`find_models`.
        data: The data.
        settings: The settings.
        scratch: Folder for the vectors, removed by the caller.
        kept: Folder for what a part keeps until the next call, so that an interrupted one goes on.

    Attributes:
        bar: Progress bar of the part that runs; None outside of one.
    """

    def __init__(
        self,
        models: dict[str, AnalyzedModel],
        data: AnalysisData,
        settings: AnalysisSettings,
        scratch: Path,
        kept: Path | None = None,
    ) -> None:
        self.models = models
        self.data = data
        self.settings = settings
        self.kept = kept or scratch
        self.bar: Any = None
        self._scratch = scratch
        self._stores: dict[str, VectorStore] = {}
        self._loaded: dict[str, SentenceTransformer] = {}

    def load(self, name: str) -> SentenceTransformer:
        """Return a model. It stays loaded for the next part, if all that are loaded have 6 GiB of weights at most."""
        if name not in self._loaded:
            if sum(map(_weight_bytes, self._loaded.values())) + self._largest_bytes() > _LOADED_BYTES:
                # All are freed before one is read; modules refer to each other, so only gc frees them.
                self._loaded.clear()
                gc.collect()
                trim_malloc()
            chosen = self.models[name]
            settings = self.settings
            self._loaded[name] = load(chosen.model, method=chosen.method, dtype=settings.dtype, device=settings.device)
        return self._loaded[name]

    def _largest_bytes(self) -> int:
        """Return the size of the largest loaded model, as a guess at the next one's."""
        return max(map(_weight_bytes, self._loaded.values()), default=0)

    def vectors(self, name: str, sentences: Sequence[str]) -> Vectors:
        """Return the embeddings of sentences, of shape (sentences, hidden) in float32, not divided by their norm.

        Each distinct sentence is encoded once in an analysis. The vectors are on disk: a slice reads its rows, and
        ``numpy.asarray`` reads all.

        Raises:
            SempaError: If a vector is not finite.
        """
        from sempa_st.forward.sentence_transformers import hidden_states

        store = self._store(name)
        new = store.missing(sentences)
        self.advance(len(sentences) - len(new))
        new.sort(key=len)
        model: Any = hidden_states(self.load(name)) if new else None
        size = _BATCHES * self.settings.batch_size
        for start in range(0, len(new), size):
            window = new[start : start + size]
            vectors = model.encode(window, batch_size=self.settings.batch_size, show_progress_bar=False)
            check_finite(vectors, window)
            store.add(window, np.asarray(vectors, dtype=np.float32))
            self.advance(len(window))
        return store.view(sentences)

    def keep(self, name: str, sentences: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Keep embeddings that a part has computed for itself, so that :meth:`vectors` does not encode them again.

        Args:
            name: Name of the model.
            sentences: Sentences; those that have an embedding keep it.
            vectors: What :meth:`vectors` would return, of shape (sentences, hidden).
        """
        store = self._store(name)
        rows = {sentence: row for row, sentence in enumerate(sentences)}
        new = store.missing(sentences)
        if new:
            store.add(new, vectors[[rows[sentence] for sentence in new]])

    def _store(self, name: str) -> VectorStore:
        if name not in self._stores:
            self._stores[name] = VectorStore(self._scratch / f"{len(self._stores)}.f32")
        return self._stores[name]

    def advance(self, steps: int) -> None:
        """Advance the progress bar."""
        if self.bar is not None:
            self.bar.update(steps)


def _weight_bytes(model: SentenceTransformer) -> int:
    return sum(weight.nbytes for weight in model.parameters())
