"""Train a model: from the settings of a run to a finished model folder."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from sempa_st.data.nli import NliData, load_nli
from sempa_st.data.passages import read_passages
from sempa_st.data.sts import dev_pairs
from sempa_st.errors import SempaError
from sempa_st.folder.layout import ModelFolder
from sempa_st.model.base_model import load_causal_lm, load_config, resolve_base
from sempa_st.model.chat_formats import chat_template
from sempa_st.model.patching import attention_implementation, avoid_broken_sdpa
from sempa_st.model.prompt_eol import within_positions
from sempa_st.model.templates import embedding_template
from sempa_st.model.tokenizer import check_saved_tokenizer, install_template, load_tokenizer
from sempa_st.training.answers import drop_too_long
from sempa_st.training.build import RunInputs, build_trainer, report_left_out
from sempa_st.training.checkpoints import Checkpoints
from sempa_st.training.config import TrainConfig
from sempa_st.training.dev_score import DevScorer
from sempa_st.training.launch import check_processes, check_sharding
from sempa_st.training.objectives import SEQUENCE_OBJECTIVES
from sempa_st.training.output import KeptModels, ModelWriter
from sempa_st.training.record import dev_scores
from sempa_st.training.reference import cached_tensor, warn_uncached
from sempa_st.training.run_folder import RunFolder
from sempa_st.utils.devices import pick_device, pick_dtype
from sempa_st.utils.files import check_not_inside, check_output_folder


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
            report_left_out(inputs)
            trainer = build_trainer(inputs, run_folder)
            # A new adapter changes nothing, so this is the score of the base.
            writer = ModelWriter(config, inputs, started, _base_score(inputs, trainer.generator()))
            if config.keep_checkpoints:
                # A checkpoint is sealed last, so that one to resume from has its model.
                trainer.remove_callback(Checkpoints)
                trainer.add_callback(KeptModels(writer, run_folder.models))
                trainer.add_callback(Checkpoints(inputs.identity))
            trainer.train(resume_from_checkpoint=run_folder.last_checkpoint() if config.resume else None)
            record = writer.record(trainer.state)
            _on_main_process(lambda: _finish(writer, run_folder, trainer.state.best_model_checkpoint, record))
    finally:
        run_folder.close()
    return TrainResult(Path(config.output), record, state.is_main_process)


def _base_score(inputs: RunInputs, model: Any) -> float:
    """Return the dev score of the untrained model, cached on disk for later runs on the same base."""
    config = inputs.config
    identity = {
        "base": ModelFolder(inputs.base.folder).digest,
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
    if device == "cuda" and torch.cuda.device_count() > 1 and PartialState().num_processes == 1:
        count = torch.cuda.device_count()
        raise SempaError(
            f"{count} GPUs are visible to one process. To use them all: accelerate launch --num_processes {count} "
            "-m sempa_st train ...; to use one, set CUDA_VISIBLE_DEVICES."
        )
    return device


def load_inputs(config: TrainConfig, device: str) -> RunInputs:
    """Load and check the inputs of a run.

    Args:
        config: Settings of the run; maximum lengths are reduced to the number of positions that the base has.
        device: Device type to train on, such as ``cpu``.

    Raises:
        SempaError: On invalid settings, data, base or output folder.
    """
    check_output_folder(config.output, overwrite=config.overwrite)
    data = _sample(load_nli(config.data, skip_bad_rows=config.skip_bad_rows), config)
    pairs = dev_pairs(config.dev, config.data_dir)
    base = resolve_base(config.base)
    files = [name for name in (config.data, config.dev, config.kl_text) if name]
    if Path(config.chat_format).is_file():
        files.append(config.chat_format)
    check_not_inside(config.output, [base.folder, *(Path(name) for name in files)])
    architecture = load_config(base.folder)
    config = replace(
        config,
        max_length=within_positions(config.max_length, architecture),
        max_seq_length=within_positions(config.max_seq_length, architecture),
    )
    embedder = load_tokenizer(base.folder)
    install_template(embedder, embedding_template(config.template))
    check_saved_tokenizer(embedder, config.template)
    # Text without the embedding template has a tokenizer of its own, without that template installed.
    tokenizer = load_tokenizer(base.folder)
    tokenizer.chat_template = chat_template(config.chat_format, tokenizer)
    if config.objective_weights.keys() & set(SEQUENCE_OBJECTIVES):
        data = drop_too_long(data, tokenizer, paraphrase=config.paraphrase, max_length=config.max_length)
    # Fully tuned weights are stored in float32, whatever dtype the computation uses.
    dtype = torch.float32 if config.tuning == "full" else pick_dtype(config.dtype, device)
    model = load_causal_lm(base.folder, dtype)
    avoid_broken_sdpa(model, device)
    scorer = DevScorer(pairs, embedder, config.template, config.max_seq_length, config.dev_batch_size)
    try:
        scorer.module(model)
    except ValueError as error:
        raise SempaError(str(error)) from error
    passages = read_passages(config.kl_text, tokenizer) if config.kl_text else None
    return RunInputs(config, device, base, data, tokenizer, model, scorer, passages)


def _sample(data: NliData, config: TrainConfig) -> NliData:
    """Return ``max_triplets`` of the triplets, drawn with the seed, or all if there are not more."""
    size = config.max_triplets
    if size is None or size >= len(data.triplets):
        return data
    return replace(data, triplets=random.Random(config.seed).sample(list(data.triplets), size))


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

    Args:
        explain: Called on an exception; returns the line to print, or None.
    """
    try:
        yield
    except BaseException:
        if line := explain():
            print(line, file=sys.stderr, flush=True)
        raise


def _finish(writer: ModelWriter, run_folder: RunFolder, best: str | None, record: dict[str, Any]) -> None:
    """Write the model folder from the best checkpoint, then remove the folder of the run, kept models excepted."""
    if best is None:
        raise SempaError(
            f"The run has no complete checkpoint with a dev score in {run_folder.path}. Start again with --overwrite."
        )
    config = writer.inputs.config
    writer.write(Path(best), Path(config.output), record, overwrite=config.overwrite)
    run_folder.remove(models=False)
