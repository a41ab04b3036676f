"""Peers that need setup: backends in another environment, and FlashAttention."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from sempa_st.errors import SempaError
from sempa_st.forward.varlen import last_states_varlen, supports_varlen
from sempa_st.model.tokenizer import load_tokenizer, save_tokenizer

Render = Callable[[str], str]
_WORKER = Path(__file__).with_name("worker.py")


def in_other_environment(
    python: str, backend: str, folder: Path, scratch: Path, batch_size: int, render: Render
) -> Callable[[Sequence[str]], Any]:
    """Embed in a process of another Python environment, whose sentence-transformers has this backend.

    Args:
        python: Interpreter with sentence-transformers 5 and what its backend needs.
        backend: ``onnx`` or ``openvino``.
        folder: The base's folder.
        scratch: Folder for the model as older versions read it, and for vectors.
        batch_size: Texts of a batch.
        render: Puts a sentence into the template.

    Raises:
        SempaError: If the process ends before it has answered.
    """
    plain = scratch / "decoder"
    if not plain.is_dir():
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        ).base_model.save_pretrained(plain)
        save_tokenizer(load_tokenizer(folder), plain)
    threads = str(torch.get_num_threads())
    process = subprocess.Popen(
        [python, str(_WORKER), backend, str(plain), str(batch_size), threads],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, replies = process.stdin, process.stdout

    def wait_for(reply: str) -> None:
        if replies.readline().strip() != reply:
            process.kill()
            raise SempaError(f"The {backend} backend of {python} ended with status {process.wait()}.")

    wait_for("ready")
    output = scratch / f"{backend}.npy"

    def embed(sentences: Sequence[str]) -> Any:
        print(
            json.dumps({"texts": [render(text) for text in sentences], "output": str(output)}),
            file=requests,
            flush=True,
        )
        wait_for("done")
        return np.load(output)

    return embed


def flash_rows(folder: Path, device: str, batch_size: int, render: Render) -> Callable[[Sequence[str]], Any]:
    """Embed in bfloat16 and in sorted batches of rows, which FlashAttention takes without padding; as above."""
    decoder = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=False)
        .base_model.eval()
        .to(device)
    )
    tokenizer = load_tokenizer(folder)
    if not supports_varlen(decoder):
        raise SempaError(f"FlashAttention does not run on {device}")

    @torch.inference_mode()
    def embed(sentences: Sequence[str]) -> Any:
        order = sorted(range(len(sentences)), key=lambda place: -len(sentences[place]))
        vectors = []
        for start in range(0, len(order), batch_size):
            texts = [render(sentences[place]) for place in order[start : start + batch_size]]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt").to(device)
            vectors.append(last_states_varlen(decoder, **batch).float().cpu())
        return torch.cat(vectors)[torch.tensor(order).argsort()].numpy()

    return embed
