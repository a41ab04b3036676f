"""The folder of an unfinished run of ``sempa encode``: a file for each finished shard, and the identity of the run.

::

    vectors.parquet.encoding/           folder of the unfinished run of the output vectors.parquet
        identity.json                   input, model and settings; only the same run goes on from the shards
        _ranges.npy                     ranges of the dimensions, for the precisions int8 and uint8
        part-00000.parquet              vectors of the first shard; appears complete, by a rename
        published.json                  the output that was about to be moved to its place, when all shards are there

A shard has one name and one content, whoever computes it and how often, so that no row can be lost or doubled.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sempa_st.encoding.sentences import Sentences
from sempa_st.errors import SempaError
from sempa_st.utils.claims import CLAIM, claim_output, is_claimed
from sempa_st.utils.files import (
    atomic_file,
    atomic_folder,
    check_not_inside,
    check_output_file,
    check_output_folder,
    lock_beside,
    locked,
    os_errors_as_sempa_errors,
    read_json,
    write_json,
)
from sempa_st.utils.leftovers import InUseError, clear_leftovers, delete, held, publish, scratch_folder
from sempa_st.utils.names import resolved

FOLDER = ""
"""Ending of an output that is a folder of parquet files."""
OUTPUT_SUFFIXES = (".npy", ".parquet")
EMBEDDING = "embedding"
"""Column of the vectors in a parquet file."""
_IDENTITY = "identity.json"
_RANGES = "_ranges.npy"  # readers of parquet folders pass over names with an underscore


class ShardFolder:
    """The folder ``<output>.encoding`` beside an output.

    Args:
        output: ``.npy`` or ``.parquet`` file, or (without an ending) a folder of parquet files.
    """

    def __init__(self, output: str | Path) -> None:
        self.output = Path(output)
        self.suffix = self.output.suffix.lower()
        self._target = resolved(self.output)  # if the output is a link, what it points to is written
        self.path = self._target.with_name(f"{self._target.name}.encoding")

    @property
    def shard_suffix(self) -> str:
        """Ending of a shard's file."""
        return self.suffix or ".parquet"

    @property
    def ranges(self) -> Path:
        """File with the ranges of the dimensions."""
        return self.path / _RANGES

    def count_finished(self) -> int:
        """Return the number of shards that an unfinished run has left."""
        return len(self._finished()) if self.path.is_dir() else 0

    def check_output(self, *, overwrite: bool) -> None:
        """Raise :class:`SempaError` unless the output can be written, and is not there or may be replaced.

        If it is what the unfinished run has written, the run is to be finished. What a run was removing when it was
        killed is removed first.
        """
        if self.path.parent.is_dir():
            with os_errors_as_sempa_errors(f"{self.path} cannot be read"):
                clear_leftovers(self.path.parent, self.path.name)
            with suppress(InUseError, OSError):
                if (lock := lock_beside(self.path)).exists():
                    with held(lock):
                        pass  # it is removed
        if is_claimed(self.output, self.path):
            return
        if self.suffix == FOLDER:
            check_output_folder(self.output, overwrite=overwrite)
            return
        check_output_file(self.output, OUTPUT_SUFFIXES)
        if self.output.exists() and not overwrite:
            raise SempaError(self._exists())

    def _exists(self) -> str:
        return f"The output {self.output} exists. Choose another, or pass --overwrite to replace it."

    @contextmanager
    def opened(self, sentences: Sentences, identity: dict[str, Any], *, overwrite: bool) -> Iterator[set[int]]:
        """Lock the folder, create it or go on from it, and yield the numbers of the shards that it has.

        If the block ends with an error before there is a shard, the folder is removed.

        Args:
            sentences: The input, which the output must not replace.
            identity: Everything that decides the vectors and their division into shards.
            overwrite: Replace the output and the unfinished run of another input or other settings.

        Raises:
            SempaError: If the output must not be written, or the folder holds another run.
        """
        check_not_inside(self.output, sentences.files)
        in_use = f"{self.output} is being written by another process. Wait for it, stop it, or choose another --output."
        with os_errors_as_sempa_errors(f"{self.output} cannot be written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with scratch_folder(self.path):
                pass  # something can be written beside the output
        with locked(lock_beside(self.path), in_use, "runs"):
            self.check_output(overwrite=overwrite)  # another process may have written it meanwhile
            self._prepare(identity, overwrite=overwrite)
            try:
                published = is_claimed(self.output, self.path)
                yield {shard.number for shard in sentences.shards} if published else self._finished()
            except BaseException:
                if not self._finished() and self.path.is_dir():
                    with suppress(OSError):  # what it was that went wrong is more important
                        self._remove()
                raise

    def _remove(self) -> None:
        """Remove the folder, in one step: what a kill leaves of it is a leftover, and is not taken for a run.

        If it is a link, to another disk, the folder there stays and is emptied; what tells whose it is goes last.
        """
        if self.path.is_symlink():
            last = {CLAIM: 1, _IDENTITY: 2}
            for entry in sorted(self.path.iterdir(), key=lambda entry: last.get(entry.name, 0)):
                delete(entry)
            return
        with scratch_folder(self.path) as scratch:
            self.path.rename(scratch / self.path.name)

    def _prepare(self, identity: dict[str, Any], *, overwrite: bool) -> None:
        if self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            known = self.path / _IDENTITY
            if not known.is_file():
                raise SempaError(f"{self.path} holds no unfinished run. Move it away, or choose another --output.")
            if read_json(known) == identity:
                return
            if not overwrite:
                if is_claimed(self.output, self.path):
                    raise SempaError(self._exists())
                raise SempaError(
                    f"{self.path} holds an unfinished run of another input, model or setting. Repeat that command to "
                    "finish it, or pass --overwrite to delete it."
                )
            self._remove()
            self.path.mkdir(exist_ok=True)
        write_json(self.path / _IDENTITY, identity)

    def shard(self, number: int) -> Path:
        """Return the file of a shard."""
        return self.path / f"part-{number:05d}{self.shard_suffix}"

    def _finished(self) -> set[int]:
        names = [entry.name for entry in os.scandir(self.path)] if self.path.is_dir() else []
        return {int(name[5:].partition(".")[0]) for name in names if name.startswith("part-")}

    @contextmanager
    def writing(self, number: int) -> Iterator[Path]:
        """Yield a temporary path for a shard, and move it into place if the block ends without an error.

        Two workers may write one shard at the same time, when the first is taken for dead: each has its own path.
        """
        target = self.shard(number)
        partial = target.with_name(f".{uuid.uuid4().hex}{target.suffix}")
        try:
            yield partial
            with os_errors_as_sempa_errors(f"{target} cannot be written"):
                publish(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def write_ranges(self, ranges: Any) -> None:
        """Write the ranges of the dimensions, an array of shape (2, width)."""
        import numpy as np

        with atomic_file(self.ranges) as partial, partial.open("wb") as file:
            np.save(file, ranges)

    def finish(self, sentences: Sentences) -> int:
        """Make the output of the shards, remove the folder, and return the number of values of a vector."""
        if is_claimed(self.output, self.path):
            clear_leftovers(self._target.parent, self._target.name)
        else:
            self._publish(sentences)
        width = _width(self.output / self.shard(0).name if self.suffix == FOLDER else self.output)
        self._remove()
        return width

    def _publish(self, sentences: Sentences) -> None:
        missing = {shard.number for shard in sentences.shards} - self._finished()
        if missing:
            raise SempaError(f"{len(missing)} shard(s) are missing in {self.path}. Run the command again.")
        for leftover in self.path.glob(".*"):  # of workers that were killed
            delete(leftover)
        shards = [self.shard(shard.number) for shard in sentences.shards]
        ranges = [self.ranges] if self.ranges.exists() else []
        # The shards stay until the output is in its place.
        if self.suffix == FOLDER:
            with atomic_folder(self.output, overwrite=True) as partial:
                for file in [*shards, *ranges]:
                    _link(file, partial / file.name)
                claim_output(partial, self.path)
            return
        beside = self.output.with_name(self.output.name + ".ranges.npy")
        if self._target.exists() and (ranges or beside.exists()):
            self._target.unlink()  # the vectors of one run never stand beside the ranges of another
            beside.unlink(missing_ok=True)
        for file in ranges:
            with atomic_file(beside) as partial:
                shutil.copyfile(file, partial)
        with atomic_file(self._target) as partial:
            if self.suffix == ".npy":
                _join_npy(shards, partial, (sentences.count, _width(shards[0])))
            else:
                _join_parquet(shards, partial)
            claim_output(partial, self.path)


def _link(file: Path, to: Path) -> None:
    try:
        to.hardlink_to(file)
    except OSError:  # the file system has no hard links
        shutil.copyfile(file, to)


def _width(shard: Path) -> int:
    import numpy as np
    import pyarrow.parquet as pq

    if shard.suffix.lower() == ".npy":
        return int(np.load(shard, mmap_mode="r").shape[1])
    return int(pq.read_schema(shard).field(EMBEDDING).type.list_size)


def _join_npy(shards: list[Path], path: Path, shape: tuple[int, int]) -> None:
    import numpy as np

    with path.open("wb") as output:
        for number, shard in enumerate(shards):
            with shard.open("rb") as part:
                np.lib.format.read_magic(part)
                *_, dtype = np.lib.format.read_array_header_1_0(part)
                if not number:
                    write_npy_header(output, shape, dtype)
                shutil.copyfileobj(part, output)


def write_npy_header(file: Any, shape: tuple[int, int], dtype: Any) -> None:
    """Write the header of a file of vectors in C order."""
    import numpy as np

    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _join_parquet(shards: list[Path], path: Path) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, pq.read_schema(shards[0])) as writer:
        for shard in shards:
            with pq.ParquetFile(shard) as part:
                for group in range(part.num_row_groups):
                    writer.write_table(part.read_row_group(group))
