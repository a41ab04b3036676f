"""Save a loaded model as the folder it came from: its format, card, licence files and base, with what has changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.errors import SempaError
from sempa_st.folder.card import hub_id, licence_of, write_card
from sempa_st.folder.copying import write_record
from sempa_st.folder.formats import RUN_RECORD, ST_CONFIG
from sempa_st.folder.layout import ModelFolder
from sempa_st.folder.resolve import Source
from sempa_st.folder.write import copy_files, licence_files, set_base_reference, write_embedding_files, write_notices
from sempa_st.forward.sentence_transformers import normalizes, reads_prompt_eol
from sempa_st.model.adapter_kinds import check_native, rewrite_tensors, write_native_settings
from sempa_st.model.base_model import Base
from sempa_st.model.embedded import EMBEDDED_BASES
from sempa_st.model.peft_models import ADAPTER_CONFIG, ADAPTER_WEIGHTS, full_names, is_peft_model
from sempa_st.model.prompt_eol import SOURCES, PromptEOL, save_model
from sempa_st.utils.files import filled_folder, read_json, write_json, write_text

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_REPLACED = ("config.json", "generation_config.json", "adapter_*", "model*.safetensors*", RUN_RECORD, *SOURCES)
"""Files of a model that was saved to the same folder before, which would be read beside the new one's."""


@dataclass(frozen=True)
class FolderSaver:
    """How ``save_pretrained`` and ``push_to_hub`` of a model that :func:`sempa_st.load` read with our module save it.

    Args:
        source: Where it was loaded from.
        base: Base of its adapter, or that a whole model was derived from.
        reference: Name of the base in the adapter's settings; that which this machine's readers find when None.
    """

    source: Source
    base: Base
    reference: str | None = None

    def for_hub(self, model: SentenceTransformer) -> FolderSaver:
        """Return a saver whose folders name a base that other machines find.

        Raises:
            SempaError: If the base of the model's adapter is a local folder.
        """
        name = self.base.name
        if is_peft_model(model[0].model) and name not in EMBEDDED_BASES and not hub_id(self.base):
            raise SempaError(
                f"The adapter's base {name} is a folder that nobody else has. Push a merged copy (sempa copy "
                "FOLDER DIR --merge), or load the model with base=HUB_ID."
            )
        return replace(self, reference=name)

    def __call__(self, model: SentenceTransformer, path: str | Path, *, name: str, card: bool) -> bool:
        """Write a model into a folder, whose other files stay.

        The run record and the card are those of the source while the weights are; those of a changed model are
        sentence-transformers' card, and no record.

        Args:
            model: The model as it is now.
            path: Folder to write to.
            name: Name of the model in its card.
            card: Write the card.

        Returns:
            False, and nothing is written, if the model has modules that a folder of this package has no place for.

        Raises:
            SempaError: If the weights are in int8, or the folder cannot be written.
        """
        if not reads_prompt_eol(model):
            return False
        module: Any = model[0]
        with filled_folder(path, _REPLACED) as folder:
            unchanged = self._write_weights(module, folder)
            copy_files(self.source.folder.path, folder, [ST_CONFIG, *licence_files(self.source.folder.path)])
            write_embedding_files(
                folder,
                module.tokenizer,
                template=module.template,
                max_seq_length=module.max_seq_length,
                config=module.causal_lm.config,
                format=self._prepare_adapter(folder),
                normalize=normalizes(model),
            )
            _write_settings(model, folder)
            record = write_record(self.source.folder.record if unchanged else None, self.base, folder)
            if card and unchanged:
                write_card(folder, name, self.base, record)
            elif card:
                write_text(folder / "README.md", _changed_card(model, name, self.base))
            write_notices(self.base, folder)
        return True

    def _write_weights(self, module: PromptEOL, folder: Path) -> bool:
        """Write a model's weights, and return whether they are those of its source, which then are copied as they are.

        A copy keeps the type that the source has on disk, in whatever type it was loaded.
        """
        unchanged = _holds_weights_of(module.model, self.source.folder)
        if unchanged:
            copy_files(self.source.folder.path, folder, self.source.folder.model_files)
        else:
            save_model(module.model, folder)
        return unchanged

    def _prepare_adapter(self, folder: Path) -> str:
        """Make the settings of the adapter in a folder, if there is one, fit its base; return the folder's format."""
        format = self.source.folder.format or "native"
        if not (folder / ADAPTER_CONFIG).is_file():
            return format
        rewrite_tensors(self.base, folder, 1.0)
        if ModelFolder(folder).is_activated:
            format = "custom"
        elif format == "native":
            write_native_settings(self.base, folder)
            try:
                check_native(self.base, self.source.name, folder)
            except SempaError:  # an adapter that was added after loading
                format = "custom"
        set_base_reference(folder, self.reference or self.base.reference)
        return format


def _holds_weights_of(model: Any, folder: ModelFolder) -> bool:
    """Whether a model holds exactly the weights in a folder, in its own type."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open
    from safetensors.torch import load_file

    if is_peft_model(model) != folder.is_adapter:
        return False
    if folder.is_adapter:
        live = get_peft_model_state_dict(model, save_embedding_layers=False)
        saved = load_file(folder.path / ADAPTER_WEIGHTS)
        tensors = full_names(saved, live, model.get_base_model().base_model_prefix)
        return live.keys() <= tensors.keys() and all(_equal(live[name], tensors[name]) for name in live)
    live = model.state_dict()
    paths = [folder.path / name for name in folder.weight_files if name.endswith(".safetensors")]
    for path in filter(Path.is_file, paths):
        with safe_open(path, "pt") as file:
            # Without the other tensors in memory. What only the model has, is tied to what both have.
            if not all(name in live and _equal(live[name], file.get_tensor(name)) for name in file.keys()):  # noqa: SIM118
                return False
    return True


def _equal(live: Any, saved: Any) -> bool:
    return live.shape == saved.shape and bool((live.cpu() == saved.to(live.dtype)).all())


def _write_settings(model: SentenceTransformer, folder: Path) -> None:
    """Write what a user may set on a loaded model: prompts, the default one, similarity and width of the vectors."""
    settings = read_json(folder / ST_CONFIG)
    settings |= {
        "prompts": {name: prompt or "" for name, prompt in model.prompts.items()},
        "default_prompt_name": model.default_prompt_name,
        "similarity_fn_name": model.similarity_fn_name,
        "truncate_dim": model.truncate_dim,
    }
    write_json(folder / ST_CONFIG, {name: value for name, value in settings.items() if name != "truncate_dim" or value})


def _changed_card(model: SentenceTransformer, name: str, base: Base) -> str:
    """Return sentence-transformers' card, which tells of the training that its trainer did, with licence and base."""
    from sentence_transformers.base.model_card import generate_model_card

    data = model.model_card_data
    data.base_model = hub_id(base)
    data.license = data.license or licence_of(base)
    return str(generate_model_card(model)).replace(str(data.model_name), name)
