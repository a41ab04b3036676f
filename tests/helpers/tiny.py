"""Tiny decoders, tokenizers and model folders, made in memory: no test needs a network or a download."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any Hugging Face import, in this and in child processes

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sempa_st.data.rows import read_rows
from sempa_st.data.sts import STS_TASKS
from sempa_st.model.adapter import lora_config
from sempa_st.training.config import TrainConfig
from sempa_st.utils.assets import asset_path

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def sample_sentences() -> list[str]:
    rows = read_rows(asset_path("nli_sample.jsonl"))
    return [sentence for row in rows for sentence in row.values()]


def make_tokenizer(*, bos: bool = True, chat: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of 600 entries on the shipped sample."""
    core = train_bpe(["<pad>", "<bos>", "<eos>"])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=512
    )
    tokenizer.chat_template = chat
    return tokenizer


def train_bpe(special_tokens: list[str]) -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(sample_sentences(), trainer)
    return core


def make_tokenizer_of_one() -> PreTrainedTokenizerFast:
    """Train a tokenizer with one special token for everything, as GPT-2's."""
    one = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=train_bpe(["<|endoftext|>"]), **one, model_max_length=512)


def make_llama(seed: int = 0, *, hidden: int = 32, layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def make_gemma(seed: int = 0) -> Gemma3ForCausalLM:
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=16,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return Gemma3ForCausalLM(config).eval()


def save_sts(root: Path) -> Path:
    """Deal the shipped pairs out over the files of all seven STS tasks."""
    (root / "sts").mkdir()
    rows = read_rows(asset_path("sts_sample.jsonl"))
    parts = {"stsb": ("dev", "test"), "sickr": ("train", "dev", "test")}
    files = [f"{stem}.{part}" for stem in STS_TASKS.values() for part in parts.get(stem, ("test",))]
    for index, name in enumerate(files):
        pq.write_table(pa.Table.from_pylist(rows[index::4]), root / "sts" / f"{name}.parquet")
    return root


def save_base(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def add_random_adapter(model: Any, *, seed: int = 1, **settings: Any) -> Any:
    """Return a PEFT model around ``model`` with an adapter whose two factors are both random, as after training."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    tuned = get_peft_model(model, lora_config(model, **settings))
    randomise(tuned)
    return tuned


def randomise(tuned: Any) -> None:
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)


def save_random_adapter(folder: Path, base: Path, model: Any, **settings: Any) -> Path:
    """Write a random adapter beside its base's name."""
    add_random_adapter(model, **settings).save_pretrained(folder, save_embedding_layers=False)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def make_config(base: Path, output: Path, **kwargs: Any) -> TrainConfig:
    """Return the settings of a run of seconds."""
    settings: dict[str, Any] = {
        "base": str(base),
        "data": "sample",
        "output": str(output),
        "max_triplets": 24,
        "learning_rate": 5e-3,
        "batch_size": 4,
        "gradient_accumulation": 1,
        "checkpoint_samples": 8,
        "dev": "sample",
        "dtype": "float32",
        "device": "cpu",
        "max_seq_length": 200,
    }
    return TrainConfig(**{**settings, **kwargs})


def finish_adapter(folder: Path, base: Path, model: Any, *, format: str = "native", **settings: Any) -> Path:
    from sempa_st.folder.write import write_embedding_files
    from sempa_st.model.templates import EMBEDDING_TEMPLATES
    from sempa_st.model.tokenizer import install_template, load_tokenizer

    save_random_adapter(folder, base, model, **settings)
    tokenizer = load_tokenizer(base)
    install_template(tokenizer, EMBEDDING_TEMPLATES["prompteol"])
    write_embedding_files(
        folder, tokenizer, template="prompteol", max_seq_length=160, config=model.config, format=format
    )
    return folder
