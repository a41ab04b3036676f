"""Build the trainer of a run from its loaded settings, data and model."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import datasets
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import get_peft_model
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, TrainingArguments, set_seed
from trl import DPOConfig

from sempa_st.data.nli import NliData
from sempa_st.data.passages import Passages
from sempa_st.data.preferences import preference_rows
from sempa_st.errors import SempaError
from sempa_st.folder.layout import ModelFolder
from sempa_st.model.adapter import left_out, lora_config
from sempa_st.model.base_model import Base
from sempa_st.model.chat_formats import chat_template_sha256
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.tokenizer import prefix_tokens, suffix_tokens
from sempa_st.training.alignment import AlignmentTrainer
from sempa_st.training.callbacks import DEV_METRIC, PairProgress, Patience
from sempa_st.training.checkpoints import Checkpoints
from sempa_st.training.collator import Collator, make_batch_makers
from sempa_st.training.config import TrainConfig
from sempa_st.training.contrastive import ContrastiveTrainer, contrastive_dataset
from sempa_st.training.dev_score import DevScorer, DevScoreTrainer
from sempa_st.training.dpo import PreferenceTrainer
from sempa_st.training.dropout import check_repeatable, disable_dropout
from sempa_st.training.forward import TrainingForward
from sempa_st.training.objectives import SEQUENCE_OBJECTIVES
from sempa_st.training.reference import answers_identity, reference_identity
from sempa_st.training.run_folder import RunFolder
from sempa_st.utils.devices import pick_dtype

_MIN_TRIPLETS_FOR_BARS = 10_000
_NOT_IDENTITY = ("resume", "overwrite", "output", "log_steps", "device")


@dataclass
class RunInputs:
    """The settings, data and model of a run, loaded and checked; see :func:`sempa_st.training.run.load_inputs`."""

    config: TrainConfig
    device: str
    base: Base
    data: NliData
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    scorer: DevScorer
    passages: Passages | None

    @property
    def digests(self) -> dict[str, str | None]:
        """SHA-256 digests (hex) of the texts besides the data that the run reads.

        ``chat_template_sha256`` is None for prompts in plain text.
        """
        texts: dict[str, str | None] = {"kl_text_sha256": self.passages.sha256} if self.passages else {}
        if self.config.objective_weights.keys() & set(SEQUENCE_OBJECTIVES):
            texts["chat_template_sha256"] = chat_template_sha256(self.tokenizer)
        return texts

    @cached_property
    def left_out(self) -> list[str]:
        """Weights that the adapter leaves out, by their names within a layer."""
        return [] if self.config.tuning == "full" else left_out(self.base, _adapter_settings(self))

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the result. A run is resumed only with the same identity."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in _NOT_IDENTITY}
        return (
            settings
            | self.digests
            | {"data_sha256": self.data.fingerprint(), "processes": PartialState().num_processes}
        )


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
    with _bars_if_long(len(inputs.data.triplets)), _dropout_explained():
        if list(config.objective_weights) == ["dpo"] and not config.kl:
            trainer: DevScoreTrainer = _dpo_trainer(inputs, arguments)
        elif list(config.objective_weights) == ["contrastive"] and config.neutral == "none" and not config.kl:
            trainer = _contrastive_trainer(inputs, arguments)
        else:
            trainer = _alignment_trainer(inputs, arguments)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Checkpoints(inputs.identity))
    trainer.add_callback(PairProgress(triplets_per_step, len(inputs.data.triplets)))
    if config.patience:
        trainer.add_callback(Patience(config.patience))
    return trainer


def _dpo_trainer(inputs: RunInputs, arguments: dict[str, Any]) -> PreferenceTrainer:
    config = inputs.config
    adapter = {} if config.tuning == "full" else {"peft_config": _adapter_settings(inputs)}
    examples = preference_rows(inputs.data.triplets, inputs.tokenizer, paraphrase=config.paraphrase)
    # Fully tuned weights are float32, but the computation may use another dtype.
    dtype = pick_dtype(config.dtype, inputs.device)
    identity = reference_identity(inputs.data, inputs.model, dtype, ModelFolder(inputs.base.folder).digest)
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
        module=inputs.scorer.module(_tuned(inputs), TrainingForward()),
        temperature=inputs.config.temperature,
        args=SentenceTransformerTrainingArguments(**arguments),
        train_dataset=contrastive_dataset(inputs.data.triplets),
    )


def _alignment_trainer(inputs: RunInputs, arguments: dict[str, Any]) -> AlignmentTrainer:
    # The reference is the base model before the adapter is attached; it runs on the training device.
    model: Any = inputs.model
    module = inputs.scorer.module(model.to(PartialState().device))
    digest = ModelFolder(inputs.base.folder).digest
    makers = make_batch_makers(inputs.config, inputs.data, inputs.tokenizer, module, digest, inputs.passages)
    tuned = _tuned(inputs)
    return AlignmentTrainer(
        dev_scorer=inputs.scorer,
        config=inputs.config,
        module=inputs.scorer.module(tuned),
        model=tuned,
        args=TrainingArguments(**arguments, remove_unused_columns=False),
        train_dataset=Dataset.from_dict({"index": list(range(len(inputs.data.triplets)))}),
        data_collator=Collator(inputs.data.triplets, makers),
    )


def _tuned(inputs: RunInputs) -> Any:
    """Return the model to train: the base itself, or the frozen base with an adapter."""
    if inputs.config.tuning == "full":
        return inputs.model
    if inputs.config.activation == "template":
        activated = _activated(inputs, suffix_tokens)
        _check_activation(inputs.scorer.module(activated))
        return activated
    if inputs.config.activation == "sentence":
        # Training uses only sentences under the template, where this adapter acts on every token. So it is trained as a
        # plain adapter, with the same initialisation.
        with torch.random.fork_rng():
            activated = _activated(inputs, prefix_tokens)
            _check_activation(inputs.scorer.module(activated))
            activated.unload()
    return get_peft_model(inputs.model, _adapter_settings(inputs))


def _activated(inputs: RunInputs, invocation_tokens: Callable[[Any, str], list[int]]) -> Any:
    """Return the model with an adapter that is activated by some tokens of the template."""
    invocation = invocation_tokens(inputs.scorer.tokenizer, inputs.config.template)
    try:
        return get_peft_model(inputs.model, _adapter_settings(inputs, invocation))
    except ValueError as error:
        raise SempaError(
            f"--activation does not work with {type(inputs.model).__name__}: PEFT has no activated form for all of its "
            f"layers ({error}). Omit it for this base."
        ) from error


def report_left_out(inputs: RunInputs) -> None:
    """Print a warning if the adapter of a run leaves out weights."""
    if inputs.left_out and PartialState().is_main_process:
        print(
            "The adapter leaves out weights that are not linear layers of their own, or that PEFT cannot update: "
            f"{', '.join(inputs.left_out)}.",
            file=sys.stderr,
        )


def _check_activation(module: PromptEOL) -> None:
    """Raise :class:`SempaError` if some layer of this architecture does not tell PEFT the position of a token."""
    features = {name: tensor.to(module.model.device) for name, tensor in module.preprocess(["A cat", "A"]).items()}
    try:
        with torch.no_grad():
            module(features)
    except (IndexError, RuntimeError) as error:
        raise SempaError(
            f"--activation does not work with {type(module.decoder).__name__}: its layers hide the positions of tokens "
            f"from PEFT ({error}). Omit it for this base."
        ) from error


def _adapter_settings(inputs: RunInputs, invocation: list[int] | None = None) -> Any:
    config = inputs.config
    return lora_config(
        inputs.model,
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        layers=config.adapted_layers,
        invocation=invocation,
    )


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


@contextmanager
def _dropout_explained() -> Iterator[None]:
    """Turn PEFT's refusal of dropout on an adapted parameter that is no layer, such as an expert's, into an error."""
    try:
        yield
    except ValueError as error:
        if "lora_dropout" not in str(error):
            raise
        raise SempaError(f"--lora-dropout does not work with this base ({error}) Expected 0.") from error


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
        "report_to": "none",
        "seed": config.seed,
        "data_seed": config.seed,
        "dataloader_pin_memory": inputs.device != "cpu",
        "disable_tqdm": False,  # otherwise the trainer prints its logs beside our bar at quiet log levels
    }
