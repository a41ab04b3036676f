"""Embed the sentences of files into files, shard by shard: memory does not grow, and an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sempa_st.encoding.sentences import SHARD_ROWS, Sentences, Shard, read_sentences
from sempa_st.encoding.shard_folder import EMBEDDING, ShardFolder
from sempa_st.encoding.shard_writer import ShardWriter
from sempa_st.encoding.tables import input_schema, text_schema
from sempa_st.encoding.vectors import WITH_RANGES, VectorSettings, calibrate
from sempa_st.errors import SempaError, check_known
from sempa_st.folder.identity import current_name
from sempa_st.utils.files import check_not_inside

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ENGINES = ("local", "ray")


def encode_file(
    model: str | SentenceTransformer,
    input: str | Path | Sentences,
    output: str | Path,
    *,
    column: str | None = None,
    batch_size: int = 32,
    skip_bad_rows: bool = False,
    normalize: bool = False,
    truncate_dim: int | None = None,
    precision: str = "float32",
    prompt: str | None = None,
    prompt_name: str | None = None,
    overwrite: bool = False,
    shard_size: int = SHARD_ROWS,
    engine: str = "local",
    workers: int | None = None,
    **options: Any,
) -> tuple[int, int]:
    """Embed the sentences of a file and write all vectors: ``sempa encode`` from Python.

    ``.npy`` gets an array of shape (sentences, width); ``.parquet`` all columns of the input, and ``row``, ``sentence``
    and ``embedding``. Equal sentences of a window are encoded once. The output appears complete, at the end; until then
    finished shards are in ``<output>.encoding``, and the same call goes on from them.

    Args:
        model: What :func:`sempa_st.load` takes, or a model that it returned.
        input: File with sentences, a folder of such files, or what :func:`read_sentences` returned for it.
        output: ``.npy`` or ``.parquet`` file to write; or a folder, without an ending, which gets a parquet file for
            each shard.
        column: Column with the sentences; may be left out if there is only one.
        batch_size: Sentences per batch.
        skip_bad_rows: Leave out empty sentences.
        normalize: Scale vectors to the norm 1, after they are cut.
        truncate_dim: Number of dimensions to keep; all when None.
        precision: ``float32``, ``int8``, ``uint8``, ``binary`` or ``ubinary``, as of ``SentenceTransformer.encode``.
            The ranges of ``int8`` and ``uint8`` are those of a sample of the corpus, and are written beside the output.
        prompt: Text to put before each sentence.
        prompt_name: Name of one of the model's own prompts, to use instead.
        overwrite: Replace the output, and an unfinished run of another input or other settings.
        shard_size: Rows of a shard.
        engine: ``local``, or ``ray`` for workers of Ray Data, on this machine or a cluster.
        workers: Number of Ray's workers, each with a model of its own; as many as GPUs (or else CPUs) when None.
        **options: Arguments of :func:`sempa_st.load`, for a model that is to be loaded.

    Returns:
        Number of vectors, and their width.

    Raises:
        SempaError: If the model, the input or the output cannot be used, the output exists, a vector is not finite, or
            the input has changed.
    """
    check_known(engine, ENGINES, "engine")
    settings = VectorSettings(normalize, truncate_dim, precision, prompt, prompt_name)
    folder = ShardFolder(output)
    folder.check_output(overwrite=overwrite)
    check_not_inside(output, [Path(each) for each in (model, options.get("base")) if isinstance(each, str | Path)])
    sentences = (
        input
        if isinstance(input, Sentences)
        else read_sentences(input, column=column, skip_bad_rows=skip_bad_rows, shard_size=shard_size)
    )
    schema = text_schema(sentences.column) if folder.suffix == ".npy" else _output_schema(sentences)
    write = ShardWriter(folder.output, sentences.column, schema, settings, batch_size)
    if engine == "ray":
        from sempa_st.encoding.on_ray import RayWorkers

        worker: Any = RayWorkers(model, options, workers)
    else:
        worker = _ThisProcess(model, options, settings)
    with (
        closing(worker),
        folder.opened(sentences, _identity(worker, sentences, settings), overwrite=overwrite) as finished,
    ):
        left = [shard for shard in sentences.shards if shard.number not in finished]
        if left and precision in WITH_RANGES and not folder.ranges.exists():
            folder.write_ranges(worker.calibrate(sentences, settings, batch_size))
        with _progress(sentences.count, sum(shard.count for shard in left)) as advance:
            worker.run(write, left, advance)
        return sentences.count, folder.finish(sentences)


def _identity(worker: Any, sentences: Sentences, settings: VectorSettings) -> dict[str, Any]:
    """Return all that decides the vectors and their division into shards; only such a run goes on from shards."""
    return {
        "model": worker.model_identity,
        "input": sentences.digest,
        "column": sentences.column,
        "skipped": sentences.skipped,
        "shard_size": sentences.shard_size,
        **asdict(settings),
    }


def _output_schema(sentences: Sentences) -> Any:
    schema = input_schema(sentences)
    if EMBEDDING in schema.names:
        raise SempaError(
            f"{sentences.path} has a column {EMBEDDING!r} already. Rename or drop it, or choose an npy file as output."
        )
    return schema


@contextmanager
def _progress(total: int, left: int) -> Iterator[Callable[[int], object]]:
    """Show a progress bar of sentences, and yield the function that advances it."""
    from tqdm.auto import tqdm

    with tqdm(total=total, initial=total - left, desc="encode", unit="sentence", dynamic_ncols=True) as bar:
        yield bar.update


class _ThisProcess:
    """Embeds shards one after another in this process.

    Args:
        model: What :func:`sempa_st.load` takes, or a model that it returned.
        options: Its other arguments.
        settings: What decides the vectors.
    """

    def __init__(self, model: str | SentenceTransformer, options: dict[str, Any], settings: VectorSettings) -> None:
        if isinstance(model, str | Path):
            from sempa_st.loading import load

            model = load(model, **options)
        settings.check(model)
        self.model = model

    @property
    def model_identity(self) -> str:
        """The model's name, with a digest of what it is now; of models that others loaded a run starts anew."""
        return current_name(self.model) or uuid4().hex

    def calibrate(self, sentences: Sentences, settings: VectorSettings, batch_size: int) -> Any:
        """Return the ranges of :func:`sempa_st.encoding.vectors.calibrate`."""
        return calibrate(self.model, sentences, settings, batch_size=batch_size)

    def close(self) -> None:
        """Do nothing: the model is the caller's, or goes with this object."""

    def run(self, write: ShardWriter, shards: Sequence[Shard], advance: Callable[[int], object]) -> None:
        """Embed and write shards."""
        for shard in shards:
            write(self.model, shard, advance)
