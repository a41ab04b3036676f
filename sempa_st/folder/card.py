"""The model card and the notices of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sempa_st.folder.layout import ModelFolder
from sempa_st.model.base_model import Base
from sempa_st.model.gemma import EMBEDDED_BASE, EMBEDDED_HUB_ID
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.utils.assets import asset_path
from sempa_st.utils.files import write_text
from sempa_st.utils.portable import portable_name


def write_card(folder: Path, name: str, base: Base, record: dict[str, Any] | None) -> None:
    """Write the model card (``README.md``) of a finished folder, and the notices that Gemma's terms require.

    Args:
        folder: Model folder; all its other files are written.
        name: Name of the model in the title and in the examples.
        base: The base that it was derived from.
        record: Run record of the training; None for a model that was not trained.
    """
    from huggingface_hub import ModelCard

    model = ModelFolder(folder)
    template = EMBEDDING_TEMPLATES.get(model.template or "")
    card = ModelCard.from_template(
        _metadata(base, record),
        template_path=str(asset_path("model_card.md")),
        name=name,
        base=portable_name(base.name),
        data=portable_name(record["data"]["source"]) if record else "",
        template=template.prefix + "{sentence}" + template.suffix if template else "",
        format=model.format,
        adapter=model.is_adapter,
        activated=model.is_activated,
        generator_class="AutoPeftModelForCausalLM" if model.is_adapter else "AutoModelForCausalLM",
        record=record,
        max_seq_length=model.max_seq_length,
        gemma=base.is_gemma,
    )
    write_text(folder / "README.md", str(card))
    base.write_notices(folder)


def hub_id(base: Base) -> str | None:
    """Return the Hub id of a base, or None for a local folder."""
    name = EMBEDDED_HUB_ID if base.name == EMBEDDED_BASE else base.name
    return name if name.count("/") == 1 and not Path(name).exists() else None


def _metadata(base: Base, record: dict[str, Any] | None) -> Any:
    from huggingface_hub import ModelCardData

    data = (record or {}).get("data", {}).get("source", "")
    return ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        language="en",
        license="gemma" if base.is_gemma else None,
        base_model=hub_id(base),  # the Hub refuses a card that names a local folder
        datasets=[data] if data.count("/") == 1 and not Path(data).suffix else None,
        tags=[
            "sentence-embeddings",
            "feature-extraction",
            "text-generation",
            *(["sempa", *(part.partition(":")[0] for part in record["objective"].split(","))] if record else []),
        ],
    )
