"""Peers of :mod:`speed_systems` that take more than a call: another environment's backends, and unpadded rows."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from sempa_st.bases import load_tokenizer, save_tokenizer
from sempa_st.errors import SempaError

Render = Callable[[str], str]
_WORKER = Path(__file__).with_name("speed_worker.py")
_UNPADDED = "unpadded"


def in_other_environment(
    python: str, backend: str, folder: Path, scratch: Path, batch_size: int, render: Render
) -> Callable[[Sequence[str]], Any]:
    """Embed by a process of another Python, whose sentence-transformers has this backend.

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
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).base_model.save_pretrained(plain)
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


def flash_attention(
    queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """Attend within rows that stand one behind another, each token to those before it: FlashAttention, CUDA only.

    Args:
        queries: Shape (tokens, heads, size).
        keys: Of the same shape.
        values: Of the same shape.
        starts: Where each row starts and the last one ends, of shape (rows + 1,), int32.
        longest: Tokens of the longest row.
        scale: Of the scores.
        window: Tokens that one sees, itself among them; None for all.
    """
    from torch.nn.attention.varlen import varlen_attn

    seen = (-1 if window is None else window - 1, 0)
    found: Tensor = varlen_attn(queries, keys, values, starts, starts, longest, longest, scale=scale, window_size=seen)
    return found


def unpadded(
    folder: Path, device: str, batch_size: int, render: Render, dtype: torch.dtype, attend: Any = flash_attention
) -> Callable[[Sequence[str]], Any]:
    """Embed rows without padding in one long row, as FlashAttention's users do; arguments as above."""
    decoder = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).base_model.eval().to(device)
    tokenizer = load_tokenizer(folder)

    def attention(module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, _: Any, **kwargs: Any) -> Any:
        groups = queries.shape[1] // keys.shape[1]
        keys, values = (tensor.repeat_interleave(groups, dim=1) for tensor in (keys, values))
        rows = [tensor[0].transpose(0, 1) for tensor in (queries, keys, values)]
        settings = (kwargs[name] for name in ("starts", "longest", "scaling", "sliding_window"))
        return attend(*rows, *settings)[None], None

    AttentionInterface.register(_UNPADDED, attention)
    decoder.set_attn_implementation(_UNPADDED)
    no_masks = dict.fromkeys(set(decoder.config.layer_types))

    @torch.inference_mode()
    def embed(sentences: Sequence[str]) -> Any:
        order = sorted(range(len(sentences)), key=lambda place: -len(sentences[place]))
        vectors = []
        for start in range(0, len(order), batch_size):
            texts = [render(sentences[place]) for place in order[start : start + batch_size]]
            rows = tokenizer(texts, truncation=True, max_length=512)["input_ids"]
            ends = list(accumulate(len(row) for row in rows))
            ids, positions, starts = (
                torch.tensor(list(values), device=device)
                for values in (chain(*rows), chain(*(range(len(row)) for row in rows)), [0, *ends])
            )
            states = decoder(
                input_ids=ids[None],
                position_ids=positions[None],
                attention_mask=no_masks,
                use_cache=False,
                starts=starts.int(),
                longest=max(map(len, rows)),
            ).last_hidden_state[0]
            vectors.append(states[starts[1:] - 1].float().cpu())
        return torch.cat(vectors)[torch.tensor(order).argsort()].numpy()

    return embed
