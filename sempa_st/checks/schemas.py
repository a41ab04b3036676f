"""What the settings files of a model folder may say: of each the keys that are read here, and their types.

Other keys are let through: other versions of the libraries write them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import InitErrorDetails

from sempa_st.checks.patterns import check_pattern
from sempa_st.utils.names import is_plain_path

_MOST_PARTS = 1024
"""Layers, or experts of a layer, that a decoder may have: several times those of the largest ones."""
_COUNTS_PARTS = re.compile(r"(layers?|experts)$")
_HIGHEST_RANK = 4096
_MOST_PATTERNS = 256
_OBJECTIVE = r"^[a-z-]{1,32}(:[0-9.e+-]{1,32})?( ?, ?[a-z-]{1,32}(:[0-9.e+-]{1,32})?){0,7}$"
"""A weighted sum of objectives, of this version or a later one."""
"""Expressions of one setting: PEFT matches each against every layer's name."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


def _none_there(value: Any) -> Any:
    if value:
        raise ValueError("nothing: what this asks for is not supported")
    return value


def _filled(value: Any) -> Any:
    if not value:
        raise ValueError("at least one entry")
    return value


def _inside(name: str) -> str:
    if not is_plain_path(name):
        raise ValueError("a name inside the folder")
    return name


def _safetensors(name: str) -> str:
    if not name.endswith(".safetensors"):
        raise ValueError("a .safetensors file: pickled weights are never loaded")
    return _inside(name)


def _suffix_pattern(text: str) -> str:
    """Check an expression before which PEFT puts a repeat of its own."""
    return check_pattern(text, most_repeats=1)


def _pattern_or_names(value: Any) -> Any:
    """Check one regular expression, or a list of plain names."""
    if value is not None and not isinstance(value, str) and not _all_of(value, str):
        raise ValueError("a list of names, or a regular expression")
    return check_pattern(value) if isinstance(value, str) else value


def _numbers(value: Any) -> Any:
    numbers = [value] if isinstance(value, int) else value
    if value is not None and not (_all_of(numbers, int) and all(number >= 0 for number in numbers)):
        raise ValueError("a number of a layer, or a list of such")
    return value


def _tokens(value: Any) -> Any:
    lists = value.values() if isinstance(value, dict) else [value]
    if value is not None and not all(_all_of(numbers, int) and numbers for numbers in lists):
        raise ValueError("a list of numbers of tokens, or such lists by layer")
    return value


def _names(value: Any) -> Any:
    if value is not None and not isinstance(value, str) and not _all_of(value, str):
        raise ValueError("a name, or a list of names")
    return value


def _templates(value: Any) -> Any:
    """Check chat templates: the text of the only one, a table by name, or a list of names and texts."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        pairs = [(item.get("name"), item.get("template")) for item in value]
    elif isinstance(value, dict):
        pairs = list(value.items())
    else:
        raise ValueError("a text, or texts by name")
    for name, text in pairs:
        if not isinstance(name, str) or not isinstance(text, str) or not is_plain_path(name) or "/" in name:
            raise ValueError(f"plain names and texts, and not {name!r:.80}")
    return value


def _all_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


_Unsupported = Annotated[Any, AfterValidator(_none_there)]
_Path = Annotated[str, AfterValidator(_inside)]
_WeightFile = Annotated[str, AfterValidator(_safetensors)]
_PatternOrNames = Annotated[Any, AfterValidator(_pattern_or_names)]
_Suffix = Annotated[str, AfterValidator(_suffix_pattern)]
_Few = Field(max_length=_MOST_PATTERNS)
_Suffixes = Annotated[list[_Suffix], _Few]
_Rank = Annotated[int, Field(ge=1, le=_HIGHEST_RANK)]


class _Module(_Settings):
    type: str
    path: _Path


class _TemplateName(_Settings):
    chat_template: str | None = None


class _Processing(_Settings):
    chat_template: _TemplateName | None = None


class _TransformerModule(_Settings):
    max_seq_length: PositiveInt | None = None
    processing_kwargs: _Processing | None = None


class _SentenceTransformer(_Settings):
    prompts: dict[str, str] | None = None
    default_prompt_name: str | None = None
    similarity_fn_name: Literal["cosine", "dot", "euclidean", "manhattan"] | None = None
    truncate_dim: PositiveInt | None = None

    @field_validator("default_prompt_name")
    @classmethod
    def _names_a_prompt(cls, name: str | None, others: ValidationInfo) -> str | None:
        # The prompts stand before it, and are not there if they are at fault themselves.
        if name is not None and "prompts" in others.data and name not in (others.data["prompts"] or {}):
            raise ValueError("one of the prompts")
        return name


class _Pooling(_Settings):
    pooling_mode: Annotated[Any, AfterValidator(_names)] = None
    embedding_dimension: PositiveInt | None = None
    word_embedding_dimension: PositiveInt | None = None


class _Adapter(_Settings):
    peft_type: str
    base_model_name_or_path: str | None = None
    r: _Rank = 8
    lora_alpha: FiniteFloat = 8
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0
    target_modules: _PatternOrNames = None
    exclude_modules: _PatternOrNames = None
    modules_to_save: _Suffixes | None = None
    target_parameters: list[str] | None = None
    layers_to_transform: Annotated[Any, AfterValidator(_numbers)] = None
    layers_pattern: _Suffix | _Suffixes | None = None
    rank_pattern: Annotated[dict[_Suffix, _Rank], _Few] | None = None
    alpha_pattern: Annotated[dict[_Suffix, FiniteFloat], _Few] | None = None
    trainable_token_indices: Annotated[Any, AfterValidator(_tokens)] = None
    alora_invocation_tokens: list[NonNegativeInt] | None = None
    init_lora_weights: bool | Annotated[str, Field(max_length=14)] | None = True  # of pissa_niter_N two digits
    use_dora: bool | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    layer_replication: _Unsupported = None
    megatron_config: _Unsupported = None
    bias: Literal["none", "all", "lora_only"] = "none"


def _few_parts(settings: Any) -> Any:
    for where, value in _counts(settings):
        if value > _MOST_PARTS:
            faults: list[InitErrorDetails] = [
                {"type": "less_than_equal", "loc": where, "input": value, "ctx": {"le": _MOST_PARTS}}
            ]
            raise ValidationError.from_exception_data("config", faults)
    return settings


def _counts(settings: Any) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the numbers of layers and experts in a ``config.json``, each after the keys that lead to it."""
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if isinstance(value, dict):
            yield from (((name, *where), count) for where, count in _counts(value))
        elif isinstance(value, int) and _COUNTS_PARTS.search(name):
            yield (name,), value


class _Config(_Settings):
    model_type: str | None = None
    architectures: list[str] | None = None
    is_encoder_decoder: bool | None = None
    vocab_size: PositiveInt | None = None
    auto_map: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None
    transformers_weights: _Unsupported = None


class _WeightIndex(_Settings):
    weight_map: Annotated[dict[str, _WeightFile], AfterValidator(_filled)]


class _TokenizerConfig(_Settings):
    tokenizer_class: str | None = None
    backend: str | None = None
    chat_template: Annotated[Any, AfterValidator(_templates)] = None
    fast_tokenizer_files: list[_Path] | None = None
    init_inputs: _Unsupported = None


class _Data(_Settings):
    source: str
    triplets: NonNegativeInt
    sha256: str


class _Score(_Settings):
    samples: NonNegativeInt
    spearman: float | None


class _Dev(_Settings):
    source: str
    pairs: NonNegativeInt
    scores: list[_Score]


class _Averaged(_Settings):
    model: str


class _Table(_Settings):
    title: str
    columns: list[Any]
    rows: list[list[Any]]


class _Record(_Settings):
    objective: Annotated[str, StringConstraints(pattern=_OBJECTIVE)]
    base: str | None = None
    command: str | None = None
    config: dict[str, Any]
    data: _Data
    dev: _Dev
    scale: Annotated[FiniteFloat, Field(gt=0)] | None = None
    averaged: list[_Averaged] | None = None
    results: list[_Table] | None = None


_OF_A_MODEL = re.compile(r" or instance of \w+")
_OBJECT: Any = dict[str, Any]
_SCHEMAS: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(kind)
    for name, kind in {
        "modules.json": Annotated[list[_Module], AfterValidator(_filled)],
        "sentence_bert_config.json": _TransformerModule,
        "config_sentence_transformers.json": _SentenceTransformer,
        "1_Pooling/config.json": _Pooling,
        "adapter_config.json": _Adapter,
        "config.json": Annotated[_Config, BeforeValidator(_few_parts)],
        "generation_config.json": _OBJECT,
        "tokenizer_config.json": _TokenizerConfig,
        "special_tokens_map.json": _OBJECT,
        "added_tokens.json": _OBJECT,
        "model.safetensors.index.json": _WeightIndex,
        "sempa_run.json": _Record,
    }.items()
}
SETTINGS_FILES = tuple(_SCHEMAS)
"""The files that have a schema, by their names inside a model folder."""


def first_fault(name: str, content: Any) -> tuple[str, Any, str] | None:
    """Return where a settings file departs from its schema, what was found there and what was expected, or None.

    Args:
        name: One of :data:`SETTINGS_FILES`.
        content: Content of the file.
    """
    try:
        _SCHEMAS[name].validate_python(content)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        message = _OF_A_MODEL.sub("", fault["msg"].removeprefix("Value error, ").removeprefix("Input should be "))
        return ".".join(map(str, fault["loc"])), fault["input"], message
    return None
