"""From checked settings, data and model to a trainer that is ready to run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from sempa_st.model.adapter import lora_config
from sempa_st.model.base_model import Base
from sempa_st.model.prompt_eol import ForwardRows, PromptEOL
from sempa_st.model.tokenizer import prefix_tokens, suffix_tokens
from sempa_st.training.alignment import AlignmentTrainer, make_batch_makers
from sempa_st.training.batches import Collator
from sempa_st.training.callbacks import DEV_METRIC, PairProgress, Patience
from sempa_st.training.checkpoints import Checkpoints
from sempa_st.training.config import TrainConfig
from sempa_st.training.contrastive import ContrastiveTrainer, contrastive_rows
from sempa_st.training.dev_score import DevScorer, DevScoreTrainer
from sempa_st.training.dpo import PreferenceTrainer
from sempa_st.training.forward import TrainingForward
from sempa_st.training.reference import answers_identity, reference_identity
from sempa_st.training.run_folder import RunFolder
from sempa_st.utils.devices import pick_dtype

_ROWS_WORTH_A_BAR = 10_000
_NOT_IDENTITY = ("resume", "overwrite", "output", "log_steps", "device")


@dataclass
class RunInputs:
    """All that a run is made of, loaded and checked."""

    config: TrainConfig
    device: str
    base: Base
    data: NliData
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    scorer: DevScorer
    passages: Passages | None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result; a run is only resumed with the same."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in _NOT_IDENTITY}
        texts = {"kl_text_sha256": self.passages.sha256} if self.passages else {}
        return settings | texts | {"data_sha256": self.data.fingerprint(), "processes": PartialState().num_processes}


def build_trainer(parts: RunInputs, work: RunFolder) -> DevScoreTrainer:
    """Return the trainer of the run's objective, its adapter attached and its reference computed.

    Args:
        parts: RunInputs of the run.
        work: Folder for the checkpoints.
    """
    config = parts.config
    set_seed(config.seed)
    rows_per_step = config.batch_size * config.gradient_accumulation * PartialState().num_processes
    arguments = _arguments(parts, work, rows_per_step)
    with _bars_for(len(parts.data.triplets)):
        if list(config.objective_weights) == ["dpo"] and not config.kl:
            trainer: DevScoreTrainer = _dpo_trainer(parts, arguments)
        elif list(config.objective_weights) == ["contrastive"] and config.neutral == "none" and not config.kl:
            trainer = _contrastive_trainer(parts, arguments)
        else:
            trainer = _alignment_trainer(parts, arguments)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Checkpoints(parts.identity))
    trainer.add_callback(PairProgress(rows_per_step, len(parts.data.triplets)))
    if config.patience:
        trainer.add_callback(Patience(config.patience))
    return trainer


def _dpo_trainer(parts: RunInputs, arguments: dict[str, Any]) -> PreferenceTrainer:
    config = parts.config
    adapter = {} if config.tuning == "full" else {"peft_config": _adapter_settings(parts)}
    rows = preference_rows(parts.data.triplets, parts.tokenizer, paraphrase=config.paraphrase)
    # Weights that are trained themselves are float32; the arithmetic need not be.
    dtype = pick_dtype(config.dtype, parts.device)
    identity = reference_identity(parts.data, parts.model, dtype, ModelFolder(parts.base.folder).digest)
    return PreferenceTrainer(
        dev_scorer=parts.scorer,
        reference=answers_identity(config, identity, 2),
        model=parts.model,
        args=DPOConfig(**arguments, beta=config.beta, max_length=config.max_length, precompute_ref_log_probs=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=parts.tokenizer,
        **adapter,
    )


def _contrastive_trainer(parts: RunInputs, arguments: dict[str, Any]) -> ContrastiveTrainer:
    return ContrastiveTrainer(
        dev_scorer=parts.scorer,
        module=_module(parts, _tuned(parts), TrainingForward()),
        temperature=parts.config.temperature,
        args=SentenceTransformerTrainingArguments(**arguments),
        train_dataset=contrastive_rows(parts.data.triplets),
    )


def _alignment_trainer(parts: RunInputs, arguments: dict[str, Any]) -> AlignmentTrainer:
    # The reference is the base as it stands before it gets an adapter; it runs where the training will.
    model: Any = parts.model
    module = _module(parts, model.to(PartialState().device))
    digest = ModelFolder(parts.base.folder).digest
    makers = make_batch_makers(parts.config, parts.data, parts.tokenizer, module, digest, parts.passages)
    tuned = _tuned(parts)
    return AlignmentTrainer(
        dev_scorer=parts.scorer,
        config=parts.config,
        module=_module(parts, tuned),
        model=tuned,
        args=TrainingArguments(**arguments, remove_unused_columns=False),
        train_dataset=Dataset.from_dict({"index": list(range(len(parts.data.triplets)))}),
        data_collator=Collator(parts.data.triplets, makers),
    )


def _tuned(parts: RunInputs) -> Any:
    """Return the model to train: with an adapter, the base frozen, or the base itself."""
    if parts.config.tuning == "full":
        return parts.model
    if parts.config.activation == "template":
        activated = _activated(parts, suffix_tokens)
        _check_activation(_module(parts, activated))
        return activated
    if parts.config.activation == "sentence":
        # All that is trained on is under the template, where the adapter acts on the whole row like any other. So it
        # is trained as a plain one, from the same start.
        with torch.random.fork_rng():
            activated = _activated(parts, prefix_tokens)
            _check_activation(_module(parts, activated))
            activated.unload()
    return get_peft_model(parts.model, _adapter_settings(parts))


def _activated(parts: RunInputs, tokens: Callable[[Any, str], list[int]]) -> Any:
    invocation = tokens(parts.scorer.tokenizer, parts.config.template)
    return get_peft_model(parts.model, _adapter_settings(parts, invocation))


def _check_activation(module: PromptEOL) -> None:
    """Raise :class:`SempaError` if PEFT cannot tell the tokens of a row apart in every layer of this architecture."""
    features = {name: tensor.to(module.model.device) for name, tensor in module.preprocess(["A cat", "A"]).items()}
    try:
        with torch.no_grad():
            module(features)
    except (IndexError, RuntimeError) as error:
        raise SempaError(
            f"--activation does not work with {type(module.decoder).__name__}, whose layers hide from PEFT "
            f"which token is which ({error}). Leave it out for this base."
        ) from error


def _adapter_settings(parts: RunInputs, invocation: list[int] | None = None) -> Any:
    config = parts.config
    return lora_config(
        parts.model,
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        layers=config.adapted_layers,
        invocation=invocation,
    )


def _module(parts: RunInputs, model: Any, forward_rows: ForwardRows | None = None) -> PromptEOL:
    return PromptEOL(
        model,
        parts.scorer.tokenizer,
        template=parts.config.template,
        max_seq_length=parts.config.max_seq_length,
        forward_rows=forward_rows,
    )


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


def _arguments(parts: RunInputs, work: RunFolder, rows_per_step: int) -> dict[str, Any]:
    """Return the arguments that all of the trainers take."""
    config, dtype = parts.config, pick_dtype(parts.config.dtype, parts.device)
    steps = math.ceil(config.epochs * len(parts.data.triplets) / rows_per_step)
    # The first step of a warm-up has rate 0. A run too short to warm up does without, and no checkpoint is taken
    # before the adapter has moved.
    warmup = config.warmup_ratio if config.warmup_ratio * steps >= 1 else 0
    checkpoint_steps = max(2 if warmup else 1, math.ceil(config.checkpoint_samples / rows_per_step))
    return {
        "output_dir": str(work.checkpoints),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": warmup,
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "max_grad_norm": config.max_grad_norm,
        "weight_decay": config.weight_decay,
        "optim": "adamw_torch",
        "gradient_checkpointing": config.gradient_checkpointing,
        "use_cpu": parts.device == "cpu",
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
        "dataloader_pin_memory": parts.device != "cpu",
        "disable_tqdm": False,  # at a quiet log level the trainer would print its figures instead, beside our bar
    }
