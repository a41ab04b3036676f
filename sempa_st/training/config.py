"""The settings of a training run. This file imports no torch, so that the command line starts quickly."""

from __future__ import annotations

from dataclasses import dataclass

from sempa_st.data.nli import parse_columns
from sempa_st.data.preferences import DEFAULT_PARAPHRASE, PARAPHRASE_TEMPLATES, paraphrase_template
from sempa_st.errors import SempaError
from sempa_st.model.chat_formats import CHAT_FORMATS
from sempa_st.model.embedded import EMBEDDED_BASE
from sempa_st.model.templates import DEFAULT_TEMPLATE, EMBEDDING_TEMPLATES
from sempa_st.training.number_lists import MAX_CHARACTERS, parse_layers, parse_widths
from sempa_st.training.objectives import (
    EMBEDDING_OBJECTIVES,
    SEQUENCE_OBJECTIVES,
    SIMILARITY_OBJECTIVES,
    parse_objective,
)
from sempa_st.training.word_bags import WORD_FORMS, WORD_TOKENS
from sempa_st.utils.devices import DTYPES
from sempa_st.utils.files import lone_surrogates
from sempa_st.utils.options import option

ACTIVATIONS = ("always", "sentence", "template")
TUNINGS = ("lora", "full")
FORMATS = ("auto", "native", "custom")
NEUTRAL = ("none", "negative", "second")
WORD_WEIGHTS = ("uniform", "idf")
KL_TEMPLATE = "template"
"""The ``kl_text`` that stands for the batch's own sentences under the embedding template."""
REPORTERS = ("none", "tensorboard", "trackio", "wandb")
DEVICE_MAPS = ("none", "auto", "balanced", "sequential")
_MAX_NUMBER = 2**31 - 1
"""Largest number that all libraries accept as a seed and as a number of steps, examples or tokens."""
_MAX_RANK = 4096


@dataclass
class TrainConfig:
    """Settings of ``sempa train``. Defaults are the paper's if it gives a value (arXiv 2601.05075, section "Training").

    Raises:
        SempaError: If a value is out of range, or settings contradict each other.
    """

    base: str = option(EMBEDDED_BASE, "base model: Hub id, local folder, or the embedded default model")
    data: str = option("", "NLI data or pairs: Hub id, csv, jsonl, json or parquet file, or 'sample'")
    columns: str = option("", "the data's own names of columns, such as anchor=question,positive=answer")
    from_: str = option(
        "",
        "adapter to go on from: model folder, shipped model or Hub id; base, template, activation and LoRA settings "
        "are its own",
    )
    output: str = option("", "output folder of the model")
    objective: str = option(
        "dpo",
        "dpo, listwise, one-word, one-word-listwise, contrastive, retrieval, or a weighted sum "
        "(dpo:0.3,one-word-listwise:1)",
    )
    activation: str = option(
        "always",
        "where the adapter is active: always, on sentences under the embedding template, or only on the template's "
        "suffix (the tokens after the sentence)",
        choices=ACTIVATIONS,
    )
    paraphrase: str = option(
        DEFAULT_PARAPHRASE,
        f"paraphrase instruction: {', '.join(PARAPHRASE_TEMPLATES)}, or a text of your own with {{sentence}} in it",
    )
    chat_format: str = option(
        "auto",
        "chat format of the paraphrase prompts: auto (the base's own template, or plain text if it has none), "
        f"{', '.join(CHAT_FORMATS)}, or a file with a Jinja template",
    )
    template: str = option(DEFAULT_TEMPLATE, "embedding template", choices=tuple(EMBEDDING_TEMPLATES))
    max_triplets: int | None = option(None, "number of triplets to train on, drawn with the seed (default: all)")
    beta: float = option(0.1, "beta of the objectives dpo and listwise")
    word_beta: float = option(1.0, "beta of the one-word objectives")
    word_tokens: str = option("first", "tokens of a word that one-word objectives score", choices=WORD_TOKENS)
    word_forms: str = option(
        "both", "spellings of a word: as written, lower case, or both lower case and capitalised", choices=WORD_FORMS
    )
    word_weights: str = option(
        "uniform", "weights of words: uniform, or idf in the training data", choices=WORD_WEIGHTS
    )
    stop_words: bool = option(True, "ignore stop words in the one-word objectives")
    temperature: float = option(0.05, "temperature of the objectives contrastive and retrieval")
    matryoshka_dims: str = option(
        "", "widths that contrastive and retrieval train, such as 640,320,160,80 (default: the embedding's own alone)"
    )
    neutral: str = option(
        "none",
        "neutral sentences in the in-batch objectives: none, negative, or second (ranked)",
        choices=NEUTRAL,
    )
    kl: float = option(0.0, "weight of the KL term that keeps the model close to the base; 0 for none")
    kl_text: str = option(
        "",
        "text of the KL term: a text file, split into passages of 128 tokens, or template, for the batch's own "
        "sentences under the embedding template (default: the premises as plain text)",
    )
    kl_positions: int = option(128, "number of token positions that the KL term samples per forward pass")
    learning_rate: float = option(1e-4, "peak learning rate")
    warmup_ratio: float = option(0.05, "fraction of the steps with linear warm-up; cosine decay follows")
    epochs: float = option(1.0, "number of passes over the data")
    batch_size: int = option(8, "triplets per device and forward pass")
    gradient_accumulation: int = option(8, "forward passes per optimiser step")
    max_length: int = option(1024, "maximum length of prompt and answer in tokens")
    max_grad_norm: float = option(1.0, "maximum gradient norm, for clipping")
    adam_beta1: float = option(0.9, "decay rate of AdamW's mean of the gradients")
    adam_beta2: float = option(0.999, "decay rate of AdamW's mean of the squared gradients")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    tuning: str = option("lora", "what to train: a LoRA adapter, or the full model", choices=TUNINGS)
    lora_r: int = option(8, "LoRA rank")
    lora_alpha: int = option(32, "LoRA alpha; the update is scaled by alpha / rank")
    lora_dropout: float = option(0.0, "dropout rate of the adapter's inputs")
    lora_layers: str = option("", "decoder layers to adapt, such as 6-17 or 0,4,8 (default: all)")
    dtype: str = option("auto", "dtype of the frozen weights and of the computation", choices=DTYPES)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass, to save memory")
    checkpoint_samples: int = option(19_968, "triplets between two checkpoints, which are scored on the dev pairs")
    patience: int = option(0, "stop after this many checkpoints without a better dev score; 0 to never stop early")
    keep_checkpoints: bool = option(
        False, "keep the model of every checkpoint, in OUTPUT.training/models, to evaluate them one by one"
    )
    dev: str = option("stsb", "graded pairs to select the best checkpoint on: stsb (STS-B dev), sample, or a file")
    data_dir: str | None = option(None, "folder with sts/stsb.dev.parquet, instead of the Hub")
    dev_batch_size: int = option(32, "batch size in sentences when embedding the dev pairs")
    max_seq_length: int = option(512, "maximum input length of the embedding model in tokens, template included")
    format: str = option(
        "auto",
        "format of the model folder: native, custom, or auto (custom for activated adapters)",
        choices=FORMATS,
    )
    seed: int = option(42, "seed of the choice of triplets, the adapter's initialisation and the data order")
    log_steps: int = option(1, "optimiser steps between two entries of the training log in the run record")
    report_to: str = option("none", "program to show the training log in while the run lasts", choices=REPORTERS)
    device: str | None = option(None, "device type such as cpu or cuda (default: the best available)")
    load_in_4bit: bool = option(False, "hold the frozen weights in 4 bits by bitsandbytes (QLoRA), to save memory")
    device_map: str = option("none", "spread the layers over all visible GPUs by accelerate", choices=DEVICE_MAPS)
    skip_bad_rows: bool = option(False, "skip and count bad rows of the data instead of stopping")
    resume: bool = option(False, "resume an interrupted run with the same settings from its last checkpoint")
    overwrite: bool = option(False, "replace the output folder if it exists, and delete an unfinished run")

    def __post_init__(self) -> None:
        for name in ("data", "output"):
            if not getattr(self, name):
                raise SempaError(f"--{name} is missing: pass it as a flag or set it in the config file.")
        self._check_sizes()
        self._check_numbers()
        for name, item in self.__dataclass_fields__.items():
            choices = item.metadata["choices"]
            if choices and getattr(self, name) not in choices:
                raise SempaError(f"{name} is {getattr(self, name)!r}. Expected one of: {', '.join(choices)}.")
        if self.device_map != "none" and self.device == "cpu":
            raise SempaError("--device-map spreads the layers over GPUs. Leave out it, or --device cpu.")
        _ = self.adapted_layers, self.column_names, self.embedding_widths
        paraphrase_template(self.paraphrase)
        if self.kl_text and not self.kl:
            raise SempaError(f"kl_text is {self.kl_text!r}, but without --kl nothing reads it. Set --kl above 0.")
        self._check_objective()

    def _check_sizes(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if (
                isinstance(value, str)
                and name != "lora_layers"
                and (len(value) > MAX_CHARACTERS or "\0" in value or lone_surrogates(value))
            ):
                raise SempaError(
                    f"{name} is {value!a:.80}. Expected text of {MAX_CHARACTERS} characters at most, without NUL or "
                    "lone surrogates."
                )
            if isinstance(value, int | float) and not -_MAX_NUMBER <= value <= _MAX_NUMBER:
                raise SempaError(f"{name} is {value!r:.80}. Expected a finite number of {_MAX_NUMBER} at most.")
        if self.seed < 0:
            raise SempaError(f"seed is {self.seed}. Expected 0 or more.")
        if self.lora_r > _MAX_RANK:
            raise SempaError(f"lora_r is {self.lora_r}. Expected {_MAX_RANK} at most.")

    def _check_numbers(self) -> None:
        positive = (
            "beta word_beta temperature learning_rate epochs batch_size gradient_accumulation max_length max_grad_norm "
            "lora_r lora_alpha checkpoint_samples dev_batch_size max_seq_length log_steps kl_positions"
        )
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise SempaError(f"{name} is {getattr(self, name)}. Expected a number above 0.")
        if self.max_triplets is not None and self.max_triplets < 1:
            raise SempaError(f"max_triplets is {self.max_triplets}. Expected at least 1.")
        for name in ("warmup_ratio", "lora_dropout", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise SempaError(f"{name} is {getattr(self, name)}. Expected a number from 0 to below 1.")
        for name in ("weight_decay", "kl", "patience"):
            if not getattr(self, name) >= 0:
                raise SempaError(f"{name} is {getattr(self, name)}. Expected 0 or more.")

    def _check_objective(self) -> None:
        weights = self.objective_weights
        if len(weights.keys() & set(SEQUENCE_OBJECTIVES)) > 1:
            raise SempaError(f"The objective {self.objective!r} contains both dpo and listwise. Expected one of them.")
        if self.embedding_widths and not weights.keys() & set(SIMILARITY_OBJECTIVES):
            raise SempaError(
                f"matryoshka_dims is {self.matryoshka_dims!r}, and the objective {self.objective!r} compares no "
                f"embeddings, so nothing would train these widths. Expected one of: {', '.join(SIMILARITY_OBJECTIVES)}."
            )
        if self.tuning == "full" and (self.from_ or self.load_in_4bit):
            raise SempaError(
                "--from and --load-in-4bit train an adapter, and --tuning full all weights. Expected --tuning lora, or "
                "a merged copy (sempa copy FOLDER DIR --merge) as --base."
            )
        if self.tuning == "full" and (self.kl or self.is_activated):
            raise SempaError(
                "--kl and --activation need the unchanged base, which --tuning full does not keep. Expected --tuning "
                "lora with them."
            )
        if self.is_activated:
            self._check_activated(weights.keys() & set(SEQUENCE_OBJECTIVES))

    def _check_activated(self, sequence_objectives: set[str]) -> None:
        if sequence_objectives:
            raise SempaError(
                f"The objective {min(sequence_objectives)} trains on text without the embedding template, where an "
                f"adapter with --activation {self.activation} is inactive. Expected objectives among: "
                f"{', '.join(EMBEDDING_OBJECTIVES)}."
            )
        if self.kl:
            raise SempaError(
                f"--kl keeps the model close to the base on ordinary text. With --activation {self.activation} it "
                "equals the base there. Omit --kl."
            )
        if self.gradient_checkpointing and self.activation == "template":
            raise SempaError(
                "gradient_checkpointing does not work with --activation template: only the suffix of each sentence "
                "runs with the adapter, and recomputation would run without it. Omit it."
            )
        if self.format == "native":
            raise SempaError(
                f"sentence-transformers alone cannot apply an adapter with --activation {self.activation}. Expected "
                "--format custom or auto."
            )

    @property
    def is_activated(self) -> bool:
        """Whether the adapter is active only under the embedding template (an activated LoRA, aLoRA)."""
        return self.activation != "always"

    @property
    def objective_weights(self) -> dict[str, float]:
        """Weight of each objective, by name."""
        return parse_objective(self.objective)

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the model with its base."""
        return self.kl > 0 or not self.objective_weights.keys() <= set(SIMILARITY_OBJECTIVES)

    @property
    def library(self) -> str | None:
        """Library whose trainer runs: ``trl``, ``sentence-transformers``, or None for this package's own."""
        alone = list(self.objective_weights) if not self.kl else []
        # TRL would take the base for the reference, and not the adapter that training starts from.
        if alone == ["dpo"] and not self.from_:
            return "trl"
        # sentence-transformers' trainer would copy the model to each GPU of a device map.
        if alone == ["contrastive"] and self.neutral == "none" and self.device_map == "none":
            return "sentence-transformers"
        return None

    @property
    def kl_file(self) -> str:
        """Text file of the KL term; empty if its text is the batch's own."""
        return "" if self.kl_text == KL_TEMPLATE else self.kl_text

    @property
    def column_names(self) -> dict[str, str]:
        """The data's own name of each column that it calls otherwise."""
        return parse_columns(self.columns)

    @property
    def embedding_widths(self) -> list[int]:
        """Widths that are trained, the largest first; empty for the full width alone."""
        return parse_widths(self.matryoshka_dims)

    @property
    def folder_format(self) -> str:
        """Format of the model folder, with ``auto`` resolved."""
        if self.format != "auto":
            return self.format
        return "custom" if self.is_activated else "native"

    @property
    def adapted_layers(self) -> list[int] | None:
        """Indices of the decoder layers to adapt, or None for all."""
        return parse_layers(self.lora_layers)
