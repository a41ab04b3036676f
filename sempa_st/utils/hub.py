"""The only door to the Hugging Face Hub: model folders and data sets, with errors that a person can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sempa_st.errors import SempaError
from sempa_st.utils.extras import require

# Weights as safetensors only: pickled weights can run code when they are loaded.
_IGNORED_FILES = ["original/*", "onnx/*", "openvino/*", "consolidated*"]  # other forms of the same weights
_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.md", "*.html", "NOTICE*"]


def model_folder(name: str) -> Path:
    """Return the local folder of a model, unchecked: ``name`` itself, or a cached copy of the Hub repository.

    Raises:
        SempaError: If it is neither a folder nor a repository that can be reached or is cached.
    """
    return Path(name) if Path(name).is_dir() else _snapshot(name)


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    unknown = f"Unknown model {name!r}: it is no folder here"
    try:
        return Path(snapshot_download(name, allow_patterns=_MODEL_FILES, ignore_patterns=_IGNORED_FILES))
    except HFValidationError as error:
        raise SempaError(f"{unknown} and no valid Hub id. Check the path.") from error
    except RepositoryNotFoundError as error:
        raise SempaError(
            f"{unknown} and no repository of that name on the Hub that you may read. Check the name, or log in with "
            "`hf auth login` and accept the model's terms."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise SempaError(
            f"{unknown}, and the Hub cannot be reached or gives no access, and nothing is cached "
            f"({type(error).__name__}). Check the name and the network, or give a local folder."
        ) from error


def hub_rows(dataset: str, /, *, split: str, **arguments: Any) -> list[dict[str, Any]]:
    """Return the rows of one split of a Hub data set.

    Raises:
        SempaError: If it does not exist or cannot be reached, or if ``datasets`` is not installed.
    """
    require("datasets", extra="train", purpose=f"Reading {dataset} from the Hub")
    from datasets import load_dataset

    if Path(arguments.get("data_files", "")).suffix == ".csv":
        arguments["keep_default_na"] = False  # sentences such as "None" are text
    try:
        rows = load_dataset(dataset, split=split, **arguments).to_list()
    except Exception as error:  # datasets raises many unrelated types for one cause: it cannot be had
        raise SempaError(
            f"The data set {dataset!r} cannot be loaded from the Hub: {type(error).__name__}: {_first_line(error)}. "
            "Check the name and the network, or give a local csv, jsonl or parquet file."
        ) from error
    assert isinstance(rows, list)
    return rows


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no details"])[0]
