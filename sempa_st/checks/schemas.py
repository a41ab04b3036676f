"""Schemas of the settings files in a model folder: the keys that are used, and their types.

Unknown keys are allowed, since other versions of the libraries write them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import InitErrorDetails

from sempa_st.checks.patterns import check_pattern
from sempa_st.checks.record_schema import RunRecord, Settings
from sempa_st.utils.names import is_plain_path

_MAX_COUNT = 1024
"""Maximum number of layers, or of experts in a layer: several times that of the largest models."""
_MAX_LABELS = 1 << 20
"""Maximum number of labels of a classifier: transformers makes a name for each, though a decoder has none."""
_MAX_POSITIONS = {
    # A mask of all pairs, StarCoder's of this size.
    **dict.fromkeys(("gpt_bigcode", "gpt_neo", "openai-gpt"), 1 << 13),
    # A table.
    **dict.fromkeys(("codegen", "ctrl", "gptj", "mpt", "xglm"), 1 << 18),
}
"""Maximum number of positions by type, of models that allocate what no file of weights holds."""
_POSITIONS = {"max_position_embeddings", "max_seq_len", "n_positions"}
_COUNT_KEY = re.compile(r"(layers?|experts|num_labels)$")
_MAX_RANK = 4096
_MAX_ALPHA = 1 << 31
"""Maximum scale of an adapter's update, before it is divided by the rank: products in float32 hold it."""
_MAX_PATH, _MAX_PART = 4096, 255
"""Maximum length of a path in characters and of one of its parts in bytes, as of Linux's file systems."""
_MAX_PATTERNS = 256
"""Maximum number of expressions in one setting; PEFT matches each against the name of every layer."""


def _unsupported(value: Any) -> Any:
    if value:
        raise ValueError("no value: this setting is not supported")
    return value


def _relative_path(name: str) -> str:
    if not is_plain_path(name):
        raise ValueError("a name inside the folder")
    return name


def _safetensors(name: str) -> str:
    if not name.endswith(".safetensors"):
        raise ValueError("a .safetensors file: pickled weights are never loaded")
    return _relative_path(name)


def _plain_name(name: str) -> str:
    if not is_plain_path(name) or "/" in name:
        raise ValueError("a plain name")
    return name


def _reference(name: str) -> str:
    odd = any(ord(character) < ord(" ") for character in name)
    if odd or len(name) > _MAX_PATH or any(len(part.encode()) > _MAX_PART for part in name.split("/")):
        raise ValueError(f"a name or path without control characters, of at most {_MAX_PART} bytes a part")
    return name


_Unsupported = Annotated[Any, AfterValidator(_unsupported)]
_Path = Annotated[str, AfterValidator(_relative_path)]
_WeightFile = Annotated[str, AfterValidator(_safetensors)]
_Name = Annotated[str, AfterValidator(_plain_name)]
_PatternOrNames = Annotated[str, AfterValidator(check_pattern)] | list[str]
# PEFT prefixes these with a quantifier (``.*``) of its own.
_Suffix = Annotated[str, AfterValidator(partial(check_pattern, max_repeats=1))]
_TokenIds = Annotated[list[int], Field(min_length=1)]
_Few = Field(max_length=_MAX_PATTERNS)
_Suffixes = Annotated[list[_Suffix], _Few]
_Rank = Annotated[int, Field(ge=1, le=_MAX_RANK)]
_Alpha = Annotated[float, Field(ge=-_MAX_ALPHA, le=_MAX_ALPHA)]


class _Module(Settings):
    type: str
    path: _Path


class _TemplateName(Settings):
    chat_template: str | None = None


class _Processing(Settings):
    chat_template: _TemplateName | None = None


class _TransformerModule(Settings):
    max_seq_length: PositiveInt | None = None
    processing_kwargs: _Processing | None = None


class _SentenceTransformer(Settings):
    prompts: dict[str, str] | None = None
    default_prompt_name: str | None = None
    similarity_fn_name: Literal["cosine", "dot", "euclidean", "manhattan"] | None = None
    truncate_dim: PositiveInt | None = None

    @field_validator("default_prompt_name")
    @classmethod
    def _names_a_prompt(cls, name: str | None, others: ValidationInfo) -> str | None:
        # Fields are validated in order; prompts is missing here if it is invalid itself.
        if name is not None and "prompts" in others.data and name not in (others.data["prompts"] or {}):
            raise ValueError("one of the prompts")
        return name


class _Pooling(Settings):
    pooling_mode: str | list[str] | None = None
    embedding_dimension: PositiveInt | None = None
    word_embedding_dimension: PositiveInt | None = None


class _Normalize(Settings):
    module_input_name: str | None = None
    module_output_name: str | None = None


class _Adapter(Settings):
    peft_type: str
    base_model_name_or_path: Annotated[str, AfterValidator(_reference)] | None = None
    r: _Rank = 8
    lora_alpha: _Alpha = 8
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0
    target_modules: _PatternOrNames | None = None
    exclude_modules: _PatternOrNames | None = None
    modules_to_save: _Suffixes | None = None
    target_parameters: list[str] | None = None
    layers_to_transform: NonNegativeInt | list[NonNegativeInt] | None = None
    layers_pattern: _Suffix | _Suffixes | None = None
    rank_pattern: Annotated[dict[_Suffix, _Rank], _Few] | None = None
    alpha_pattern: Annotated[dict[_Suffix, _Alpha], _Few] | None = None
    trainable_token_indices: _TokenIds | dict[str, _TokenIds] | None = None
    alora_invocation_tokens: list[NonNegativeInt] | None = None
    init_lora_weights: bool | Annotated[str, Field(max_length=14)] | None = (
        True  # pissa_niter_N with two digits at most
    )
    use_dora: bool | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    layer_replication: _Unsupported = None
    megatron_config: _Unsupported = None
    bias: Literal["none", "all", "lora_only"] = "none"


def _bounded_counts(settings: Any) -> Any:
    for keys, count, limit in _counts(settings):
        if count > limit:
            errors: list[InitErrorDetails] = [
                {"type": "less_than_equal", "loc": keys, "input": count, "ctx": {"le": limit}}
            ]
            raise ValidationError.from_exception_data("config", errors)
    return settings


def _counts(settings: Any) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """Yield the numbers in a ``config.json`` that memory grows with, each with its path of keys and its maximum."""
    if not isinstance(settings, dict):
        return
    positions = _MAX_POSITIONS.get(str(settings.get("model_type")))
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from (((name, *keys), count, limit) for keys, count, limit in _counts(value))
        elif isinstance(value, int) and _COUNT_KEY.search(name):
            yield (name,), value, _MAX_LABELS if name == "num_labels" else _MAX_COUNT
        elif isinstance(value, int) and positions and name in _POSITIONS:
            yield (name,), value, positions


class _Config(Settings):
    model_type: str | None = None
    architectures: list[str] | None = None
    is_encoder_decoder: bool | None = None
    return_dict: Literal[True] | None = None
    vocab_size: PositiveInt | None = None
    auto_map: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None
    transformers_weights: _Unsupported = None


class _WeightIndex(Settings):
    weight_map: Annotated[dict[str, _WeightFile], Field(min_length=1)]


class _NamedTemplate(Settings):
    name: _Name
    template: str


class _TokenizerConfig(Settings):
    tokenizer_class: str | None = None
    backend: str | None = None
    chat_template: str | dict[_Name, str] | list[_NamedTemplate] | None = None
    fast_tokenizer_files: list[_Path] | None = None
    init_inputs: _Unsupported = None


_NOISE = re.compile(
    r"^(Input should be|Value error,|(List|Dictionary) should have) | or instance of \w+| after validation, not \d+"
)
"""Parts of pydantic's messages that do not belong to the expectation, or name a schema class."""
_UNION_MEMBER = re.compile(r"str|int|bool|constrained-int|(list|dict|function-after)\[.*")
"""What pydantic puts among the keys for a member of a union of types."""
_OBJECT: Any = dict[str, Any]
_SCHEMAS: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(kind)
    for name, kind in {
        "modules.json": Annotated[list[_Module], Field(min_length=1)],
        "sentence_bert_config.json": _TransformerModule,
        "config_sentence_transformers.json": _SentenceTransformer,
        "1_Pooling/config.json": _Pooling,
        "1_Normalize/config.json": _Normalize,
        "2_Normalize/config.json": _Normalize,
        "adapter_config.json": _Adapter,
        "config.json": Annotated[_Config, BeforeValidator(_bounded_counts)],
        "generation_config.json": _OBJECT,
        "tokenizer_config.json": _TokenizerConfig,
        "special_tokens_map.json": _OBJECT,
        "added_tokens.json": _OBJECT,
        "model.safetensors.index.json": _WeightIndex,
        "sempa_run.json": RunRecord,
    }.items()
}
SETTINGS_FILES = tuple(_SCHEMAS)
"""Paths of the files that have a schema, relative to the model folder."""


def first_mismatch(name: str, content: Any) -> tuple[str, Any, str] | None:
    """Return a violation of a file's schema as (dotted key, value, expectation), or None if it is valid.

    Args:
        name: One of :data:`SETTINGS_FILES`.
        content: Content of the file.
    """
    try:
        _SCHEMAS[name].validate_python(content)
    except ValidationError as error:
        # Of the members of a union, the one that fits best fails last.
        found = max(error.errors(include_url=False), key=lambda fault: len(fault["loc"]))
        keys = [str(part) for part in found["loc"] if not _UNION_MEMBER.fullmatch(str(part))]
        return ".".join(keys), found["input"], _NOISE.sub("", found["msg"])
    return None
