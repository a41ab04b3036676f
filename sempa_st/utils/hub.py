"""Access to the Hugging Face Hub: model folders and datasets."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sempa_st.errors import SempaError, first_line
from sempa_st.utils.extras import require

_IGNORED_FILES = ["original/*", "onnx/*", "openvino/*", "consolidated*"]  # the same weights in other formats
_LICENCE_FILES = ["NOTICE*", "LICEN[CS]E*", "COPYING*", "USE_POLICY*"]
# Weights in safetensors only: loading pickled weights can run code.
_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.md", "*.html", *_LICENCE_FILES]


@dataclass(frozen=True)
class HubAccess:
    """How models are downloaded.

    Args:
        token: Token of a user of the Hub, True for that of ``hf auth login``, False for none; the client's choice
            when None.
        cache_folder: Folder for copies of repositories; the client's own when None.
    """

    token: str | bool | None = None
    cache_folder: str | None = None


_BY_DEFAULT = HubAccess()
_ACCESS: ContextVar[HubAccess] = ContextVar("hub_access", default=_BY_DEFAULT)


@contextmanager
def hub_access(token: str | bool | None, cache_folder: str | Path | None) -> Iterator[None]:
    """Download models within the block, in this thread, as :class:`HubAccess` says: a model, and the bases below it."""
    before = _ACCESS.set(HubAccess(token, None if cache_folder is None else str(cache_folder)))
    try:
        yield
    finally:
        _ACCESS.reset(before)


def current_access() -> HubAccess:
    """Return how models are downloaded here, for libraries that download by themselves."""
    return _ACCESS.get()


def model_folder(name: str, *, weights: bool = True, revision: str | None = None) -> Path:
    """Return the local folder of a model, unchecked: ``name`` itself, or a cached copy of the Hub repository.

    Args:
        name: Local folder or Hub id.
        weights: Whether to download the weights as well.
        revision: Branch, tag or commit of the repository; the newest commit when None.

    Raises:
        SempaError: If ``name`` is neither a local folder nor a repository that is reachable or cached, or a local
            folder is given with a revision.
    """
    if Path(name).is_dir():
        check_no_revision(name, revision)
        return Path(name)
    from huggingface_hub import snapshot_download

    ignored = _IGNORED_FILES + ([] if weights else ["*.safetensors"])
    with _explained(f"Unknown model {name!r}: it is not a local folder"):
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=_ACCESS.get().token,
                cache_dir=_ACCESS.get().cache_folder,
                allow_patterns=_MODEL_FILES,
                ignore_patterns=ignored,
            )
        )


def check_no_revision(name: str, revision: str | None) -> None:
    """Raise :class:`SempaError` if a revision is given for a model that is not on the Hub."""
    if revision is not None:
        raise SempaError(f"The revision {revision!r} is of a repository of the Hub, and {name} is none. Leave it out.")


def download(name: str, folder: Path, *, revision: str | None = None) -> str:
    """Download a model of the Hub into a folder, its code files included, and return the commit that it is of.

    Args:
        name: Hub id.
        folder: Folder to write to.
        revision: Branch, tag or commit; the newest commit when None.

    Raises:
        SempaError: If the repository or revision does not exist or cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download

    with _explained(f"{name} cannot be fetched"):
        commit = str(HfApi().model_info(name, revision=revision).sha)
        patterns = [*_MODEL_FILES, "*.py"]
        snapshot_download(
            name, revision=commit, local_dir=folder, allow_patterns=patterns, ignore_patterns=_IGNORED_FILES
        )
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes on the download
    return commit


def _transport_faults() -> tuple[type[Exception], ...]:
    """Return OSError and the base of all that the client's HTTP library raises, which library that may be."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(each for each in HfHubHTTPError.__bases__ if issubclass(each, Exception))


@contextmanager
def _explained(unknown: str) -> Iterator[None]:
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise SempaError(f"{unknown} and not a valid Hub id. Check the path.") from error
    except RepositoryNotFoundError as error:
        raise SempaError(
            f"{unknown}, and the Hub has no repository of that name that you can access. Check the name, or log in "
            "with `hf auth login` (or pass a token) and accept the model's terms."
        ) from error
    except RevisionNotFoundError as error:
        raise SempaError(
            f"{unknown}, since the repository has no such revision. Check the branch or commit."
        ) from error
    except _transport_faults() as error:
        raise SempaError(
            f"{unknown}, it is not cached, and the Hub cannot be reached or denies access ({type(error).__name__}). "
            "Check the name and the network, or pass a local folder."
        ) from error


def hub_rows(dataset: str, /, *, split: str, **arguments: Any) -> list[dict[str, Any]]:
    """Return the rows of one split of a Hub dataset.

    Raises:
        SempaError: If the dataset does not exist or cannot be reached, or if ``datasets`` is not installed.
    """
    require("datasets", extra="train", purpose=f"Reading {dataset} from the Hub")
    from datasets import load_dataset

    if Path(arguments.get("data_files", "")).suffix == ".csv":
        arguments["keep_default_na"] = False  # a sentence such as "None" is text, not a missing value
    try:
        return load_dataset(dataset, split=split, **arguments).to_list()
    except Exception as error:  # datasets raises many unrelated types
        raise SempaError(
            f"The dataset {dataset!r} cannot be loaded from the Hub: {type(error).__name__}: {first_line(error)}. "
            "Check the name and the network, or pass a local csv, jsonl or parquet file."
        ) from error
