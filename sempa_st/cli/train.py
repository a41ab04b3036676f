"""The command ``sempa train``."""

from __future__ import annotations

import argparse
from typing import Any

from sempa_st.cli.arguments import NOTHING_KEPT, add_command
from sempa_st.training.config import TrainConfig
from sempa_st.utils.options import add_options, option_values, read_options

TRAIN_GROUPS = {
    "model and data": (
        *("base", "from_", "data", "columns", "output", "paraphrase", "chat_format", "template", "max_triplets"),
        "skip_bad_rows",
    ),
    "objective": (
        *("objective", "beta", "word_beta", "word_tokens", "word_forms", "word_weights", "stop_words"),
        *("temperature", "matryoshka_dims", "neutral", "kl", "kl_text", "kl_positions"),
    ),
    "adapter": ("activation", "tuning", "lora_r", "lora_alpha", "lora_dropout", "lora_layers"),
    "optimisation": (
        *("learning_rate", "warmup_ratio", "epochs", "batch_size", "gradient_accumulation", "max_length"),
        *("max_grad_norm", "adam_beta1", "adam_beta2", "weight_decay", "seed"),
    ),
    "checkpoints and dev score": (
        *("checkpoint_samples", "keep_checkpoints", "patience", "dev", "data_dir", "dev_batch_size", "log_steps"),
        "report_to",
    ),
    "output folder": ("max_seq_length", "format", "resume", "overwrite"),
    "compute": ("dtype", "device", "load_in_4bit", "device_map", "gradient_checkpointing"),
}
"""Options of a training run by the heading that they have in the help."""


def add(commands: Any) -> None:
    """Add ``sempa train``."""
    parser = add_command(
        commands,
        "train",
        _train,
        "Train an adapter by preference optimisation on NLI data.",
        examples=(
            "--data sample --dev sample --output runs/first",
            "--config llama3-8b --data my_nli.csv --output runs/llama3",
            "--config llama3-8b --data my_nli.csv --device cuda --estimate",
        ),
        kept=_kept,
    )
    add_options(parser, TrainConfig, groups=TRAIN_GROUPS)
    parser.add_argument("--estimate", action="store_true", help="print the memory that the run would need, and end")


def _train(args: argparse.Namespace) -> None:
    if args.estimate:
        _estimate(args)
        return
    config = read_options(TrainConfig, vars(args))
    from sempa_st.training import train
    from sempa_st.training.record import run_table

    result = train(config)
    if result.is_main_process:
        print(run_table(result.record))
        print(f"Wrote {config.output} in {result.record['seconds']:.0f} s.")


def _estimate(args: argparse.Namespace) -> None:
    from sempa_st.training import estimate_memory

    estimate = estimate_memory(read_options(TrainConfig, {"output": "not written", **vars(args)}))
    print(estimate.table())
    print(f"In one process, on its largest batch, the run needs {estimate.peak / 2**30:.2f} GiB besides its program.")


def _kept(args: argparse.Namespace) -> str:
    from sempa_st.training.run_folder import RunFolder

    config = option_values(TrainConfig, vars(args))
    if args.estimate or RunFolder(config["output"]).last_checkpoint() is None:
        return NOTHING_KEPT
    return "--resume goes on from the checkpoints."  # the run has said where they are
