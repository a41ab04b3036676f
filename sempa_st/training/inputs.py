"""The inputs of a run: settings, data and model, loaded and checked before anything is written."""

from __future__ import annotations

import random
import sys
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sempa_st.data.nli import NliData, load_nli
from sempa_st.data.passages import Passages, read_passages
from sempa_st.data.sts import dev_pairs
from sempa_st.errors import SempaError, list_first
from sempa_st.folder.layout import ModelFolder
from sempa_st.model.adapter import left_out, lora_config
from sempa_st.model.base_model import Base, load_causal_lm, load_config
from sempa_st.model.chat_formats import chat_template, chat_template_sha256
from sempa_st.model.load_options import avoid_broken_sdpa
from sempa_st.model.prompt_eol import embedding_width, within_positions
from sempa_st.model.tokenizer import check_saved_tokenizer, load_tokenizer
from sempa_st.training.answers import drop_too_long
from sempa_st.training.config import TrainConfig
from sempa_st.training.dev_score import DevScorer
from sempa_st.training.objectives import SEQUENCE_OBJECTIVES
from sempa_st.training.start import Start, open_start
from sempa_st.utils.devices import pick_dtype
from sempa_st.utils.extras import require
from sempa_st.utils.files import check_not_inside, check_output_folder, json_digest

_NOT_IDENTITY = ("resume", "overwrite", "output", "log_steps", "device", "report_to")
_NEED_CONTRADICTED = (*SEQUENCE_OBJECTIVES, "one-word")


@dataclass
class RunInputs:
    """The settings, data and model of a run, loaded and checked; see :func:`load_inputs`."""

    config: TrainConfig
    device: str
    base: Base
    data: NliData
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    scorer: DevScorer
    passages: Passages | None
    start: Start | None = None

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
    def start_digest(self) -> str:
        """SHA-256 (hex) of the model that training starts from, which is also the reference."""
        base = ModelFolder(self.base.folder).digest
        if not self.start and not self.config.load_in_4bit:
            return base
        adapter = self.start.folder.digest if self.start else None
        return json_digest({"base": base, "adapter": adapter, "4bit": self.config.load_in_4bit})

    @cached_property
    def left_out(self) -> list[str]:
        """Weights that the adapter leaves out, by their names within a layer."""
        if self.config.tuning == "full":
            return []
        try:
            return left_out(self.base, self.adapter_settings())
        except ValueError as error:
            if not self.start:
                raise
            raise SempaError(
                f"The adapter of --from {self.config.from_} cannot be trained further: PEFT does not make one of its "
                f"settings ({error}). Mend its adapter_config.json, or train on a merged copy (sempa copy --merge)."
            ) from error

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the result. A run is resumed only with the same identity."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in _NOT_IDENTITY}
        start = {"from_sha256": self.start.folder.digest} if self.start else {}
        return {
            **settings,
            **self.digests,
            **start,
            "base_sha256": ModelFolder(self.base.folder).digest,
            "data_sha256": self.data.fingerprint(),
            "dev_sha256": self.scorer.pairs.fingerprint(),
            "processes": PartialState().num_processes,
        }

    def adapter_settings(self, invocation: list[int] | None = None) -> Any:
        """Return PEFT's settings of the adapter, those of the start if there is one.

        Args:
            invocation: Invocation tokens of an activated adapter; a plain one when None.
        """
        config = self.config
        if self.start:
            return PeftConfig.from_pretrained(str(self.start.folder.path))
        return lora_config(
            self.model,
            r=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            layers=config.adapted_layers,
            invocation=invocation,
        )


def load_inputs(config: TrainConfig, device: str) -> RunInputs:
    """Load and check the inputs of a run.

    Args:
        config: Settings of the run; maximum lengths are reduced to the number of positions that the base has.
        device: Device type to train on, such as ``cpu``.

    Raises:
        SempaError: On invalid settings, data, base or output folder.
    """
    if config.load_in_4bit:
        require("bitsandbytes", extra="4bit", purpose="--load-in-4bit")
    if config.report_to != "none":
        require(config.report_to, extra=config.report_to, purpose=f"--report-to {config.report_to}")
    check_output_folder(config.output, overwrite=config.overwrite)
    data = _sample(load_data(config), config)
    pairs = dev_pairs(config.dev, config.data_dir)
    config, base, embedder, start = open_start(config)
    files = [name for name in (config.data, config.dev, config.kl_file) if name]
    if Path(config.chat_format).is_file():
        files.append(config.chat_format)
    folders = [base.folder, *([start.folder.path] if start else [])]
    check_not_inside(config.output, [*folders, *(Path(name) for name in files)])
    config = _fitted(config, load_config(base.folder))
    check_saved_tokenizer(embedder, config.template)
    # Text without the embedding template has a tokenizer of its own, without that template installed.
    tokenizer = load_tokenizer(base.folder)
    tokenizer.chat_template = chat_template(config.chat_format, tokenizer)
    if config.objective_weights.keys() & set(SEQUENCE_OBJECTIVES):
        if tokenizer.chat_template is None and tokenizer.eos_token is None:
            raise SempaError(
                f"The tokenizer of {base.reference} has no end-of-sequence token, with which an answer in plain text "
                "ends. Choose a --chat-format, or an objective of the embedding such as contrastive."
            )
        data = drop_too_long(data, tokenizer, paraphrase=config.paraphrase, max_length=config.max_length)
    model = _load_base(config, base, device)
    scorer = DevScorer(pairs, embedder, config.template, config.max_seq_length, config.dev_batch_size)
    try:
        scorer.module(model)
    except ValueError as error:
        raise SempaError(str(error)) from error
    passages = read_passages(config.kl_file, tokenizer) if config.kl_file else None
    return RunInputs(config, device, base, data, tokenizer, model, scorer, passages, start)


def load_data(config: TrainConfig) -> NliData:
    """Load the triplets or pairs of a run.

    Raises:
        SempaError: If they cannot be read, or are pairs alone and a setting needs contradicted sentences.
    """
    data = load_nli(config.data, skip_bad_rows=config.skip_bad_rows, columns=config.column_names, pairs=True)
    if not data.is_pairs:
        return data
    names = [name for name in config.objective_weights if name in _NEED_CONTRADICTED]
    found = f"{config.data} holds pairs alone, without a column of contradicted sentences (negative or hard_neg)"
    if names:
        raise SempaError(
            f"{found}, and the objective {names[0]} compares with one. Expected contrastive, retrieval or "
            "one-word-listwise, or triplets; --columns names a column that is called otherwise."
        )
    if config.neutral != "none" or config.batch_size == 1:
        raise SempaError(
            f"{found}: the other pairs of a batch are all there is to compare with. Expected --neutral none, and a "
            "--batch-size of 2 or more."
        )
    return data


def _fitted(config: TrainConfig, architecture: Any) -> TrainConfig:
    """Return the settings with lengths that the base has positions for, after a check of the widths."""
    width = embedding_width(architecture)
    if max(config.embedding_widths, default=0) > width:
        raise SempaError(
            f"matryoshka_dims is {config.matryoshka_dims!r}, and the embeddings of {config.base} have {width} "
            "components. Expected no larger number."
        )
    return replace(
        config,
        max_length=within_positions(config.max_length, architecture),
        max_seq_length=within_positions(config.max_seq_length, architecture),
    )


def _load_base(config: TrainConfig, base: Base, device: str) -> PreTrainedModel:
    # Fully tuned weights are stored in float32, whatever dtype the computation uses.
    dtype = torch.float32 if config.tuning == "full" else pick_dtype(config.dtype, device)
    device_map: Any = None if config.device_map == "none" else config.device_map
    if config.load_in_4bit and device_map is None:
        device_map = {"": PartialState().device}  # weights are packed on the device that they stay on
    model = load_causal_lm(base.folder, dtype, load_in_4bit=config.load_in_4bit, device_map=device_map)
    layers: dict[str, Any] = getattr(model, "hf_device_map", {})
    if device != "cpu" and (offloaded := [name for name, where in layers.items() if where in ("cpu", "disk")]):
        raise SempaError(
            f"The GPUs have no room for {list_first(offloaded, 3)} of {base.name}, and parts that are kept elsewhere "
            "cannot be trained on. Add GPUs, or --load-in-4bit."
        )
    avoid_broken_sdpa(model, device)
    return model


def _sample(data: NliData, config: TrainConfig) -> NliData:
    """Return ``max_triplets`` of the triplets, drawn with the seed, or all if there are not more."""
    size = config.max_triplets
    if size is None or size >= len(data.triplets):
        return data
    return replace(data, triplets=random.Random(config.seed).sample(list(data.triplets), size))


def report_inputs(inputs: RunInputs) -> None:
    """Print what the adapter leaves out, and that there are no contradicted sentences, where it is so."""
    left_out = inputs.left_out  # in all processes: once the model has its adapter, it cannot be found out
    if not PartialState().is_main_process:
        return
    if left_out:
        print(
            "The adapter leaves out weights that are not linear layers of their own, or that PEFT cannot update: "
            f"{', '.join(left_out)}.",
            file=sys.stderr,
        )
    if inputs.data.is_pairs:
        print(f"{inputs.config.data} holds pairs alone: the other pairs of a batch are the negatives.", file=sys.stderr)
