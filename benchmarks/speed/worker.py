"""Embed texts with a backend of sentence-transformers, in another Python environment; started by ``peers.py``.

    python worker.py BACKEND FOLDER BATCH_SIZE THREADS

A line of input is JSON with ``texts``, and ``output``, the file to write; a line of output says that it is there.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer


def main() -> None:
    """Load or export the model, then answer requests line by line."""
    backend, folder, batch_size, threads = sys.argv[1:]
    # What the libraries print is no reply.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(threads))
    transformer = Transformer(folder, max_seq_length=512, backend=backend)
    # An exported causal decoder attends to padding before a row, never to padding behind it.
    transformer.tokenizer.padding_side = "right"
    pooling = Pooling(transformer.get_word_embedding_dimension(), pooling_mode="lasttoken")
    model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        vectors = model.encode(request["texts"], batch_size=int(batch_size), show_progress_bar=False)
        np.save(request["output"], vectors)
        print("done", file=replies, flush=True)


if __name__ == "__main__":
    main()
