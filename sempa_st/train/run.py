"""One training run from its settings to a finished model folder."""

from __future__ import annotations

import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, set_seed
from trl import DPOConfig

from sempa_st.adapters import lora_config
from sempa_st.bases import Base, load_causal_lm, load_tokenizer, resolve_base
from sempa_st.card import write_card
from sempa_st.config import TrainConfig
from sempa_st.devices import pick_device, pick_dtype
from sempa_st.errors import SempaError
from sempa_st.files import atomic_folder, check_apart, check_output_folder, write_json
from sempa_st.folder import (
    RUN_RECORD,
    check_saved_tokenizer,
    install_template,
    set_base_reference,
    write_embedding_files,
)
from sempa_st.nli import NliData, load_nli
from sempa_st.preferences import preference_rows
from sempa_st.prompt_eol import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PromptEOL, embedding_width
from sempa_st.prompts import embedding_template
from sempa_st.stsdata import data_dir_or_default, dev_pairs
from sempa_st.train.callbacks import DEV_METRIC, PairProgress
from sempa_st.train.record import run_record
from sempa_st.train.trainer import DevScorer, SempaTrainer
from sempa_st.train.workdir import WorkDir

_ROWS_WORTH_A_BAR = 10_000
_NOT_IDENTITY = ("resume", "overwrite", "output", "log_steps", "device")


@dataclass
class Ingredients:
    """All that a run is made of, loaded and checked."""

    config: TrainConfig
    device: str
    base: Base
    data: NliData
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    scorer: DevScorer

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result; a run is only resumed with the same."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in _NOT_IDENTITY}
        return settings | {"data_sha256": self.data.fingerprint(), "processes": PartialState().num_processes}


def train(config: TrainConfig) -> tuple[dict[str, Any], bool]:
    """Train an adapter with DPO and write the model folder at ``config.output``.

    What can be refused is refused before anything is written; the folder appears whole, at the end.

    Returns:
        The run record, as written to the folder, and whether this process is the one to report it.

    Raises:
        SempaError: On bad settings, data, base or output folder.
    """
    started = time.monotonic()
    device = _pick_device(config)
    state = PartialState(cpu=device == "cpu")
    parts = _gather(config, device)
    work = WorkDir(config.output)
    _on_main_process(lambda: work.open(parts.identity, resume=config.resume, overwrite=config.overwrite))
    with _broken_off(work):
        trainer = _trainer(parts, work)
        # The adapter starts at zero: this is the base's score.
        base_score = work.base_score(lambda: parts.scorer(trainer.model), write=state.is_main_process)
        trainer.train(resume_from_checkpoint=work.last_checkpoint() if config.resume else None)
    record = run_record(
        config,
        parts.base,
        parts.data,
        trainer.state,
        base_score=base_score,
        dev_pairs=parts.scorer.pairs,
        seconds=time.monotonic() - started,
    )
    _on_main_process(lambda: _finish(parts, work, trainer.state.best_model_checkpoint, record))
    return record, state.is_main_process


def _pick_device(config: TrainConfig) -> str:
    device = pick_device(config.device)
    if ":" in device:
        raise SempaError(f"Training takes a kind of device, got {device!r}. Choose one with CUDA_VISIBLE_DEVICES.")
    if device == "cuda" and torch.cuda.device_count() > 1 and PartialState().num_processes == 1:
        count = torch.cuda.device_count()
        raise SempaError(
            f"{count} GPUs are visible to one process. To use them all: accelerate launch --num_processes {count} "
            "-m sempa_st train ...; to use one, set CUDA_VISIBLE_DEVICES."
        )
    return device


def _gather(config: TrainConfig, device: str) -> Ingredients:
    check_output_folder(config.output, overwrite=config.overwrite)
    data = _draw(load_nli(config.data, skip_bad_rows=config.skip_bad_rows), config)
    pairs = dev_pairs(config.dev, data_dir_or_default(config.data_dir))
    base = resolve_base(config.base)
    check_apart(config.output, [base.folder, *(Path(name) for name in (config.data, config.dev))])
    embedder = load_tokenizer(base.folder)
    install_template(embedder, embedding_template(config.template))
    check_saved_tokenizer(embedder, config.template)
    model = load_causal_lm(base.folder, pick_dtype(config.dtype, device))
    try:
        PromptEOL(model, embedder, template=config.template, max_seq_length=config.max_seq_length)
    except ValueError as error:
        raise SempaError(str(error)) from error
    scorer = DevScorer(
        pairs,
        embedder,
        template=config.template,
        max_seq_length=config.max_seq_length,
        batch_size=config.dev_batch_size,
    )
    # A tokenizer of its own for the training text, which the embedding template has no place in.
    return Ingredients(config, device, base, data, load_tokenizer(base.folder), model, scorer)


def _draw(data: NliData, config: TrainConfig) -> NliData:
    wanted = config.max_triplets
    if wanted is None or wanted >= len(data.triplets):
        return data
    return replace(data, triplets=random.Random(config.seed).sample(list(data.triplets), wanted))


def _on_main_process(action: Callable[[], None]) -> None:
    """Run ``action`` on the main process while the others wait; if it refuses, all of them do."""
    state = PartialState()
    refusal: list[str | None] = [None]
    if state.is_main_process:
        try:
            action()
        except (SempaError, OSError) as error:
            if state.num_processes == 1:
                raise
            refusal = [str(error)]
    if state.num_processes > 1:
        broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise SempaError(refusal[0])


@contextmanager
def _broken_off(work: WorkDir) -> Iterator[None]:
    """When a run breaks off, say how to go on, or remove its folder if it has no checkpoint to go on from."""
    try:
        yield
    except BaseException:
        if PartialState().is_main_process:
            if work.last_checkpoint() is None:
                work.remove()
            else:
                print(f"Checkpoints are kept in {work.path}; the same command with --resume goes on.", file=sys.stderr)
        raise


def _trainer(parts: Ingredients, work: WorkDir) -> SempaTrainer:
    config = parts.config
    set_seed(config.seed)
    rows = preference_rows(parts.data.triplets, parts.tokenizer, paraphrase=config.paraphrase)
    pairs_per_step = config.batch_size * config.gradient_accumulation * PartialState().num_processes
    with _bars_for(len(rows)):
        trainer = SempaTrainer(
            dev_scorer=parts.scorer,
            model=parts.model,
            args=_arguments(parts, work, pairs_per_step),
            train_dataset=Dataset.from_list(rows),
            processing_class=parts.tokenizer,
            peft_config=lora_config(parts.model, r=config.lora_r, alpha=config.lora_alpha),
        )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(PairProgress(pairs_per_step, len(rows)))
    return trainer


@contextmanager
def _bars_for(rows: int) -> Iterator[None]:
    """Show the bars of the data preparation only where it takes long enough to watch."""
    hide = rows < _ROWS_WORTH_A_BAR and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


def _arguments(parts: Ingredients, work: WorkDir, pairs_per_step: int) -> DPOConfig:
    config, dtype = parts.config, parts.model.dtype
    steps = math.ceil(config.epochs * len(parts.data.triplets) / pairs_per_step)
    # The first step of a warm-up has rate 0. A run too short to warm up does without, and no checkpoint is taken
    # before the adapter has moved.
    warmup = config.warmup_ratio if config.warmup_ratio * steps >= 1 else 0
    checkpoint_steps = max(2 if warmup else 1, math.ceil(config.checkpoint_samples / pairs_per_step))
    return DPOConfig(
        output_dir=str(work.checkpoints),
        beta=config.beta,
        max_length=config.max_length,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=warmup,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
        optim="adamw_torch",
        gradient_checkpointing=config.gradient_checkpointing,
        use_cpu=parts.device == "cpu",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        eval_strategy="steps",
        eval_steps=checkpoint_steps,
        save_strategy="steps",
        save_steps=checkpoint_steps,
        save_total_limit=2,
        metric_for_best_model=DEV_METRIC,
        greater_is_better=True,
        logging_steps=config.log_steps,
        report_to="none",
        seed=config.seed,
        data_seed=config.seed,
        dataloader_pin_memory=parts.device != "cpu",
        disable_tqdm=False,  # at a quiet log level the trainer would print its figures instead, beside our bar
    )


def _finish(parts: Ingredients, work: WorkDir, best: str | None, record: dict[str, Any]) -> None:
    """Write the model folder from the best checkpoint, and only then remove the run's own folder."""
    if best is None:
        raise SempaError(f"The run has no checkpoint with a dev score; its state is left in {work.path}.")
    config = parts.config
    with atomic_folder(config.output, overwrite=config.overwrite) as folder:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(Path(best) / name, folder / name)
        set_base_reference(folder, parts.base.reference)
        write_embedding_files(
            folder,
            parts.scorer.tokenizer,
            template=config.template,
            max_seq_length=config.max_seq_length,
            width=embedding_width(parts.model.config),
            format=config.format,
        )
        write_json(folder / RUN_RECORD, record)
        write_card(folder, Path(config.output).resolve().name, parts.base, record)
    work.remove()
