"""Tiny decoders of the architectures that transformers has."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "head_dim": 8,
}
OTHERS = {
    "beam": {
        "num_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
        "sliding_window": 64,
    },
    "hrm_text": {"num_key_value_heads": None, "num_hidden_layers": 2, "embedding_scale": 1.0},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 1},
    "falcon": {"head_dim": None},  # it computes that itself
    "falcon:alibi": {"head_dim": None, "alibi": True},
    "gemma3_text": {"sliding_window": 64, "query_pre_attn_scalar": 8},
    "gpt2": {"n_inner": 64},
    "qwen2": {"vocab_size": 640},  # its tokenizer class adds tokens of its own
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "kv_lora_rank": 8,
        "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4,
    },
    "gpt_neo": {"num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "global"], 1]]},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {"rotary_dim": 4},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {"full_attn_idxs": [1]},
    "llama4_text": {
        "intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 64,
        "no_rope_layers": [1, 0, 1],
    },
    "mamba": {"state_size": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"pad_token_id": 0},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 8},
}  # fmt: skip
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "floor_scale")
"""Settings that make attention depend on distances or indices."""
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "opt", "gpt_neox"]


def make_causal_lm(family: str, **changes: Any) -> Any:
    """Make a tiny decoder of an architecture, with random weights; after a colon stands a variant of one."""
    torch.manual_seed(0)
    sizes = {**SIZES, **OTHERS.get(family, {}), **changes}
    config = AutoConfig.for_model(
        family.partition(":")[0], **{name: size for name, size in sizes.items() if size is not None}
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_windowed(family: str, window: int) -> Any:
    """Make a tiny decoder of an architecture, whose windows are of ``window`` tokens where it has any."""
    defaults = AutoConfig.for_model(family.partition(":")[0]).to_dict()
    return make_causal_lm(family, **{name: window for name in WINDOWS if defaults.get(name) is not None})
