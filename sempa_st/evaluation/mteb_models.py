"""Models of this package in MTEB's registry, with complete metadata."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sempa_st.errors import SempaError
from sempa_st.evaluation.tasks import quiet
from sempa_st.folder.card import hub_id, licence_of
from sempa_st.folder.citation import BIBTEX, PAPER_URL
from sempa_st.folder.digests import digest_in, digested_name
from sempa_st.folder.identity import current_name
from sempa_st.folder.layout import ModelFolder
from sempa_st.folder.resolve import adapter_base, find_model, source_digest
from sempa_st.folder.shipped import SHIPPED_MODELS, shipped_names
from sempa_st.loading import load
from sempa_st.model.base_model import Base, load_config
from sempa_st.model.embedded import EMBEDDED_BASES
from sempa_st.model.prompt_eol import DEFAULT_MAX_SEQ_LENGTH, embedding_width
from sempa_st.utils.extras import require

if TYPE_CHECKING:
    from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

ORGANISATION = "sempa-st"
"""Owner in the names of shipped models: ``sempa-st/sempa-gemma3-270m``."""
_MEBIBYTE = 2**20
_NLI_DATA = {
    "e142b52c6ee8580c30f09226d448664410c89a4bed283fdfcc7b91db955c80e0": {"SNLI", "MNLI"},
    "cc5ecfc40bc453c1e4e4aea53cbb697d51d39dec16a9660af5d407d36ab87418": {"SNLI", "MNLI"},  # 4,000 of them
}
"""What a file of triplets was made of, by its SHA-256, in MTEB's names: SNLI (dev, test and minimal edits of it) and
LingNLI, whose premises are MultiNLI's. Checkpoints were chosen on STS-B dev, and not trained on it."""
_PUBLIC_DATA = "https://nlp.stanford.edu/projects/snli/"


@dataclass(frozen=True)
class Decoder:
    """What MTEB's metadata says of the decoder of a model.

    Args:
        name: Hub id; None for a local folder.
        parameters: Number of parameters.
        vocabulary: Rows of the token embeddings.
        width: Width of a hidden state.
        licence: The Hub's name of its licence; None if that is unknown.
    """

    name: str | None
    parameters: int
    vocabulary: int
    width: int
    licence: str | None

    @classmethod
    def embedded(cls, name: str) -> Decoder:
        """Return what is known of an embedded base, which need not be installed where the metadata is read."""
        base = EMBEDDED_BASES[name]
        return cls(base.hub_id, base.parameters, base.vocabulary, base.width, base.licence)


def register_shipped() -> None:
    """Put the shipped models into MTEB's registry as ``sempa-st/NAME``; nothing is loaded.

    Raises:
        SempaError: If ``mteb`` is not installed.
    """
    for name in shipped_names():
        _register(f"{ORGANISATION}/{name}", shipped_meta(name))


def register(model: str) -> ModelMeta:
    """Put any model that :func:`sempa_st.load` reads into MTEB's registry, under the name it is called by here.

    MTEB keeps its results under a name of its own, ``local/NAME-DIGEST``, so that two folders of one name never share
    results.

    Args:
        model: Shipped model, SemPA folder or Hub id, base, or any sentence-transformers model.

    Raises:
        SempaError: If the model is not found, or ``mteb`` is not installed.
    """
    return _register(model, local_meta(model))


def _register(name: str, meta: ModelMeta) -> ModelMeta:
    from mteb.models.model_implementations import MODEL_REGISTRY

    MODEL_REGISTRY[name] = meta
    return meta


def shipped_meta(name: str) -> ModelMeta:
    """Return MTEB's metadata of a shipped model, whether its base is installed or not.

    Args:
        name: One of :func:`sempa_st.folder.shipped.shipped_names`.
    """
    folder = ModelFolder(SHIPPED_MODELS / name)
    return _meta(f"{ORGANISATION}/{name}", name, folder, Decoder.embedded(folder.base), folder.digest)


def local_meta(model: str) -> ModelMeta:
    """Return MTEB's metadata of a SemPA folder or a base; the revision is a digest of all its files.

    Raises:
        SempaError: If it is not found, or neither of the two.
    """
    source = find_model(model)
    if source.kind == "sentence-transformers":
        raise SempaError(f"{model} is a model of sentence-transformers, which MTEB opens by itself.")
    digest = source_digest(source)
    base = adapter_base(source.folder) if source.folder.is_adapter else Base(model, source.folder.path)
    config = load_config(base.folder)
    decoder = Decoder(
        name=hub_id(base),
        parameters=_parameters(base.folder),
        vocabulary=config.get_text_config().vocab_size,
        width=embedding_width(config),
        licence=licence_of(base),
    )
    return _meta(digested_name(model, {"model": digest}), model, source.folder, decoder, digest)


def describe(model: SentenceTransformer) -> ModelMeta:
    """Return MTEB's metadata of an open model, with its size and a revision; what it was trained on is unknown.

    The revision is a digest of the settings and weights of a model that :func:`sempa_st.load` opened, as they are now,
    since MTEB gives a model the scores that it has of its revision.
    """
    from mteb.models import ModelMeta

    with quiet("mteb"):
        meta = ModelMeta.from_sentence_transformer_model(model)
    parameters = list(model.parameters())
    known: dict[str, Any] = {
        "n_parameters": sum(parameter.numel() for parameter in parameters),
        "memory_usage_mb": round(sum(each.numel() * each.element_size() for each in parameters) / _MEBIBYTE),
    }
    if name := current_name(model):
        known["revision"] = digest_in(name)
    return meta.model_copy(update=known)


def as_encoder(model: SentenceTransformer) -> SentenceTransformerEncoderWrapper:
    """Return MTEB's encoder around an open model, described by :func:`describe`."""
    require("mteb", extra="eval", purpose="Evaluation")
    from mteb.models import SentenceTransformerEncoderWrapper

    encoder = SentenceTransformerEncoderWrapper(model)
    encoder.mteb_model_meta = describe(model)
    return encoder


def load_encoder(
    source: str, name: str, revision: str | None = None, embed_dim: int | None = None, **options: Any
) -> SentenceTransformerEncoderWrapper:
    """Load a model as MTEB's registry asks for it.

    Args:
        source: Name that :func:`sempa_st.load` takes.
        name: Name in the registry, which MTEB puts into the metadata itself.
        revision: Revision in the registry; MTEB has checked it.
        embed_dim: Width of the vectors; MTEB has checked that it is the model's.
        **options: Arguments of :func:`sempa_st.load`; ``dtype`` is float32 unless it is given.
    """
    from mteb.models import SentenceTransformerEncoderWrapper

    return SentenceTransformerEncoderWrapper(load(source, **options))


def _parameters(folder: Path) -> int:
    """Return the number of parameters in the safetensors files of a folder, of which only the headers are read."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            total += sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total


def _meta(name: str, source: str, folder: ModelFolder, decoder: Decoder, digest: str) -> ModelMeta:
    require("mteb", extra="eval", purpose="MTEB's registry")
    from mteb.models import ModelMeta
    from mteb.models.model_meta import ScoringFunction
    from mteb.types import Licenses

    record = folder.record
    length = folder.max_seq_length if folder.format else DEFAULT_MAX_SEQ_LENGTH
    if record:
        length = record["config"].get("max_seq_length", length)
    created = record and record.get("created")
    parameters = decoder.parameters + (_parameters(folder.path) if folder.is_adapter else 0)
    datasets = _NLI_DATA.get(record["data"]["sha256"]) if record else None
    return ModelMeta(
        loader=partial(load_encoder, source),
        loader_kwargs={"dtype": "float32"},
        name=name,
        revision=digest[:40],
        release_date=str(datetime.fromisoformat(created).date()) if created else None,
        languages=["eng-Latn"] if record else None,
        n_parameters=parameters,
        n_embedding_parameters=decoder.vocabulary * decoder.width,
        memory_usage_mb=round(4 * parameters / _MEBIBYTE),
        max_tokens=length,
        embed_dim=decoder.width,
        license=decoder.licence if decoder.licence in get_args(Licenses) else None,
        open_weights=True,
        public_training_code=None,
        public_training_data=_PUBLIC_DATA if datasets else None,
        framework=["Sentence Transformers", "PyTorch", "safetensors"],
        reference=PAPER_URL if record else None,
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=False,
        training_datasets=datasets,
        adapted_from=decoder.name,
        citation=BIBTEX if record else None,
    )
