"""The two formats of a model folder: the names of its files and the types of its modules."""

from __future__ import annotations

from sempa_st.errors import check_known
from sempa_st.model.prompt_eol import PromptEOL

FORMATS = ("native", "custom")
"""``native``: built-in modules only, opens with no flag. ``custom``: our module, opens with trust_remote_code=True."""
RUN_RECORD = "sempa_run.json"
MODULES = "modules.json"
SETTINGS = PromptEOL.config_file_name
ST_CONFIG = "config_sentence_transformers.json"
POOLING = "1_Pooling"
POOLING_CONFIG = f"{POOLING}/config.json"
ACTIVATED_MODEL_TYPE = (
    "activated adapter: embed with sempa_st.load or SentenceTransformer(..., trust_remote_code=True), generate with "
    "peft.AutoPeftModelForCausalLM"
)
"""Model type of a folder with an activated adapter, which transformers' Auto classes would load and never apply."""
CUSTOM_TYPES = ("prompt_eol.PromptEOL", "sempa_st.model.prompt_eol.PromptEOL", "sempa_st.prompt_eol.PromptEOL")
"""Types of our module in modules.json: as this package writes it into a ``custom`` folder, as
``SentenceTransformer.save_pretrained`` writes it, and as ``save_pretrained`` of version 0.1.0 wrote it."""
TRANSFORMER_TYPE = "sentence_transformers.base.modules.transformer.Transformer"
POOLING_TYPE = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
NORMALIZE_TYPE = "sentence_transformers.base.modules.normalize.Normalize"
"""Type of the last module, which divides vectors by their norm; folders of earlier versions have none."""
NORMALIZE = ("1_Normalize", "2_Normalize")
"""Folder of its settings, in the formats ``custom`` and ``native``."""


def check_format(format: str) -> None:
    """Raise :class:`SempaError` unless ``format`` is one of :data:`FORMATS`."""
    check_known(format, FORMATS, "folder format")
