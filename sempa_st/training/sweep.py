"""Sweeps: train every point of a grid, or some that a search picks, and keep the model with the best dev score.

Optuna picks the points of a search and records the state of each run in a journal
(:mod:`sempa_st.training.journal`).
"""

from __future__ import annotations

import gc
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState, create_trial

from sempa_st.data.nli import load_nli
from sempa_st.data.sts import dev_pairs
from sempa_st.errors import SempaError
from sempa_st.folder.card import write_card
from sempa_st.folder.formats import RUN_RECORD
from sempa_st.folder.layout import ModelFolder
from sempa_st.training.config import TrainConfig
from sempa_st.training.journal import JOURNAL, open_journal, open_study
from sempa_st.training.launch import is_launched_in_parallel
from sempa_st.training.run import explain_interruption, train
from sempa_st.training.run_folder import RunFolder
from sempa_st.training.run_results import RunResult, assign_folders, results_markdown, results_table, sweep_results
from sempa_st.training.start import find_start
from sempa_st.utils.devices import pick_device
from sempa_st.utils.files import atomic_folder, check_not_inside, check_output_folder, locked, write_json, write_text

Train = Callable[[TrainConfig], object]
BEST = "best"
_MAX_PROPOSALS = 100
"""How many points the sampler may propose without naming an untrained one, before one is drawn at random."""


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
    """Train the untrained points of a grid, and copy the best model to the folder ``best``.

    Args:
        configs: Settings of each point.
        varied: Names of the settings that differ between them.
        output: Folder of the sweep. Earlier runs of the same points are kept or resumed.
        search: Number of points to train, picked by Optuna's TPE sampler with the seed of the first point; None for
            all.
        keep_models: Keep the model of every run instead of the best one alone.
        retry_failed: Retry runs that failed in an earlier call.
        train: Trains one point and writes its model folder.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        SempaError: If the data, a base, the folder or its journal cannot be used, or if no run succeeds.
    """
    folder = Path(output)
    sources = _check(configs, folder)
    # A second sweep would mistake the running one for an interrupted one.
    running = f"Another sweep is running in {folder}. Wait for it, or choose another --output."
    with locked(folder / ".lock", running, "sweeps"):
        storage, names = open_journal(folder, sources)
        points = assign_folders(configs, varied, folder / "runs", names)
        study = open_study(storage, "search" if search else "grid", [point.digest for point in points], sources)
        sweep = _Sweep(folder, points, study, search, keep_models, train)
        with explain_interruption(lambda: "The sweep was interrupted. Run the same command again to continue it."):
            sweep.run_all(retry_failed=retry_failed)
            sweep.ensure_best_model()
            results = sweep.settle()
    if results["best"] is None:
        raise SempaError(
            f"None of the {len(results['runs'])} runs succeeded. The first error: {results['runs'][0]['error']} "
            "Fix it, then pass --retry-failed."
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
        # All trials of a study must list the choices of a parameter in the same order.
        columns = {name: {point.varied[name] for point in self.points} for name in self.points[0].varied}
        self._choices: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(sorted(values, key=str)) for name, values in columns.items()
        }

    def run_all(self, *, retry_failed: bool) -> None:
        """Train the runs that have neither succeeded nor failed; update the results after each."""
        total = min(self.search or len(self.points), len(self.points))
        for number, run in enumerate(self._pick_runs(total) if self.search else self.points, 1):
            label, row = f"[{number}/{total}] {run.label}", run.row()
            if row["state"] == "finished":
                RunFolder(run.folder).clear_finished()
                _say(f"{label}: already trained, dev {row['dev_score']:.2f}")
            elif row["state"] == "failed" and not retry_failed:
                _say(f"{label}: failed before; pass --retry-failed to retry it")
            else:
                _say(label)
                self._start_trial(run)
                self._attempt(run)
                results = self.settle()
                if number < total:
                    _say(results_table(results))
            self._finish_trial(run)

    def _pick_runs(self, count: int) -> Iterator[RunResult]:
        """Yield the runs of a search: first those picked in earlier calls, in their order, then new ones."""
        untrained = {run.digest: run for run in self.points}
        earlier = [digest for digest in self._trials if digest in untrained][:count]
        while len(self._runs) < count:
            self._runs.append(untrained.pop(earlier.pop(0) if earlier else self._pick(untrained)))
            yield self._runs[-1]

    def _pick(self, untrained: Mapping[str, RunResult]) -> str:
        """Return the digest of the point that the sampler proposes next."""
        trials = self.study.trials
        # A new seed for each choice, so that an interrupted search picks the same points when it is continued.
        seed = self.points[0].config.seed + len(trials)
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        study.add_trials(trials)
        # The sampler may propose a trained point, or a combination that no grid of the file contains.
        proposals = (study.ask(self._choices).params for _ in range(_MAX_PROPOSALS))
        picked = next(
            (digest for proposal in proposals for digest, run in untrained.items() if run.varied == proposal), None
        )
        return picked or random.Random(seed).choice(list(untrained))

    def _start_trial(self, run: RunResult) -> None:
        """Add a trial for a run to the study, unless an interrupted one has left it."""
        trial = self._trials.get(run.digest)
        if trial is None or trial.state.is_finished():
            entry = {"digest": run.digest, "name": run.folder.name, "config": asdict(run.config)}
            self.study.add_trial(
                create_trial(
                    state=TrialState.RUNNING, params=dict(run.varied), distributions=self._choices, user_attrs=entry
                )
            )
            self._trials[run.digest] = self.study.get_trials(deepcopy=False)[-1]

    def _finish_trial(self, run: RunResult) -> None:
        """Record the result of a run in the study; the run may come from another grid in the same folder."""
        if run.digest not in self._trials:
            self._start_trial(run)
        trial, score = self._trials[run.digest], run.row().get("dev_score")
        if not trial.state.is_finished():
            self.study.tell(trial.number, score, TrialState.FAIL if score is None else TrialState.COMPLETE)

    def _attempt(self, run: RunResult) -> None:
        """Train a run; if it fails, write down why."""
        run.failure.unlink(missing_ok=True)
        failure = ""
        try:
            self.train(run.settings())
        except SempaError as error:
            failure = str(error)
            write_json(run.failure, {"error": failure, "config": asdict(run.config)})
        # Trainer and model refer to each other. The next run on a large base needs their memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if failure:  # printed after the progress bar is gone
            _say(f"failed: {failure}")

    def ensure_best_model(self) -> None:
        """Train the best run again if its model was deleted because a better one was in the grid then."""
        for _ in self._runs:  # on another processor it may score less than before, and another run be the best
            best = self._best(sweep_results(self._runs))
            if not best or best.has_model:
                return
            _say(f"The model of the best run was deleted earlier; training it again: {best.label}")
            self.train(best.settings())

    def settle(self) -> dict[str, Any]:
        """Write the results, publish the best model and delete the models that are not kept."""
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
            write_card(folder, target.name, find_start(best.config)[0], record)


def _check(configs: Sequence[TrainConfig], folder: Path) -> dict[str, str]:
    """Check what would make every run fail; return the fingerprints of the data and of the dev pairs."""
    if is_launched_in_parallel():
        raise SempaError("A sweep runs in one process, not under a launcher of several. Start it with sempa sweep.")
    if not (folder / JOURNAL).is_file():
        check_output_folder(folder)
    pick_device(configs[0].device)
    sources: dict[str, str] = {}
    for config in {(config.data, config.columns, config.skip_bad_rows): config for config in configs}.values():
        data = load_nli(config.data, skip_bad_rows=config.skip_bad_rows, columns=config.column_names, pairs=True)
        sources[" ".join(filter(None, ["data", config.data, config.columns]))] = data.fingerprint()
    dev = configs[0].dev
    sources[f"dev {dev}"] = dev_pairs(dev, configs[0].data_dir).fingerprint()
    for config in {(config.base, config.from_): config for config in configs}.values():
        base, start = find_start(config)
        check_not_inside(folder / BEST, [base.folder, *([start.folder.path] if start else [])])
        if start:
            sources[f"adapter {config.from_}"] = start.folder.digest
    return sources


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
