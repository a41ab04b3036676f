"""All settings of a training run. Standard library only, so that the command line can show them quickly."""

from __future__ import annotations

from dataclasses import dataclass

from sempa_st.bases import EMBEDDED_BASE
from sempa_st.devices import DTYPES
from sempa_st.errors import SempaError
from sempa_st.options import option
from sempa_st.prompts import DEFAULT_PARAPHRASE, DEFAULT_TEMPLATE, EMBEDDING_TEMPLATES, PARAPHRASE_TEMPLATES


@dataclass
class TrainConfig:
    """Settings of ``sempa train``; the defaults are the paper's where the paper has one (PAPER section "Training").

    Raises:
        SempaError: If a value is out of range; the message names it.
    """

    base: str = option(EMBEDDED_BASE, "base model: Hub id, local folder, or the embedded default")
    data: str = option("", "NLI data: Hub id, csv, jsonl or parquet file, or 'sample'")
    output: str = option("", "folder to write the model to")
    paraphrase: str = option(DEFAULT_PARAPHRASE, "paraphrase instruction", choices=tuple(PARAPHRASE_TEMPLATES))
    template: str = option(DEFAULT_TEMPLATE, "embedding template", choices=tuple(EMBEDDING_TEMPLATES))
    max_triplets: int | None = option(None, "train on this many triplets, drawn at random with the seed")
    beta: float = option(0.1, "DPO's beta, above 0")
    learning_rate: float = option(1e-4, "peak learning rate")
    warmup_ratio: float = option(0.05, "share of the steps in which the rate rises linearly; then cosine decay")
    epochs: float = option(1.0, "passes over the data")
    batch_size: int = option(8, "preference pairs per device and forward pass")
    gradient_accumulation: int = option(8, "forward passes per step")
    max_length: int = option(1024, "longest training sequence in tokens, prompt and answer")
    max_grad_norm: float = option(1.0, "gradient norm to clip to")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    lora_r: int = option(8, "LoRA rank")
    lora_alpha: int = option(32, "LoRA scale")
    dtype: str = option("auto", "type of the frozen weights and of the arithmetic", choices=DTYPES)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    checkpoint_samples: int = option(19_968, "triplets between two checkpoints, each scored on the dev pairs")
    dev: str = option("stsb", "pairs to choose the best checkpoint on: stsb (STS-B dev), sample, or a file")
    data_dir: str | None = option(None, "local folder with sts/stsb.dev.parquet, instead of the Hub")
    dev_batch_size: int = option(32, "sentences a batch when the dev pairs are embedded")
    max_seq_length: int = option(512, "longest input of the embedding model in tokens, template included")
    format: str = option("native", "format of the folder: native or custom", choices=("native", "custom"))
    seed: int = option(42, "seed of the draw of triplets, of the adapter's start and of the order of the data")
    log_steps: int = option(1, "steps between two lines of training figures in the run record")
    device: str | None = option(None, "cpu, cuda, ...; the best there is by default")
    skip_bad_rows: bool = option(False, "leave out and count bad rows of the data, instead of stopping")
    resume: bool = option(False, "go on from the last checkpoint of an interrupted run with the same settings")
    overwrite: bool = option(False, "replace what stands at the output folder")

    def __post_init__(self) -> None:
        for name in ("data", "output"):
            if not getattr(self, name):
                raise SempaError(f"--{name} is missing: give it as a flag or in the config file.")
        positive = (
            "beta learning_rate epochs batch_size gradient_accumulation max_length max_grad_norm lora_r lora_alpha "
            "checkpoint_samples dev_batch_size max_seq_length log_steps"
        )
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise SempaError(f"{name} is {getattr(self, name)}. Expected a number above 0.")
        if self.max_triplets is not None and self.max_triplets < 1:
            raise SempaError(f"max_triplets is {self.max_triplets}. Expected at least 1.")
        if not 0 <= self.warmup_ratio < 1:
            raise SempaError(f"warmup_ratio is {self.warmup_ratio}. Expected a share from 0 to below 1.")
        if self.weight_decay < 0:
            raise SempaError(f"weight_decay is {self.weight_decay}. Expected 0 or more.")
        for name in ("paraphrase", "template", "dtype", "format"):
            choices = self.__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise SempaError(f"{name} is {getattr(self, name)!r}. Expected one of: {', '.join(choices)}.")
