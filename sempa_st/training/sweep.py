"""A sweep: one training run for each point of a grid, or for some that a search picks; the dev score is the judge.

Optuna picks the points of a search, and keeps what became of each run in a journal
(:mod:`sempa_st.training.journal`).
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState, create_trial

from sempa_st.data.nli import load_nli
from sempa_st.data.sts import data_dir_or_default, dev_pairs
from sempa_st.errors import SempaError
from sempa_st.folder.card import write_card
from sempa_st.folder.formats import RUN_RECORD
from sempa_st.folder.layout import ModelFolder
from sempa_st.model.base_model import resolve_base
from sempa_st.training.config import TrainConfig
from sempa_st.training.journal import JOURNAL, open_journal, open_study
from sempa_st.training.run import train
from sempa_st.training.run_results import RunResult, place, results_markdown, results_table, sweep_results
from sempa_st.utils.devices import pick_device
from sempa_st.utils.files import atomic_folder, check_not_inside, check_output_folder, write_json, write_text
from sempa_st.utils.leftovers import InUseError, held
from sempa_st.utils.run_info import fingerprint

Train = Callable[[TrainConfig], object]
BEST = "best"
_MOST_ASKED = 100
"""How often the sampler is asked for a point that is left, before one is drawn at random."""


def run_sweep(
    configs: Sequence[TrainConfig],
    varied: Sequence[str],
    output: str | Path,
    *,
    search: int | None = None,
    keep_models: bool = False,
    retry_failed: bool = False,
    train: Train = train,
) -> dict[str, Any]:
    """Train the points of a grid that are not trained yet, and put the best model into the folder ``best``.

    Args:
        configs: Settings of the points.
        varied: Names of the settings in which they differ.
        output: Folder of the sweep. What stands there of the same points is kept, and gone on with.
        search: Train this many of the points, picked by Optuna's TPE sampler with the seed of the first one.
        keep_models: Keep the model of every run, and not only that of the best one.
        retry_failed: Try again what has failed in an earlier call.
        train: Does one run, and writes its model folder.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        SempaError: If the data, a base, the folder or its journal cannot be used, or if no run ends well.
    """
    folder = Path(output)
    sources = _check(configs, folder)
    with _locked(folder):
        storage, names = open_journal(folder, sources)
        points = place(configs, varied, folder / "runs", names)
        study = open_study(storage, "search" if search else "grid", [point.digest for point in points], sources)
        sweep = _Sweep(folder, points, study, search, keep_models, train)
        with _explain_interruption():
            sweep.run_all(retry_failed=retry_failed)
            sweep.ensure_best_model()
            results = sweep.settle()
    if results["best"] is None:
        raise SempaError(
            f"None of the {len(results['runs'])} runs ended well. The first one to fail: "
            f"{results['runs'][0]['error']} After mending that, pass --retry-failed."
        )
    return results


@dataclass
class _Sweep:
    folder: Path
    points: Sequence[RunResult]
    study: optuna.Study
    search: int | None
    keep_models: bool
    train: Train

    def __post_init__(self) -> None:
        self._runs = [] if self.search else list(self.points)
        self._trials = {trial.user_attrs["digest"]: trial for trial in self.study.trials}
        # The trials of a study share the choices of a parameter, and so the order of these too.
        columns = {name: {point.varied[name] for point in self.points} for name in self.points[0].varied}
        self._choices: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(sorted(values, key=str)) for name, values in columns.items()
        }

    def run_all(self, *, retry_failed: bool) -> None:
        """Run what has neither a record nor a failure; after each run, write the results as they stand."""
        total = min(self.search or len(self.points), len(self.points))
        for number, run in enumerate(self._picked(total) if self.search else self.points, 1):
            label, row = f"[{number}/{total}] {run.label}", run.row()
            if row["state"] == "finished":
                _say(f"{label}: done before, dev {row['dev_score']:.2f}")
            elif row["state"] == "failed" and not retry_failed:
                _say(f"{label}: has failed before; --retry-failed tries it again")
            else:
                _say(label)
                self._begin(run)
                self._attempt(run)
                results = self.settle()
                if number < total:
                    _say(results_table(results))
            self._end(run)

    def _picked(self, count: int) -> Iterator[RunResult]:
        """Yield the runs of a search: those that it has picked before, in their order, and then new ones."""
        left = {run.digest: run for run in self.points}
        before = [digest for digest in self._trials if digest in left][:count]
        while len(self._runs) < count:
            self._runs.append(left.pop(before.pop(0) if before else self._pick(left)))
            yield self._runs[-1]

    def _pick(self, left: Mapping[str, RunResult]) -> str:
        """Let the sampler choose among the points that are left, and return the digest of the one it chooses."""
        trials = self.study.trials
        # Seeded anew for each choice: a search that was interrupted goes on as it would have gone.
        seed = self.points[0].config.seed + len(trials)
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        study.add_trials(trials)
        # It may choose what is done, or a combination that is in no mapping of the grid file.
        asked = (study.ask(self._choices).params for _ in range(_MOST_ASKED))
        found = next((digest for chosen in asked for digest, run in left.items() if run.varied == chosen), None)
        return found or random.Random(seed).choice(list(left))

    def _begin(self, run: RunResult) -> None:
        """Enter a trial for a run, unless that of an interrupted one is there."""
        trial = self._trials.get(run.digest)
        if trial is None or trial.state.is_finished():
            entry = {"digest": run.digest, "name": run.folder.name, "config": asdict(run.config)}
            self.study.add_trial(
                create_trial(
                    state=TrialState.RUNNING, params=dict(run.varied), distributions=self._choices, user_attrs=entry
                )
            )
            self._trials[run.digest] = self.study.get_trials(deepcopy=False)[-1]

    def _end(self, run: RunResult) -> None:
        """Enter what has come of a run, which a sweep over another grid in the same folder may have made."""
        if run.digest not in self._trials:
            self._begin(run)
        trial, score = self._trials[run.digest], run.row().get("dev_score")
        if not trial.state.is_finished():
            self.study.tell(trial.number, score, TrialState.FAIL if score is None else TrialState.COMPLETE)

    def _attempt(self, run: RunResult) -> None:
        run.failure.unlink(missing_ok=True)
        failure = ""
        try:
            self.train(run.settings())
        except SempaError as error:
            failure = str(error)
            write_json(run.failure, {"error": failure, "config": asdict(run.config)})
        # The trainer and the model refer to each other; on a large base the next run needs the room.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if failure:  # said only now that the bar of the run is gone
            _say(f"failed: {failure}")

    def ensure_best_model(self) -> None:
        """Train the best point again if its model is gone, as when a better one has left the grid since."""
        while (best := self._best(sweep_results(self._runs))) and not best.has_model:
            _say(f"The model of the best run was not kept; training it again: {best.label}")
            self.train(best.settings())

    def settle(self) -> dict[str, Any]:
        """Write the results, put the best model in its place and remove the models that are not wanted."""
        results = sweep_results(self._runs)
        write_json(self.folder / "results.json", results)
        write_text(self.folder / "results.md", results_markdown(results))
        best = self._best(results)
        if best and best.has_model:
            self._publish(best)
        for run in self._runs:
            if run != best and run.has_model and not self.keep_models:
                with atomic_folder(run.folder, overwrite=True) as folder:
                    shutil.copyfile(run.folder / RUN_RECORD, folder / RUN_RECORD)
        return results

    def _best(self, results: Mapping[str, Any]) -> RunResult | None:
        return next((run for run in self._runs if run.folder.name == results["best"]), None)

    def _publish(self, best: RunResult) -> None:
        target = self.folder / BEST
        record = best.record
        if ModelFolder(target).record == record:
            return
        with atomic_folder(target, overwrite=True) as folder:
            shutil.copytree(best.folder, folder, dirs_exist_ok=True)
            write_card(folder, target.name, resolve_base(best.config.base), record)


def _check(configs: Sequence[TrainConfig], folder: Path) -> dict[str, str]:
    """Refuse what would make every run fail, and return the fingerprints of the data and of the dev pairs."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SempaError("A sweep runs in one process, not under accelerate launch. Start it as sempa sweep.")
    if not (folder / JOURNAL).is_file():
        check_output_folder(folder)
    pick_device(configs[0].device)
    sources: dict[str, str] = {}
    for data, skip_bad_rows in dict.fromkeys((config.data, config.skip_bad_rows) for config in configs):
        sources[f"data {data}"] = load_nli(data, skip_bad_rows=skip_bad_rows).fingerprint()
    dev = configs[0].dev
    pairs = dev_pairs(dev, data_dir_or_default(configs[0].data_dir))
    sources[f"dev {dev}"] = fingerprint(zip(pairs.first, pairs.second, pairs.scores, strict=True))
    for base in dict.fromkeys(config.base for config in configs):
        check_not_inside(folder / BEST, [resolve_base(base).folder])
    return sources


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second sweep out of the folder, which would take the first one's run for an interrupted one."""
    lock = folder / ".lock"
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(lock))
        except InUseError as error:
            raise SempaError(
                f"Another sweep is running in {folder}. Wait for it, or choose another --output."
            ) from error
        except OSError as error:
            raise SempaError(
                f"{lock} cannot be written, which keeps two sweeps apart: {error.strerror}. Check the path, "
                "its owner and the free space."
            ) from error
        yield


@contextmanager
def _explain_interruption() -> Iterator[None]:
    try:
        yield
    except BaseException:
        _say("The sweep broke off; the same command goes on with it.")
        raise


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
