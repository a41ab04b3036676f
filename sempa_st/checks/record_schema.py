"""Schema of the run record ``sempa_run.json``, and the base class of all schemas."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, StringConstraints

_OBJECTIVE = r"^[a-z-]{1,32}(:[0-9.e+-]{1,32})?( ?, ?[a-z-]{1,32}(:[0-9.e+-]{1,32})?){0,7}$"
"""A weighted sum of objectives, such as ``dpo:0.3,contrastive:1``. Later versions may add names."""
_Objective = Annotated[str, StringConstraints(pattern=_OBJECTIVE)]


def _check_moment(value: str) -> str:
    datetime.fromisoformat(value)  # a ValueError, which pydantic words
    return value


class Settings(BaseModel):
    """Base class of the schemas: strict types, and unknown keys are allowed."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class _Data(Settings):
    source: str
    triplets: NonNegativeInt
    sha256: str


class _Score(Settings):
    samples: NonNegativeInt
    spearman: float | None


class _Dev(Settings):
    source: str
    pairs: NonNegativeInt
    scores: list[_Score]


class _Run(Settings):
    objective: _Objective


class _Averaged(Settings):
    model: str
    objectives: list[_Run] | None = None


class _Start(Settings):
    model: str
    sha256: str


class _Table(Settings):
    title: str
    columns: list[Any]
    rows: list[list[Any]]


class RunRecord(Settings):
    """Content of ``sempa_run.json``."""

    objective: _Objective
    base: str | None = None
    command: str | None = None
    created: Annotated[str, AfterValidator(_check_moment)] | None = None
    config: dict[str, Any]
    data: _Data
    dev: _Dev
    started_from: _Start | None = None
    left_out: list[str] | None = None
    scale: Annotated[FiniteFloat, Field(gt=0)] | None = None
    averaged: list[_Averaged] | None = None
    results: list[_Table] | None = None
