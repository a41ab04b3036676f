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
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 1},
    "falcon": {"head_dim": None},  # it computes that itself
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
    "lfm2": {"full_attn_idxs": [1]},
    "mamba": {"state_size": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"pad_token_id": 0},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 8},
}  # fmt: skip
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "opt", "gpt_neox"]


def make_causal_lm(family: str, **changes: Any) -> Any:
    """Make a tiny decoder of an architecture, with random weights."""
    torch.manual_seed(0)
    sizes = {**SIZES, **OTHERS.get(family, {}), **changes}
    config = AutoConfig.for_model(family, **{name: size for name, size in sizes.items() if size is not None})
    model: Any = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
