"""Access to the Hugging Face Hub: model folders and datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sempa_st.errors import SempaError, first_line
from sempa_st.utils.extras import require

_IGNORED_FILES = ["original/*", "onnx/*", "openvino/*", "consolidated*"]  # the same weights in other formats
# Weights in safetensors only: loading pickled weights can run code.
_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.md", "*.html", "NOTICE*"]


def model_folder(name: str, *, weights: bool = True) -> Path:
    """Return the local folder of a model, unchecked: ``name`` itself, or a cached copy of the Hub repository.

    Args:
        name: Local folder or Hub id.
        weights: Whether to download the weights as well.

    Raises:
        SempaError: If ``name`` is neither a local folder nor a repository that is reachable or cached.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    unknown = f"Unknown model {name!r}: it is not a local folder"
    try:
        ignored = _IGNORED_FILES + ([] if weights else ["*.safetensors"])
        return Path(snapshot_download(name, allow_patterns=_MODEL_FILES, ignore_patterns=ignored))
    except HFValidationError as error:
        raise SempaError(f"{unknown} and not a valid Hub id. Check the path.") from error
    except RepositoryNotFoundError as error:
        raise SempaError(
            f"{unknown}, and the Hub has no repository of that name that you can access. Check the name, or log in "
            "with `hf auth login` and accept the model's terms."
        ) from error
    except (HfHubHTTPError, OSError) as error:
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
