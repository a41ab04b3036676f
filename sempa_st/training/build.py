"""Build the trainer of a run from its loaded settings, data and model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from accelerate import PartialState
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import ProgressCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from trl import DPOConfig

from sempa_st.data.preferences import preference_rows
from sempa_st.forward.fused_lora import fuse_updates
from sempa_st.training.alignment import AlignmentTrainer
from sempa_st.training.callbacks import DEV_METRIC, PairProgress, Patience
from sempa_st.training.checkpoints import Checkpoints
from sempa_st.training.collator import Collator, make_batch_makers
from sempa_st.training.contrastive import ContrastiveTrainer, contrastive_dataset
from sempa_st.training.dev_score import DevScoreTrainer
from sempa_st.training.dpo import PreferenceTrainer
from sempa_st.training.dropout import check_repeatable, disable_dropout
from sempa_st.training.forward import TrainingForward
from sempa_st.training.inputs import RunInputs
from sempa_st.training.reference import answers_identity, reference_identity
from sempa_st.training.run_folder import RunFolder
from sempa_st.training.tuned import explain_dropout, tuned_model
from sempa_st.utils.devices import pick_dtype

_MIN_TRIPLETS_FOR_BARS = 10_000


def build_trainer(inputs: RunInputs, run_folder: RunFolder) -> DevScoreTrainer:
    """Return the trainer for the run's objective, with the adapter attached and the reference computed.

    Args:
        inputs: Inputs of the run.
        run_folder: Folder of the run, for the checkpoints.
    """
    config = inputs.config
    set_seed(config.seed)
    triplets_per_step = config.batch_size * config.gradient_accumulation * PartialState().num_processes
    arguments = _arguments(inputs, run_folder, triplets_per_step)
    disable_dropout(inputs.model)
    if config.has_reference:
        check_repeatable(inputs.model)
    with _bars_if_long(len(inputs.data.triplets)), explain_dropout():
        trainer = _MAKERS[config.library](inputs, arguments)
    if inputs.device == "cpu":  # elsewhere other libraries may hold the weights, and hand them out layer by layer
        fuse_updates(trainer.generator())
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Checkpoints(inputs.identity))
    trainer.add_callback(PairProgress(triplets_per_step, len(inputs.data.triplets)))
    if config.report_to == "tensorboard":
        trainer.add_callback(_tensorboard(run_folder))
    if config.patience:
        trainer.add_callback(Patience(config.patience))
    return trainer


def _tensorboard(run_folder: RunFolder) -> TensorBoardCallback:
    """Return a callback that writes beside the output folder, since the trainer's own place is gone after the run."""
    callback = TensorBoardCallback()
    callback.logging_dir = str(run_folder.logs / time.strftime("%Y-%m-%d_%H-%M-%S"))
    return callback


def _dpo_trainer(inputs: RunInputs, arguments: dict[str, Any]) -> PreferenceTrainer:
    config = inputs.config
    adapter = {} if config.tuning == "full" else {"peft_config": inputs.adapter_settings()}
    examples = preference_rows(inputs.data.triplets, inputs.tokenizer, paraphrase=config.paraphrase)
    # Fully tuned weights are float32, but the computation may use another dtype.
    dtype = pick_dtype(config.dtype, inputs.device)
    identity = reference_identity(inputs.data, inputs.model, dtype, inputs.start_digest)
    return PreferenceTrainer(
        dev_scorer=inputs.scorer,
        reference_identity=answers_identity(config, identity, inputs.tokenizer, 2),
        model=inputs.model,
        args=DPOConfig(
            **arguments,
            beta=config.beta,
            max_length=config.max_length,
            precompute_ref_log_probs=True,
            disable_dropout=False,  # the base has none left, and the adapter's is wanted
            router_aux_loss_coef=0.0,  # the paper's loss has no term of the routers, which are not trained
        ),
        train_dataset=Dataset.from_list(examples),
        processing_class=inputs.tokenizer,
        **adapter,
    )


def _contrastive_trainer(inputs: RunInputs, arguments: dict[str, Any]) -> ContrastiveTrainer:
    return ContrastiveTrainer(
        dev_scorer=inputs.scorer,
        module=inputs.scorer.module(tuned_model(inputs), TrainingForward()),
        temperature=inputs.config.temperature,
        widths=inputs.config.embedding_widths,
        args=SentenceTransformerTrainingArguments(**arguments),
        train_dataset=contrastive_dataset(inputs.data.triplets),
    )


def _alignment_trainer(inputs: RunInputs, arguments: dict[str, Any]) -> AlignmentTrainer:
    # The reference is the model that training starts from; it runs on the training device. A new adapter changes
    # nothing, so it is attached afterwards.
    model: Any = inputs.model
    if inputs.config.device_map == "none":
        model = model.to(PartialState().device)
    tuned = tuned_model(inputs) if inputs.start else None
    module = inputs.scorer.module(tuned or model)
    makers = make_batch_makers(
        inputs.config, inputs.data, inputs.tokenizer, module, inputs.start_digest, inputs.passages
    )
    tuned = tuned or tuned_model(inputs)
    return AlignmentTrainer(
        dev_scorer=inputs.scorer,
        config=inputs.config,
        module=inputs.scorer.module(tuned),
        model=tuned,
        args=TrainingArguments(**arguments, remove_unused_columns=False),
        train_dataset=Dataset.from_dict({"index": list(range(len(inputs.data.triplets)))}),
        data_collator=Collator(inputs.data.triplets, makers),
    )


_MAKERS: dict[str | None, Callable[[RunInputs, dict[str, Any]], DevScoreTrainer]] = {
    "trl": _dpo_trainer,
    "sentence-transformers": _contrastive_trainer,
    None: _alignment_trainer,
}
"""Function that makes the trainer, by :attr:`TrainConfig.library`."""


@contextmanager
def _bars_if_long(num_triplets: int) -> Iterator[None]:
    """Show the progress bars of data preparation only if there is enough data to wait for."""
    hide = num_triplets < _MIN_TRIPLETS_FOR_BARS and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


def _arguments(inputs: RunInputs, run_folder: RunFolder, triplets_per_step: int) -> dict[str, Any]:
    """Return the training arguments that all trainers share."""
    config, dtype = inputs.config, pick_dtype(inputs.config.dtype, inputs.device)
    steps = math.ceil(config.epochs * len(inputs.data.triplets) / triplets_per_step)
    # The learning rate of the first warm-up step is 0. So a run too short for warm-up has none, and no checkpoint is
    # saved before the adapter has changed.
    warmup = config.warmup_ratio if config.warmup_ratio * steps >= 1 else 0
    checkpoint_steps = max(2 if warmup else 1, math.ceil(config.checkpoint_samples / triplets_per_step))
    return {
        "output_dir": str(run_folder.checkpoints),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": warmup,
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "max_grad_norm": config.max_grad_norm,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "weight_decay": config.weight_decay,
        "optim": "adamw_torch",
        "gradient_checkpointing": config.gradient_checkpointing,
        "use_cpu": inputs.device == "cpu",
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "eval_strategy": "steps",
        "eval_steps": checkpoint_steps,
        "save_strategy": "steps",
        "save_steps": checkpoint_steps,
        "metric_for_best_model": DEV_METRIC,
        "greater_is_better": True,
        "logging_steps": config.log_steps,
        "report_to": "none" if config.report_to == "tensorboard" else config.report_to,
        "run_name": run_folder.output.name,
        "project": "sempa",
        "seed": config.seed,
        "data_seed": config.seed,
        "dataloader_pin_memory": inputs.device != "cpu",
        "disable_tqdm": False,  # otherwise the trainer prints its logs beside our bar at quiet log levels
    }
