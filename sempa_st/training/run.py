"""Train a model: from the settings of a run to a finished model folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from sempa_st.errors import SempaError
from sempa_st.model.patching import attention_implementation
from sempa_st.training.build import build_trainer
from sempa_st.training.callbacks import PairProgress
from sempa_st.training.checkpoints import Checkpoints
from sempa_st.training.config import TrainConfig
from sempa_st.training.divergence import DivergedError
from sempa_st.training.inputs import RunInputs, load_inputs, report_inputs
from sempa_st.training.launch import check_processes, check_sharding
from sempa_st.training.output import KeptModels, ModelWriter
from sempa_st.training.record import dev_scores
from sempa_st.training.reference import cached_tensor, warn_uncached
from sempa_st.training.run_folder import RunFolder
from sempa_st.utils.devices import pick_device

_EXPLAINED: ContextVar[bool] = ContextVar("explained", default=False)
"""Whether an outer block says how to continue."""


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run.

    Args:
        folder: The finished model folder.
        record: The run record, as written to the folder.
        is_main_process: Whether this process should report the result, if there are several.
    """

    folder: Path
    record: dict[str, Any]
    is_main_process: bool = True

    @property
    def score(self) -> float:
        """Dev score of the best checkpoint: Spearman correlation, times 100."""
        return dev_scores(self.record)[self.record["best_step"]]


def train(config: TrainConfig) -> TrainResult:
    """Train a model with the objective of ``config`` and write the model folder ``config.output``.

    Inputs are checked before anything is written. The folder appears complete, at the end.

    Raises:
        SempaError: On invalid settings, data, base or output folder.
    """
    started = time.monotonic()
    device = _pick_device(config)
    state = PartialState(cpu=device == "cpu")
    check_processes(state.num_processes)
    check_sharding(config.objective + (" with --kl" if config.kl else ""))
    warn_uncached.cache_clear()
    run_folder = RunFolder(config.output)
    _on_main_process(run_folder.check_free)
    inputs = load_inputs(config, device)
    _on_main_process(lambda: run_folder.open(inputs.identity, resume=config.resume, overwrite=config.overwrite))
    try:
        with explain_interruption(lambda: run_folder.after_interruption() if state.is_main_process else None):
            report_inputs(inputs)
            trainer = build_trainer(inputs, run_folder)
            # A new adapter changes nothing, so without --from this is the score of the base.
            writer = ModelWriter(config, inputs, started, _base_score(inputs, trainer.generator()))
            if config.keep_checkpoints:
                # A checkpoint is sealed last, so that one to resume from has its model.
                trainer.remove_callback(Checkpoints)
                trainer.add_callback(KeptModels(writer, run_folder.models))
                trainer.add_callback(Checkpoints(inputs.identity))
            try:
                trainer.train(resume_from_checkpoint=run_folder.last_checkpoint() if config.resume else None)
            finally:
                for callback in trainer.callback_handler.callbacks:
                    if isinstance(callback, PairProgress):
                        callback.close()
            record = writer.record(trainer.state)
            _on_main_process(lambda: _finish(writer, run_folder, trainer.state.best_model_checkpoint, record))
    finally:
        run_folder.close()
    return TrainResult(Path(config.output), record, state.is_main_process)


def _base_score(inputs: RunInputs, model: Any) -> float:
    """Return the dev score of the model that training starts from, cached on disk for later runs from the same."""
    config = inputs.config
    identity = {
        "base": inputs.start_digest,
        "dev": inputs.scorer.pairs.fingerprint(),
        "template": config.template,
        "max_seq_length": config.max_seq_length,
        "dtype": str(inputs.model.dtype),
        "attention": attention_implementation(inputs.model.config),
        "device": inputs.device,
    }

    def compute() -> torch.Tensor:
        return torch.tensor(inputs.scorer(model), dtype=torch.float64)

    return float(cached_tensor("spearman", identity, compute, write=PartialState().is_main_process))


def _pick_device(config: TrainConfig) -> str:
    device = pick_device(config.device)
    if ":" in device:
        raise SempaError(
            f"Expected a device type such as cuda, got {device!r}. Select a device with CUDA_VISIBLE_DEVICES."
        )
    processes = PartialState(cpu=device == "cpu").num_processes
    if config.device_map != "none" and processes > 1:
        raise SempaError(f"--device-map spreads one model over all GPUs, and {processes} processes run. Start one.")
    if device == "cuda" and torch.cuda.device_count() > 1 and processes == 1 and config.device_map == "none":
        count = torch.cuda.device_count()
        raise SempaError(
            f"{count} GPUs are visible to one process. To use them all: accelerate launch --num_processes {count} "
            "-m sempa_st train ...; to use one, set CUDA_VISIBLE_DEVICES."
        )
    return device


def _on_main_process(action: Callable[[], None]) -> None:
    """Run ``action`` on the main process while the others wait; its error is raised in all of them."""
    state = PartialState()
    message: list[str | None] = [None]
    if state.is_main_process:
        try:
            action()
        except (SempaError, OSError) as error:
            if state.num_processes == 1:
                raise
            message = [str(error)]
    if state.num_processes > 1:
        broadcast_object_list(message)
    if message[0] is not None:
        raise SempaError(message[0])


@contextmanager
def explain_interruption(explain: Callable[[], str | None]) -> Iterator[None]:
    """Print how to continue when an exception interrupts training, and let the exception pass.

    Of a run within a sweep nothing is printed, since it is the sweep that is continued.

    Args:
        explain: Called on an exception; returns the line to print, or None.
    """
    is_outer = not _EXPLAINED.get()
    before = _EXPLAINED.set(True)
    try:
        yield
    except DivergedError:
        if is_outer:
            print(
                "Going on from its checkpoints would end there again: change a setting, and give --overwrite.",
                file=sys.stderr,
            )
        raise
    except BaseException:
        if (line := explain()) and is_outer:
            print(line, file=sys.stderr, flush=True)
        raise
    finally:
        _EXPLAINED.reset(before)


def _finish(writer: ModelWriter, run_folder: RunFolder, best: str | None, record: dict[str, Any]) -> None:
    """Write the model folder from the best checkpoint, then remove the folder of the run, kept models excepted."""
    if best is None:
        raise SempaError(
            f"The run has no complete checkpoint with a dev score in {run_folder.path}. Start again with --overwrite."
        )
    config = writer.inputs.config
    writer.write(Path(best), Path(config.output), record, overwrite=config.overwrite, run=run_folder.path)
    run_folder.remove(models=False)
