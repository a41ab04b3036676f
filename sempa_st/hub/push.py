"""``sempa push`` and ``sempa pull``: a model folder to the Hub, and back."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sempa_st.checks.inspection import CONFIG, check_folder, files_read
from sempa_st.errors import SempaError, first_line
from sempa_st.folder.card import CARD
from sempa_st.folder.copying import copy_model, origin_of
from sempa_st.folder.formats import MODULES, RUN_RECORD
from sempa_st.folder.layout import ModelFolder
from sempa_st.folder.resolve import Source, find_model
from sempa_st.folder.write import copy_files
from sempa_st.hub.checks import check_publishable
from sempa_st.model.prompt_eol import SOURCES
from sempa_st.utils.files import atomic_folder, cache_folder, check_output_folder, write_text
from sempa_st.utils.hub import download

_NOT_PUBLISHED = ("trainer_state.json",)
_REPLACED = [CONFIG, "generation_config.json", "adapter_*", "model*.safetensors*", MODULES, "[12]_*/*", RUN_RECORD]
"""Files of an earlier version that are removed from the repository when this version has none of that name."""


@dataclass(frozen=True)
class Pushed:
    """What was sent.

    Args:
        files: Size of each file in bytes, by its name.
        url: Address of the commit; None if nothing was sent.
    """

    files: dict[str, int]
    url: str | None


def push(
    model: str,
    repo: str,
    *,
    private: bool = False,
    merged: bool = False,
    dry_run: bool = False,
    dtype: str = "float32",
    token: str | None = None,
) -> Pushed:
    """Send a model to the Hub, after it was checked as strangers will use it.

    All files appear in one commit, the last step. After a broken upload the same call sends only what is missing.

    Args:
        model: Shipped model or SemPA folder.
        repo: Repository, ``owner/name``; it is made if it does not exist.
        private: Make the repository a private one; an existing public one is refused.
        merged: Send the adapter merged into its base, as a whole model.
        dry_run: Check all and send nothing.
        dtype: Type of merged weights, in which the readers' vectors are compared.
        token: Token of the Hub; that of ``hf auth login`` when None.

    Raises:
        SempaError: If the model fails a check, or the Hub refuses it or cannot be reached.
    """
    _check_repo(repo)
    source = find_model(model)
    if source.kind != "sempa":
        raise SempaError(
            f"{model} is no folder of this package. Expected one that `sempa train` or `sempa copy` wrote."
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, repo.partition("/")[2])
        _stage(source, folder, merged=merged, dtype=dtype)
        _name_repository(folder, repo)
        base = origin_of(Source(model, ModelFolder(folder), "sempa"))
        private_paths = [Path.home(), Path.cwd(), cache_folder(), source.folder.path.resolve().parent, Path(scratch)]
        check_publishable(folder, base, private_paths=private_paths, dtype=dtype)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        sizes = {name: path.stat().st_size for name, path in files.items()}
        return Pushed(sizes, None if dry_run else _send(folder, repo, private=private, token=token))


def _check_repo(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        valid = repo.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise SempaError(f"{repo!r} is no name of a repository. Expected owner/name, such as your-name/sempa-llama3.")


def _stage(source: Source, folder: Path, *, merged: bool, dtype: str) -> None:
    """Copy what belongs to the model into ``folder``, or write it merged there."""
    if merged:
        copy_model(source.name, folder, merge=True, dtype=dtype)
        return
    folder.mkdir()
    path = source.folder.path
    code = SOURCES if source.folder.format == "custom" else ()
    names = [name for name in (*files_read(path), *code, CARD) if name not in _NOT_PUBLISHED]
    copy_files(path, folder, names)


def _name_repository(folder: Path, repo: str) -> None:
    """Put the repository's name into the card's examples, in place of the folder's."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if title := re.search(r"^# (.+)$", text, re.M):
        write_text(card, text.replace(f'("{title[1]}"', f'("{repo}"'))


def _send(folder: Path, repo: str, *, private: bool, token: str | None) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    then = "the same command sends what is missing, and nothing shows before all is there."
    with _hub_errors(f"{repo} could not be sent to the Hub", then):
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise SempaError(f"{repo} exists and is public. Leave out --private, or make it private on the Hub first.")
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload with sempa-st", delete_patterns=_REPLACED
        )
    return str(commit.commit_url)


@contextmanager
def _hub_errors(what: str, then: str) -> Iterator[None]:
    try:
        yield
    except SempaError:
        raise
    except Exception as error:  # the client raises its HTTP library's types, OSError and ValueError
        raise SempaError(
            f"{what} ({type(error).__name__}: {first_line(error)}). Check the network and `hf auth whoami`; {then}"
        ) from error


def pull(repo: str, output: str | Path, *, revision: str | None = None, overwrite: bool = False) -> str:
    """Fetch a model from the Hub into a folder of its own, which appears complete and checked.

    Args:
        repo: Repository, ``owner/name``.
        output: Folder to write.
        revision: Branch, tag or commit; the newest commit when None.
        overwrite: Replace ``output`` if it exists.

    Returns:
        The commit that was fetched.

    Raises:
        SempaError: If the repository cannot be reached, a check of its files fails, or the folder cannot be written.
    """
    check_output_folder(output, overwrite=overwrite)
    _check_repo(repo)
    with atomic_folder(output, overwrite=overwrite) as folder:
        with _hub_errors(f"{repo} could not be fetched", "the same command begins again."):
            commit = download(repo, folder, revision=revision)
        check_folder(folder)
    return commit
