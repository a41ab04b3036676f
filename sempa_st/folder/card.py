"""The model card and the notices of a model folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sempa_st.data.sts import MTEB_DATASETS, STS_TASKS
from sempa_st.errors import SempaError, first_line
from sempa_st.folder.citation import BIBTEX
from sempa_st.folder.layout import ModelFolder
from sempa_st.folder.write import write_notices
from sempa_st.model.base_model import Base
from sempa_st.model.embedded import EMBEDDED_BASES
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.utils.assets import asset_path
from sempa_st.utils.files import write_text
from sempa_st.utils.options import split_list
from sempa_st.utils.portable import portable_name

CARD = "README.md"
_WIDGET = {
    "source_sentence": "A man is playing a guitar.",
    "sentences": ["Someone plays an instrument.", "A man is eating pasta.", "The guitar is not being played."],
}
_COLUMNS = {"STS-B": "STSBenchmark", **{task: task for task in STS_TASKS}}
"""Columns of a table of results that are STS test sets, with MTEB's names."""


_OBJECTIVES = {
    "dpo": "preference optimisation of whole sentences against the base, the objective of SemPA",
    "listwise": "a ranking of whole sentences against the base",
    "one-word": "a preference of single words against the base",
    "one-word-listwise": "a choice of single words against the base",
    "contrastive": "contrastive learning, InfoNCE, which is the baseline of SemPA and not its objective",
    "retrieval": "a preference among all sentences of a batch, in both directions",
}
"""What each objective is, for the first line of a card."""
_KL_TEXTS = {"": "its premises", "template": "its own sentences under the template"}
"""What the KL term read, by the setting ``kl_text``; any other value is a file."""


def write_card(
    folder: Path, name: str, base: Base, record: dict[str, Any] | None, *, served: str | None = None
) -> None:
    """Write the model card (``README.md``) of a finished folder, and the notices that the base's licence requires.

    Args:
        folder: Model folder; all its other files are written.
        name: Name of the model in the title and in the examples.
        base: The base that it was derived from.
        record: Run record of the training; None for a model that was not trained.
        served: Name of the template that the tokenizer applies by itself, in a copy for servers.
    """
    write_text(folder / CARD, card_text(ModelFolder(folder), name, base, record, served=served))
    write_notices(base, folder)


def card_text(
    model: ModelFolder, name: str, base: Base, record: dict[str, Any] | None, *, served: str | None = None
) -> str:
    """Return the text of a model card; arguments as for :func:`write_card`."""
    from huggingface_hub import ModelCard

    template = EMBEDDING_TEMPLATES.get(served or model.template or "")
    card = ModelCard.from_template(
        _metadata(model, name, base, record),
        template_path=str(asset_path("model_card.md")),
        name=name,
        base=portable_name(base.name),
        data=portable_name(record["data"]["source"]) if record else "",
        template=template.prefix + "{sentence}" + template.suffix if template else "",
        format="server" if served else model.format,
        adapter=model.is_adapter,
        activated=model.is_activated,
        generator_class="AutoPeftModelForCausalLM" if model.is_adapter else "AutoModelForCausalLM",
        record=record,
        trained_by=_trained_by(record) if record else "",
        max_seq_length=model.max_seq_length,
        gemma=base.is_gemma,
        licence=licence_of(base),
        bibtex=BIBTEX,
    )
    return str(card)


def objectives_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the runs of a model were trained by: objective and KL term of each, each one once.

    Args:
        record: Run record; that of a mean names its runs, those of earlier versions without their objectives.
    """
    runs = [run for origin in record.get("averaged") or [] for run in origin.get("objectives") or []]
    config = record["config"]
    own = {"objective": str(record["objective"]), "kl": config.get("kl"), "kl_text": config.get("kl_text")}
    return [run for number, run in enumerate(runs) if run not in runs[:number]] or [own]


def _trained_by(record: Mapping[str, Any]) -> str:
    """Return the objectives of a model's runs, and their KL terms, in words."""
    runs = [_run_in_words(run) for run in objectives_of(record)]
    return runs[0] if len(runs) == 1 else f"the mean of runs by {'; and by '.join(runs)}"


def _run_in_words(run: Mapping[str, Any]) -> str:
    named = [
        f"`{name}`" + (f" ({_OBJECTIVES[name]})" if name in _OBJECTIVES else "") for name in _names(run["objective"])
    ]
    text = _KL_TEXTS.get(str(run.get("kl_text")), "ordinary text")
    return " and ".join(named) + (f", tied to its base by a KL term on {text}" if run.get("kl") else "")


def _tags(record: Mapping[str, Any]) -> list[str]:
    """Return the names of all objectives of a model's runs."""
    return list(dict.fromkeys(name for run in objectives_of(record) for name in _names(run["objective"])))


def _names(objective: str) -> list[str]:
    """Return the names in an objective, without their weights."""
    return [entry.partition(":")[0] for entry in split_list(objective)]


def check_card(folder: Path) -> None:
    """Check the card of a folder by huggingface_hub's own reading of its metadata, as strictly as the Hub does.

    Raises:
        SempaError: If there is no card, or its metadata cannot be read, or names no licence, base model or library.
    """
    from huggingface_hub import ModelCard

    path = folder / CARD
    if not path.is_file():
        raise SempaError(f"{path} does not exist. Expected a model card; `sempa copy` writes one.")
    try:
        data = ModelCard.load(path).data.to_dict()
    except Exception as error:  # YAML's errors, and ValueError for results that the Hub would refuse
        raise SempaError(f"The metadata of {path} cannot be read: {first_line(error)}. Fix the text in ---.") from error
    missing = [key for key in ("license", "base_model", "library_name") if not data.get(key)]
    if missing:
        raise SempaError(
            f"The metadata of {path} has no {', '.join(missing)}. Add it between the lines ---, as in `license: mit`."
        )


def hub_id(base: Base) -> str | None:
    """Return the Hub id of a base, or None for a local folder."""
    embedded = EMBEDDED_BASES.get(base.name)
    name = embedded.hub_id if embedded else base.name
    return name if name.count("/") == 1 and not Path(name).exists() else None


def licence_of(base: Base) -> str | None:
    """Return the licence of a base as the Hub names it: Gemma's, or what its model card says; None if it says none."""
    return _licence(base).get("license")


def _licence(base: Base) -> dict[str, Any]:
    """Return the metadata of the base's card that are about its licence."""
    from huggingface_hub import ModelCard

    path = base.folder / CARD
    if base.is_gemma or not path.is_file():
        return {"license": "gemma"} if base.is_gemma else {}
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # a card from outside, in YAML
        raise SempaError(f"{path}, the base's card, cannot be read: {first_line(error)}. Fix or remove it.") from error
    return {key: data[key] for key in ("license", "license_name", "license_link") if isinstance(data.get(key), str)}


def _metadata(model: ModelFolder, name: str, base: Base, record: dict[str, Any] | None) -> Any:
    from huggingface_hub import ModelCardData

    data = (record or {}).get("data", {}).get("source", "")
    relation = "adapter" if model.is_adapter else "finetune"
    base_id = hub_id(base)
    return ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        language="en",
        base_model=base_id,
        base_model_relation=relation if base_id and record else None,
        datasets=[data] if data.count("/") == 1 and not Path(data).suffix else None,
        tags=[
            "sentence-transformers",
            "sentence-similarity",
            "sentence-embeddings",
            "feature-extraction",
            "text-generation",
            *(["lora", "peft"] if model.is_adapter else []),
            *(["sempa", *_tags(record)] if record else []),
        ],
        widget=[_WIDGET],
        model_name=name.rpartition("/")[2],
        eval_results=list(_results(record)) if record else None,
        **_licence(base),
    )


def _results(record: dict[str, Any]) -> Iterator[Any]:
    """Yield huggingface_hub's ``EvalResult`` of every score on an STS set that the record has of this very model."""
    if record.get("scale"):
        return  # the scores are those of the update that was scaled
    best = next((score for score in record["dev"]["scores"] if score.get("step") == record.get("best_step")), None)
    if best and best["spearman"] is not None and not record.get("averaged"):
        is_stsb = record["dev"]["source"] == "stsb"
        name = "STSBenchmark" if is_stsb else portable_name(record["dev"]["source"])
        yield _spearman(name, "validation" if is_stsb else None, best["spearman"])
    for result in record.get("results") or []:
        own = [row for row in result["rows"] if str(row[0]).startswith("`")]  # the other rows are of other models
        if own and result["title"].startswith("Spearman x 100"):
            senteval = "SentEval" in result["title"]
            for column, value in zip(result["columns"], own[-1], strict=True):
                if column in _COLUMNS:
                    yield _spearman(_COLUMNS[column], "test", float(value), senteval=senteval)


def _spearman(task: str, split: str | None, value: float, *, senteval: bool = False) -> Any:
    """Return a result under the names that sentence-transformers gives them; ``value`` is times 100."""
    from huggingface_hub import EvalResult

    note = " (test rows, as SentEval scores it)" if senteval and task == "SICK-R" else ""
    return EvalResult(
        task_type="semantic-similarity",
        task_name="Semantic Similarity",
        dataset_type=MTEB_DATASETS.get(task, "unknown"),
        dataset_name=task + note,
        dataset_split=split,
        metric_type="spearman_cosine",
        metric_name="Spearman Cosine",
        metric_value=round(value / 100, 4),
    )
