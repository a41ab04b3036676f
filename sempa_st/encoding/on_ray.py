"""Embed shards by workers of Ray Data, on this machine or on the nodes of a cluster.

Ray is given the list of shards and nothing of the text: each worker reads a shard, embeds it by the model that it has
loaded, and writes it to the folder of the run, which all nodes must see under the same path. A worker that dies is
started anew by Ray, and the shards that it had not written are given out again.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sempa_st.encoding.sentences import Sentences, Shard
from sempa_st.encoding.shard_writer import ShardWriter
from sempa_st.encoding.vectors import VectorSettings, calibrate
from sempa_st.errors import SempaError
from sempa_st.folder.resolve import find_model, source_digest
from sempa_st.utils.devices import pick_dtype
from sempa_st.utils.extras import require
from sempa_st.utils.hub import hub_access

_MAX_BLOCKS = 4096
"""Blocks of the list of shards, which Ray hands out: few enough to be kept track of."""
_NOT_IDENTITY = ("token", "cache_folder")
"""Arguments of :func:`sempa_st.load` that decide no vector; a token belongs in no file."""


class RayWorkers:
    """Embeds shards by workers of Ray Data; Ray is started here unless it runs already.

    Args:
        model: What :func:`sempa_st.load` takes: a name, or a folder that all nodes see.
        options: Its other arguments.
        workers: Number of workers; one for each GPU of the cluster, or else for each CPU, when None.

    Raises:
        SempaError: If Ray is not installed, or ``model`` is no name or not found.
    """

    def __init__(self, model: Any, options: dict[str, Any], workers: int | None) -> None:
        require("ray", extra="ray", purpose="The engine ray")
        if not isinstance(model, str | Path):
            raise SempaError("The engine ray needs the name or folder of a model, which each worker loads.")
        import ray

        self._started = not ray.is_initialized()
        if self._started:
            # Joins a cluster that RAY_ADDRESS names or that runs here; or else starts one of this machine.
            with _sigterm_unchanged():
                ray.init(log_to_driver=False, logging_level="warning", include_dashboard=False)
        resources = ray.cluster_resources()
        device = options.get("device") or ("cuda" if resources.get("GPU") else "cpu")
        self._needs = {"num_gpus": 1} if device.startswith("cuda") else {"num_cpus": 1}
        self._workers = workers or max(1, int(resources.get("GPU" if device.startswith("cuda") else "CPU", 1)))
        # All workers compute in one type, whatever their processors would choose.
        dtype = str(pick_dtype(options.get("dtype", "auto"), device)).removeprefix("torch.")
        self._load = {**options, "model": str(model), "device": device, "dtype": dtype}
        self.model_identity = {
            **{name: value for name, value in self._load.items() if name not in _NOT_IDENTITY},
            "model": self._digest(options),
            "model_kwargs": repr(options.get("model_kwargs")),
        }

    def _digest(self, options: dict[str, Any]) -> str:
        with hub_access(options.get("token"), options.get("cache_folder")):
            source = find_model(self._load["model"], for_method=True, revision=options.get("revision"))
            return source_digest(source, options.get("base"))

    def close(self) -> None:
        """Leave the cluster, or end it, if it was joined or started here."""
        import ray

        if self._started:
            ray.shutdown()

    def calibrate(self, sentences: Sentences, settings: VectorSettings, batch_size: int) -> Any:
        """Return the ranges of :func:`sempa_st.encoding.vectors.calibrate`, from a worker."""
        import ray

        task = ray.remote(_calibrate).options(**self._needs)
        ranges, error = ray.get(task.remote(self._load, sentences, settings, batch_size))
        _raise_if(error)
        return ranges

    def run(self, write: ShardWriter, shards: Sequence[Shard], advance: Callable[[int], object]) -> None:
        """Embed and write shards."""
        if not shards:
            return
        import ray

        rows = [{**asdict(shard), "path": str(shard.path.resolve()), "start": str(shard.start)} for shard in shards]
        with _quiet_ray_data():
            listed = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MAX_BLOCKS))
            written = listed.map(
                ShardActor,
                fn_constructor_args=(self._load, write),
                compute=ray.data.ActorPoolStrategy(size=min(self._workers, len(rows))),
                **self._needs,
            )
            for row in written.iter_rows():
                _raise_if(row["error"])
                advance(row["count"])


class ShardActor:
    """A worker: loads the model when it gets its first shard.

    Args:
        load: Arguments of :func:`sempa_st.load`.
        write: What writes a shard.
    """

    def __init__(self, load: dict[str, Any], write: ShardWriter) -> None:
        self._load = load
        self._write = write
        self._model: Any = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Embed one shard; an error that a user can mend is returned, since Ray would repeat a task that raises."""
        shard = Shard(**{**row, "path": Path(row["path"]), "start": int(row["start"])})
        try:
            if self._model is None:
                self._model = _loaded(self._load, self._write.settings)
            self._write(self._model, shard)
        except SempaError as error:
            return {"count": 0, "error": str(error)}
        return {"count": shard.count, "error": ""}


def _loaded(arguments: dict[str, Any], settings: VectorSettings) -> Any:
    from sempa_st.loading import load

    model = load(**arguments)
    settings.check(model)
    return model


def _calibrate(
    arguments: dict[str, Any], sentences: Sentences, settings: VectorSettings, batch_size: int
) -> tuple[Any, str]:
    try:
        return calibrate(_loaded(arguments, settings), sentences, settings, batch_size=batch_size), ""
    except SempaError as error:
        return None, str(error)


def _raise_if(error: str) -> None:
    if error:
        raise SempaError(error)


@contextmanager
def _sigterm_unchanged() -> Iterator[None]:
    """Keep what SIGTERM does to this process; ``ray.init`` makes it an exit with the code 15."""
    if threading.current_thread() is not threading.main_thread():  # where Ray leaves it alone, too
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as exit:
        if exit.code != signal.SIGTERM:
            raise
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)  # which came meanwhile
        raise SempaError("SIGTERM came while Ray started, and Ray gave up. Run the command again.") from exit
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Switch off the progress bars and plans of Ray Data, beside which our bar would be unreadable."""
    import ray

    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    shown, context.enable_progress_bars = context.enable_progress_bars, False
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = shown
        logger.setLevel(level)
