"""A sweep: one training run for each point of a grid, one after another, with the dev score as the only judge."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sempa_st.bases import resolve_base
from sempa_st.card import read_record, write_card
from sempa_st.config import TrainConfig
from sempa_st.devices import pick_device
from sempa_st.errors import SempaError
from sempa_st.files import atomic_folder, check_apart, check_output_folder, read_json, write_json, write_text
from sempa_st.folder import RUN_RECORD
from sempa_st.grid import SWEEP_OWNED, Point, settings_digest
from sempa_st.leftovers import InUseError, held
from sempa_st.nli import load_nli
from sempa_st.peft_models import ADAPTER_WEIGHTS
from sempa_st.runinfo import fingerprint
from sempa_st.stsdata import data_dir_or_default, dev_pairs
from sempa_st.train.ranking import Outcome, results_markdown, results_table, sweep_results
from sempa_st.train.run import train
from sempa_st.train.workdir import WorkDir

Train = Callable[[TrainConfig], tuple[dict[str, Any], bool]]
BEST = "best"
_GRID = "grid.json"
_LOCK = ".lock"
_RUNS = "runs"
_TRAINING = ".training"
_FAILED = ".failed.json"


@dataclass(frozen=True)
class Run:
    """A point of the grid and the folder of its run.

    Args:
        point: The point.
        folder: Where the run writes its model; once a better one is known, only its record stays there.
    """

    point: Point
    folder: Path

    @property
    def record(self) -> dict[str, Any] | None:
        """The run record, once the run is finished."""
        return read_record(self.folder)

    @property
    def has_model(self) -> bool:
        """Whether the model itself is still there."""
        return (self.folder / ADAPTER_WEIGHTS).is_file()

    @property
    def failure(self) -> Path:
        """The file that says why the run failed, where it did."""
        return self.folder.with_name(self.folder.name + _FAILED)

    def outcome(self) -> Outcome:
        """Return what is known of the run."""
        record = self.record
        error = read_json(self.failure)["error"] if record is None and self.failure.is_file() else None
        return Outcome(self.folder.name, self.point.varied, record, error)

    def settings(self) -> TrainConfig:
        """Return the settings to start the run with, or to go on with it where it was interrupted."""
        config = replace(self.point.config, output=str(self.folder), overwrite=True)
        work = WorkDir(self.folder)
        started = work.started_with() if work.last_checkpoint() else None
        # The run itself refuses to go on with pairs from another folder.
        return replace(config, resume=started is not None and started.get("data_dir") == config.data_dir)


def place(points: Sequence[Point], folder: Path) -> list[Run]:
    """Give each point its run: the one in ``folder`` that has its settings, or else a new one.

    What a run was started with decides, and not its name: a grid that has changed may name a point otherwise, or use
    the name of an earlier one for other settings.
    """
    standing = list(_standing(folder))
    names = {digest: name for name, digest in standing}
    taken = {name for name, _ in standing}
    runs = []
    for point in points:
        name = names.get(point.digest)
        if name is None:
            name = f"{point.name}-{point.digest}" if point.name in taken else point.name
        taken.add(name)
        runs.append(Run(point, folder / name))
    return runs


def _standing(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield name and settings digest of each run that has left something, the finished ones last."""
    for path in sorted(folder.glob("*" + _TRAINING)):
        name = path.name.removesuffix(_TRAINING)
        started = WorkDir(folder / name).started_with()
        if started is not None:
            yield name, settings_digest(started)
    for path in sorted(folder.glob("*" + _FAILED)):
        yield path.name.removesuffix(_FAILED), settings_digest(read_json(path)["config"])
    for path in sorted(folder.glob(f"*/{RUN_RECORD}")):
        record = read_json(path)
        yield path.parent.name, record.get("settings_digest") or settings_digest(record["config"])


def run_sweep(
    points: Sequence[Point],
    output: str | Path,
    *,
    keep_models: bool = False,
    retry_failed: bool = False,
    train: Train = train,
) -> dict[str, Any]:
    """Train every point of a grid that is not trained yet, and put the best model into the folder ``best``.

    Args:
        points: Points of the grid.
        output: Folder of the sweep. What stands there of the same points is kept, and gone on with.
        keep_models: Keep the model of every run, and not only that of the best one.
        retry_failed: Try again what has failed in an earlier call.
        train: Does one run and returns its record.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        SempaError: If the data, a base or the folder cannot be used, or if no run ends well.
    """
    folder = Path(output)
    sources = _check(points, folder)
    with _locked(folder):
        sweep = _Sweep(points, folder, keep_models=keep_models, train=train)
        sweep.write_grid(sources)
        with _broken_off():
            sweep.run_all(retry_failed=retry_failed)
            sweep.ensure_best_model()
            results = sweep.settle()
    if results["best"] is None:
        raise SempaError(
            f"None of the {len(points)} runs ended well. The first one to fail: {results['runs'][0]['error']} After "
            "mending that, pass --retry-failed."
        )
    return results


class _Sweep:
    def __init__(self, points: Sequence[Point], folder: Path, *, keep_models: bool, train: Train) -> None:
        self._folder = folder
        self._runs = place(points, folder / _RUNS)
        self._keep_models = keep_models
        self._train = train

    def write_grid(self, sources: dict[str, str]) -> None:
        """Write down what the sweep is: its points, and the fingerprints of the data it is made with."""
        points = [
            {"name": run.folder.name, "varied": dict(run.point.varied), "config": _settings(run.point)}
            for run in self._runs
        ]
        write_json(self._folder / _GRID, {"points": points, "sources": sources})

    def run_all(self, *, retry_failed: bool) -> None:
        """Run what has neither a record nor a failure; after each run, write the results as they stand."""
        for number, run in enumerate(self._runs, 1):
            label = f"[{number}/{len(self._runs)}] {run.point.label}"
            if run.record:
                _say(f"{label}: done before, dev {run.outcome().dev_score:.2f}")
                continue
            if run.failure.is_file() and not retry_failed:
                _say(f"{label}: has failed before; --retry-failed tries it again")
                continue
            _say(label)
            self._attempt(run)
            results = self.settle()
            if number < len(self._runs):
                _say(results_table(results))

    def ensure_best_model(self) -> None:
        """Train the best point again if its model is gone, as when a better one has left the grid since."""
        while (best := self._best()) and not best.has_model:
            _say(f"The model of the best run was not kept; training it again: {best.point.label}")
            self._train(best.settings())

    def settle(self) -> dict[str, Any]:
        """Write the results, put the best model in its place and remove the models that are not wanted."""
        results = self._results()
        write_json(self._folder / "results.json", results)
        write_text(self._folder / "results.md", results_markdown(results))
        best = self._best()
        if best and best.has_model:
            self._publish(best)
        for run in self._runs:
            if run != best and run.has_model and not self._keep_models:
                with atomic_folder(run.folder, overwrite=True) as folder:
                    shutil.copyfile(run.folder / RUN_RECORD, folder / RUN_RECORD)
        return results

    def _results(self) -> dict[str, Any]:
        return sweep_results([run.outcome() for run in self._runs], self._runs[0].point.config.dev)

    def _best(self) -> Run | None:
        name = self._results()["best"]
        return next((run for run in self._runs if run.folder.name == name), None)

    def _attempt(self, run: Run) -> None:
        run.failure.unlink(missing_ok=True)
        failure = ""
        try:
            self._train(run.settings())
        except SempaError as error:
            failure = str(error)
            write_json(run.failure, {"error": failure, "config": _settings(run.point)})
        # The trainer and the model refer to each other; on a large base the next run needs the room.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if failure:  # said only now that the bar of the run is gone
            _say(f"failed: {failure}")

    def _publish(self, best: Run) -> None:
        target = self._folder / BEST
        record = best.record
        if read_record(target) == record:
            return
        with atomic_folder(target, overwrite=True) as folder:
            shutil.copytree(best.folder, folder, dirs_exist_ok=True)
            write_card(folder, target.name, resolve_base(best.point.config.base), record)


def _settings(point: Point) -> dict[str, Any]:
    return {name: value for name, value in asdict(point.config).items() if name not in SWEEP_OWNED}


def _check(points: Sequence[Point], folder: Path) -> dict[str, str]:
    """Refuse what would make every run fail, and return the fingerprints of the data and of the dev pairs.

    Records of an earlier call count as results of this one, so that their data must not have changed since.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SempaError("A sweep runs in one process, not under accelerate launch. Start it as sempa sweep.")
    if not (folder / _GRID).is_file():
        check_output_folder(folder)
    configs = [point.config for point in points]
    pick_device(configs[0].device)
    sources: dict[str, str] = {}
    for data, skip_bad_rows in dict.fromkeys((config.data, config.skip_bad_rows) for config in configs):
        sources[f"data {data}"] = load_nli(data, skip_bad_rows=skip_bad_rows).fingerprint()
    dev = configs[0].dev
    pairs = dev_pairs(dev, data_dir_or_default(configs[0].data_dir))
    sources[f"dev {dev}"] = fingerprint(zip(pairs.first, pairs.second, pairs.scores, strict=True))
    for base in dict.fromkeys(config.base for config in configs):
        check_apart(folder / BEST, [resolve_base(base).folder])
    earlier = read_json(folder / _GRID)["sources"] if (folder / _GRID).is_file() else {}
    for name, value in sources.items():
        if earlier.get(name, value) != value:
            raise SempaError(
                f"The {name} has changed since the sweep in {folder} was started, so that new runs could not be "
                "compared with its earlier ones. Restore it, or choose another --output."
            )
    return earlier | sources


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second sweep out of the folder, which would take the first one's run for an interrupted one."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(folder / _LOCK))
        except InUseError as error:
            raise SempaError(
                f"Another sweep is running in {folder}. Wait for it, or choose another --output."
            ) from error
        except OSError as error:
            raise SempaError(
                f"{folder / _LOCK} cannot be written, which keeps two sweeps apart: {error.strerror}. Check the path, "
                "its owner and the free space."
            ) from error
        yield


@contextmanager
def _broken_off() -> Iterator[None]:
    try:
        yield
    except BaseException:
        _say("The sweep broke off; the same command goes on with it.")
        raise


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
