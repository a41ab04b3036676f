from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from sempa_st.errors import SempaError
from sempa_st.training.config import TrainConfig
from sempa_st.utils.options import add_options, read_options, shipped_configs

REQUIRED = ["--data", "d", "--output", "o"]


def parse(*argv: str) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_options(parser, TrainConfig)
    return read_options(TrainConfig, vars(parser.parse_args(argv)))


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("beta: 0.5\nlearning-rate: 1e-5\nresume: true\nmax_triplets: null\ndata: from-file\n")
    config = parse("--config", str(file), "--output", "o", "--beta", "0.3", "--no-resume")
    assert (config.beta, config.learning_rate, config.resume, config.data) == (0.3, 1e-5, False, "from-file")
    assert (config.lora_r, config.lora_alpha, config.batch_size * config.gradient_accumulation) == (8, 32, 64)


def test_a_field_named_as_a_keyword_has_the_keyword_for_its_key_and_flag(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("from: here\n")
    assert parse("--config", str(file), *REQUIRED).from_ == "here"
    assert parse("--from", "there", *REQUIRED).from_ == "there"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("betta: 1", "unknown key 'betta'.*Known keys: base, data"),
        ("beta: high", "beta is 'high'. Expected a value of type float"),
        ("epochs: yes", "epochs is True. Expected a value of type float"),
        ("lora_r: 1.5", "lora_r is 1.5. Expected a value of type int"),
        ("resume: 1", "resume is 1. Expected a value of type bool"),
        ("output:", "output is None. Expected a value of type str"),
        ("data: [a, b]", "data is .*Expected a value of type str"),
        ("- a", "is not a mapping of keys to values"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_files_name_the_key(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(SempaError, match=message):
        parse("--config", str(file), *REQUIRED)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beta", "0"], "beta is 0.0"),
        (["--beta", "nan"], "beta is nan"),
        (["--columns", "anchor"], "columns is 'anchor'.*Expected NAME=COLUMN"),
        (["--columns", "anchor=a,anchor=b"], "the entry 'anchor=b'"),
        (["--columns", "query=a"], "the entry 'query=a'.*Names: sent0, sent1"),
        (["--objective", "contrastive", "--matryoshka-dims", "32,0"], "matryoshka_dims is '32,0'"),
        (["--objective", "contrastive", "--matryoshka-dims", "32,32"], "matryoshka_dims is '32,32'"),
        (["--matryoshka-dims", "32,16"], "'dpo' compares no embeddings.*Expected one of: contrastive, retrieval"),
        (["--from", "a", "--tuning", "full"], "--from and --load-in-4bit train an adapter"),
        (["--load-in-4bit", "--tuning", "full"], "--from and --load-in-4bit train an adapter"),
        (["--device", "cpu", "--device-map", "auto"], "--device-map spreads the layers over GPUs"),
        (["--warmup-ratio", "1"], "warmup_ratio is 1.0"),
        (["--max-triplets", "0"], "max_triplets is 0"),
        (["--weight-decay", "-1"], "weight_decay is -1.0"),
        (["--adam-beta1", "-0.1"], "adam_beta1 is -0.1"),
        (["--adam-beta2", "1"], "adam_beta2 is 1.0"),
        (["--paraphrase", "again"], "paraphrase is 'again'"),
        (["--batch-size", "0"], "batch_size is 0"),
    ],
)
def test_values_out_of_range_are_named(flags: list[str], message: str) -> None:
    with pytest.raises(SempaError, match=message):
        parse(*REQUIRED, *flags)


def test_data_and_output_are_needed() -> None:
    with pytest.raises(SempaError, match="--data is missing"):
        parse("--output", "o")
    with pytest.raises(SempaError, match=r"nowhere.*cannot be read.*gemma3-270m-cpu, .*llama2-7b, .*llama3-8b"):
        parse("--config", "nowhere", *REQUIRED)


def test_shipped_files_are_valid_and_the_papers() -> None:
    papers = {"gemma3-270m-cpu", "llama2-7b", "llama3-8b"}
    baselines = {"llama2-7b-contrastive", "llama3-8b-contrastive"}
    ours = {"gemma3-270m", "gemma3-270m-activated", "gemma3-270m-closing"}
    assert set(shipped_configs()) == papers | baselines | ours | {"smollm2-135m"}
    preference = parse("--config", "smollm2-135m", *REQUIRED)
    assert (preference.objective, preference.kl, preference.kl_text) == ("retrieval", 1, "template")
    for name in ours | baselines:
        assert "contrastive" in parse("--config", name, *REQUIRED).objective_weights
    for name in papers:
        config = parse("--config", name, *REQUIRED)
        assert (config.beta, config.learning_rate, config.warmup_ratio) == (0.1, 1e-4, 0.05)
    gpus = 4
    for name, chat_format in (("llama2-7b", "llama2"), ("llama3-8b", "llama3")):
        config = parse("--config", name, "--output", "o")
        assert config.batch_size * config.gradient_accumulation * gpus == 256
        assert config.checkpoint_samples == 78 * 256
        assert (config.lora_r, config.lora_alpha, config.max_length, config.dtype) == (8, 32, 1024, "bfloat16")
        assert (config.adam_beta1, config.adam_beta2, config.weight_decay) == (0.9, 0.95, 0.1)
        assert (config.chat_format, config.objective, config.lora_dropout) == (chat_format, "dpo", 0)
        baseline = parse("--config", f"{name}-contrastive", "--output", "o")
        assert (baseline.base, baseline.objective, baseline.chat_format) == (config.base, "contrastive", "auto")
        assert (baseline.lora_r, baseline.lora_alpha, baseline.lora_dropout) == (64, 16, 0.05)
        assert (baseline.learning_rate, baseline.batch_size * baseline.gradient_accumulation) == (5e-4, 256)
