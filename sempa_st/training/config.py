"""All settings of a training run. Standard library only, so that the command line can show them quickly."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sempa_st.data.preferences import DEFAULT_PARAPHRASE, PARAPHRASE_TEMPLATES
from sempa_st.errors import SempaError
from sempa_st.model.gemma import EMBEDDED_BASE
from sempa_st.model.templates import DEFAULT_TEMPLATE, EMBEDDING_TEMPLATES
from sempa_st.training.word_bags import WORD_FORMS, WORD_TOKENS
from sempa_st.utils.devices import DTYPES
from sempa_st.utils.files import lone_surrogates
from sempa_st.utils.options import option, split_list

ACTIVATIONS = ("always", "sentence", "template")
TUNINGS = ("lora", "full")
FORMATS = ("auto", "native", "custom")
NEUTRAL = ("none", "negative", "second")
WORD_WEIGHTS = ("uniform", "idf")
_LARGEST = 2**31 - 1
_LONGEST = 4096
"""What every library takes as a number of steps, rows or tokens, and as a seed."""
_HIGHEST_RANK = 4096
_LAYERS = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")


@dataclass
class TrainConfig:
    """Settings of ``sempa train``; the defaults are the paper's where the paper has one (PAPER section "Training").

    Raises:
        SempaError: If a value is out of range; the message names it.
    """

    base: str = option(EMBEDDED_BASE, "base model: Hub id, local folder, or the embedded default")
    data: str = option("", "NLI data: Hub id, csv, jsonl or parquet file, or 'sample'")
    output: str = option("", "folder to write the model to")
    objective: str = option(
        "dpo",
        "dpo, listwise, one-word, one-word-listwise, contrastive, or a sum (dpo:0.3,one-word-listwise:1)",
    )
    activation: str = option(
        "always",
        "where the adapter acts: always, on a sentence under the embedding template, or on the template's closing "
        "tokens only",
        choices=ACTIVATIONS,
    )
    paraphrase: str = option(DEFAULT_PARAPHRASE, "paraphrase instruction", choices=tuple(PARAPHRASE_TEMPLATES))
    template: str = option(DEFAULT_TEMPLATE, "embedding template", choices=tuple(EMBEDDING_TEMPLATES))
    max_triplets: int | None = option(None, "train on this many triplets, drawn at random with the seed")
    beta: float = option(0.1, "beta of the objectives dpo and listwise, above 0")
    word_beta: float = option(1.0, "beta of the one-word objectives, above 0")
    word_tokens: str = option("first", "tokens of a word that the one-word objectives score", choices=WORD_TOKENS)
    word_forms: str = option("both", "spellings of a word: as written, lower case, or both cases", choices=WORD_FORMS)
    word_weights: str = option("uniform", "weight of a word: uniform, or idf over the data", choices=WORD_WEIGHTS)
    stop_words: bool = option(True, "leave stop words out of the one-word objectives")
    temperature: float = option(0.05, "temperature of the objective contrastive, above 0")
    neutral: str = option(
        "none", "neutral sentences in an in-batch choice: none, negative, or second (ranked)", choices=NEUTRAL
    )
    kl: float = option(0.0, "weight of the KL term that ties ordinary text to the base; 0 for none")
    kl_text: str = option("", "text file to take that text from, in passages of 128 tokens (default: the premises)")
    kl_positions: int = option(128, "positions of ordinary text that the KL term looks at in a forward pass")
    learning_rate: float = option(1e-4, "peak learning rate")
    warmup_ratio: float = option(0.05, "share of the steps in which the rate rises linearly; then cosine decay")
    epochs: float = option(1.0, "passes over the data")
    batch_size: int = option(8, "preference pairs per device and forward pass")
    gradient_accumulation: int = option(8, "forward passes per step")
    max_length: int = option(1024, "longest training sequence in tokens, prompt and answer")
    max_grad_norm: float = option(1.0, "gradient norm to clip to")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    tuning: str = option("lora", "what is trained: a LoRA adapter, or the full model", choices=TUNINGS)
    lora_r: int = option(8, "LoRA rank")
    lora_alpha: int = option(32, "LoRA scale")
    lora_dropout: float = option(0.0, "share of the adapter's inputs that are dropped in training")
    lora_layers: str = option("", "decoder layers to adapt, such as 6-17 or 0,4,8 (default: all)")
    dtype: str = option("auto", "type of the frozen weights and of the arithmetic", choices=DTYPES)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    checkpoint_samples: int = option(19_968, "triplets between two checkpoints, each scored on the dev pairs")
    patience: int = option(0, "stop after this many checkpoints without a better dev score; 0 for never")
    dev: str = option("stsb", "pairs to choose the best checkpoint on: stsb (STS-B dev), sample, or a file")
    data_dir: str | None = option(None, "local folder with sts/stsb.dev.parquet, instead of the Hub")
    dev_batch_size: int = option(32, "sentences a batch when the dev pairs are embedded")
    max_seq_length: int = option(512, "longest input of the embedding model in tokens, template included")
    format: str = option(
        "auto", "format of the folder: native, custom, or auto (custom where the adapter is activated)", choices=FORMATS
    )
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
        self._check_sizes()
        self._check_numbers()
        for name, item in self.__dataclass_fields__.items():
            choices = item.metadata["choices"]
            if choices and getattr(self, name) not in choices:
                raise SempaError(f"{name} is {getattr(self, name)!r}. Expected one of: {', '.join(choices)}.")
        _ = self.adapted_layers
        if self.kl_text and not self.kl:
            raise SempaError(f"kl_text is {self.kl_text!r}, and without --kl nothing reads it. Give --kl a weight.")
        self._check_objective()

    def _check_sizes(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if (
                isinstance(value, str)
                and name != "lora_layers"
                and (len(value) > _LONGEST or "\0" in value or lone_surrogates(value))
            ):
                raise SempaError(
                    f"{name} is {value!a:.80}. Expected text of {_LONGEST} characters at most, without NUL and lone "
                    "surrogates."
                )
            if isinstance(value, int | float) and not -_LARGEST <= value <= _LARGEST:
                raise SempaError(f"{name} is {value!r:.80}. Expected a finite number, of {_LARGEST} at most.")
        if self.seed < 0:
            raise SempaError(f"seed is {self.seed}. Expected 0 or more.")
        if self.lora_r > _HIGHEST_RANK:
            raise SempaError(f"lora_r is {self.lora_r}. Expected {_HIGHEST_RANK} at most.")

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
        for name in ("warmup_ratio", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise SempaError(f"{name} is {getattr(self, name)}. Expected a share from 0 to below 1.")
        for name in ("weight_decay", "kl", "patience"):
            if not getattr(self, name) >= 0:
                raise SempaError(f"{name} is {getattr(self, name)}. Expected 0 or more.")

    def _check_objective(self) -> None:
        weights = self.objective_weights
        if len(weights.keys() & set(SEQUENCE_OBJECTIVES)) > 1:
            raise SempaError(f"The objective {self.objective!r} holds both dpo and listwise. Expected one of them.")
        if self.tuning == "full" and (self.kl or self.is_activated):
            raise SempaError(
                "--tuning full leaves no base to switch back to, as --kl and --activation need. Expected tuning lora "
                "with them."
            )
        if self.is_activated:
            self._check_activated(weights.keys() & set(SEQUENCE_OBJECTIVES))

    def _check_activated(self, sequence_objectives: set[str]) -> None:
        if sequence_objectives:
            raise SempaError(
                f"The objective {min(sequence_objectives)} trains on text without the embedding template, where an "
                f"adapter with --activation {self.activation} does nothing. Expected of: "
                f"{', '.join(READING_OBJECTIVES)}."
            )
        if self.kl:
            raise SempaError(
                f"--kl ties ordinary text to the base; with --activation {self.activation} it never leaves it."
            )
        if self.gradient_checkpointing and self.activation == "template":
            raise SempaError(
                "gradient_checkpointing does not go with --activation template: of each sentence only the closing "
                "tokens are trained, and its recomputation would miss the adapter. Leave it out."
            )
        if self.format == "native":
            raise SempaError(
                f"Plain sentence-transformers would not apply an adapter of --activation {self.activation}. Expected "
                "format custom (or auto)."
            )

    @property
    def is_activated(self) -> bool:
        """Whether the adapter acts under the embedding template only (an activated LoRA)."""
        return self.activation != "always"

    @property
    def objective_weights(self) -> dict[str, float]:
        """Weight of each objective by name."""
        return parse_objective(self.objective)

    @property
    def folder_format(self) -> str:
        """Format of the folder, ``auto`` decided."""
        if self.format != "auto":
            return self.format
        return "custom" if self.is_activated else "native"

    @property
    def adapted_layers(self) -> list[int] | None:
        """Numbers of the decoder layers to adapt, or None for all."""
        if not self.lora_layers:
            return None
        layers: set[int] = set()
        for part in split_list(self.lora_layers) if len(self.lora_layers) <= _LONGEST else [""]:
            match = _LAYERS.fullmatch(part)
            span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
            if not span:
                raise SempaError(
                    f"lora_layers is {self.lora_layers!r:.80}. Expected numbers and ranges such as 0,4,6-17, of layers "
                    "below 10000."
                )
            layers.update(span)
        return sorted(layers)


SEQUENCE_OBJECTIVES = ("dpo", "listwise")
"""State the preference over whole answers to a paraphrase request."""
WORD_OBJECTIVES = ("one-word", "one-word-listwise")
"""State it over the words at the template's last position."""
READING_OBJECTIVES = (*WORD_OBJECTIVES, "contrastive")
"""State it at the template's last position, whose state is the embedding."""
OBJECTIVES = (*SEQUENCE_OBJECTIVES, *READING_OBJECTIVES)


def parse_objective(text: str) -> dict[str, float]:
    """Read ``one-word`` or a weighted sum such as ``dpo:0.3,one-word-listwise:1.0``.

    Args:
        text: Comma-separated names of :data:`OBJECTIVES`, each with a weight above 0 after a colon (default 1).

    Returns:
        Weight by name, in the order given.

    Raises:
        SempaError: On an unknown or repeated name, or a weight that is no number above 0.
    """
    weights: dict[str, float] = {}
    for part in split_list(text):
        name, _, weight_text = part.partition(":")
        if name not in OBJECTIVES:
            raise SempaError(f"Unknown objective {name!r} in {text!r}. Expected one of: {', '.join(OBJECTIVES)}.")
        if name in weights:
            raise SempaError(f"The objective {name!r} stands twice in {text!r}. Add the weights up.")
        try:
            weight = float(weight_text) if weight_text else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise SempaError(f"The weight of {name!r} is {weight_text!r}. Expected a number above 0.")
        weights[name] = weight
    return weights
