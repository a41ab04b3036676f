"""What works on which architecture, found on tiny random models; as a script it writes docs/architectures.md anew."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.families import make_causal_lm
from helpers.tiny import add_random_adapter, finish_adapter, make_tokenizer, save_base
from peft import AutoPeftModelForCausalLM
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

import sempa_st
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model
from sempa_st.forward.packing import can_pack
from sempa_st.model.templates import EMBEDDING_TEMPLATES

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
ARCHITECTURES = {
    "bloom": "BLOOM", "cohere": "Cohere", "deepseek_v3": "DeepSeek-V3", "falcon": "Falcon",
    "falcon:alibi": "Falcon with ALiBi", "gemma2": "Gemma 2", "gemma3_text": "Gemma 3",
    "gpt2": "GPT-2", "gptj": "GPT-J", "gpt_neo": "GPT-Neo", "gpt_neox": "GPT-NeoX", "gpt_oss": "GPT-OSS",
    "granite": "Granite", "granitemoe": "GraniteMoE", "lfm2": "LFM2", "llama": "Llama",
    "llama4_text": "Llama 4", "mamba": "Mamba", "mistral": "Mistral",
    "mixtral": "Mixtral", "olmo2": "OLMo 2", "olmo3": "OLMo 3", "opt": "OPT", "phi": "Phi", "phi3": "Phi-3",
    "phimoe": "PhiMoE", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3-MoE", "stablelm": "StableLM",
    "starcoder2": "StarCoder2",
}  # fmt: skip
COLUMNS = ("architecture", "trains", "readers agree", "merges", "activates", "runs in packs")
INTRODUCTION = """# Architectures

What works on which decoder, found on tiny random models of transformers (`python -m tests.helpers.architectures` writes
this table anew, and a test compares it).

- trains: an adapter lies on every linear layer but the LM head, and a loss moves all of it. Experts that transformers
  holds as one parameter, and their routers, are no linear layers: a run warns of them, its record and card name them.
- readers agree: plain sentence-transformers, `sempa_st.load` and PEFT's causal language model give the same vectors.
- merges: `sempa copy --merge` gives the same vectors to all of them.
- activates: `sempa copy --activate` gives the same vectors, and any other text the base's logits bit for bit.
- runs in packs: rows are embedded without padding; where not, in padded batches.

"""
TOKENIZER = make_tokenizer()
TEXTS = ["A cat sleeps.", "Two dogs run over the wet grass after a ball.", "Why?"]
OTHER_TEXT = "The best thing about rain is that"


def find(family: str, folder: Path) -> list[str]:
    """Return a line of the table."""
    model = make_causal_lm(family)
    base = save_base(folder / "base", model, TOKENIZER)
    model = make_causal_lm(family)
    packs = can_pack(model.base_model, 1)
    trained = trains(make_causal_lm(family))
    source = finish_adapter(folder / "source", base, make_causal_lm(family), r=4, alpha=8)
    expected = ours(source)
    moved = float(abs(expected - ours(base)).max()) > 1e-3
    agree = moved and all(close(vectors, expected) for vectors in plain(source, AutoPeftModelForCausalLM))
    merged = works(lambda: close(ours(copy_model(str(source), folder / "merged", merge=True)), expected))
    merged &= works(lambda: all(close(v, expected) for v in plain(folder / "merged", AutoModelForCausalLM)))
    activated = works(lambda: activates(source, folder / "activated", model, expected))
    found = (trained, agree, merged, activated, packs)
    return [ARCHITECTURES[family], *("yes" if cell else "no" for cell in found)]


def works(attempt: Callable[[], bool]) -> bool:
    """Whether something is right; a refusal is no."""
    try:
        return attempt()
    except SempaError:
        return False


def trains(model: Any) -> bool:
    """Whether a loss reaches both factors of every update."""
    tuned = add_random_adapter(model, r=4, alpha=8)
    ids = TOKENIZER([OTHER_TEXT], return_tensors="pt")["input_ids"].repeat(2, 6)
    ids[0] = ids[0].roll(3)
    tuned(input_ids=ids, labels=ids).loss.backward()
    updates = [parameter for name, parameter in tuned.named_parameters() if "lora_" in name]
    assert updates
    # An expert that no token is sent to learns nothing from it.
    return all(parameter.requires_grad and parameter.grad is not None for parameter in updates)


def ours(folder: Path) -> np.ndarray:
    vectors: np.ndarray = sempa_st.load(folder, dtype="float32", device="cpu").encode(TEXTS)
    return vectors


def plain(folder: Path, kind: Any) -> list[np.ndarray]:
    """Embed with plain sentence-transformers, and with PEFT or transformers by an Auto class of theirs."""
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    embedder = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    states = np.stack([outputs(model, EMBEDDING_TEMPLATES["prompteol"].text(text))[0] for text in TEXTS])
    return [embedder.encode(TEXTS), states / np.linalg.norm(states, axis=1, keepdims=True)]


def outputs(model: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the state that the LM head reads at the last token, and all logits."""
    seen: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            logits = model(**TOKENIZER(text, return_tensors="pt"), use_cache=False).logits
    finally:
        handle.remove()
    return seen[0][0, -1].numpy(), logits[0].numpy()


def activates(source: Path, folder: Path, base: Any, expected: np.ndarray) -> bool:
    copy_model(str(source), folder, activate=True)
    if not close(ours(folder), expected):
        return False
    tuned = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # PEFT adds rows to the embedding where the tokenizer has more tokens than the base has rows.
    logits = outputs(base, OTHER_TEXT)[1]
    return np.array_equal(outputs(tuned, OTHER_TEXT)[1][:, : logits.shape[1]], logits)


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(abs(found - expected).max() <= 2e-4)  # both of norm 1


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    warnings.simplefilter("ignore")
    lines = [line(list(COLUMNS)), line(["---"] * len(COLUMNS))]
    for family in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(line(find(family, Path(folder))))
        print(lines[-1], file=sys.stderr, flush=True)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(INTRODUCTION + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
