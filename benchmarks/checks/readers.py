"""Compare all the ways to read one model folder, in float32, on real sentences.

    python -m benchmarks.checks.readers FOLDER SENTENCES.parquet --column sentence1 --json FILE.json

Reference is a manual forward of PEFT's or transformers' own causal LM, one sentence at a time, no padding. Each reader
runs with batches of 1 and of 32 and with padding on either side, on the folder as it is and (for an adapter) merged.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from sentence_transformers import SentenceTransformer
from torch.nn.functional import cosine_similarity
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import sempa_st
from sempa_st.encoding import read_sentences
from sempa_st.folder.copying import copy_model
from sempa_st.folder.layout import ModelFolder
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.utils.files import write_json
from sempa_st.utils.run_info import run_info
from sempa_st.utils.tables import table

THRESHOLD = 0.99999


def mixed_lengths(texts: list[str], count: int) -> list[str]:
    """Return ``count`` distinct sentences spread evenly over the range of lengths."""
    ordered = sorted(dict.fromkeys(texts), key=len)
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]


def manual_vectors(folder: Path, sentences: list[str]) -> torch.Tensor:
    """Embed as the paper does: plain tokenisation, all hidden states, last token of the last layer."""
    auto_class = AutoPeftModelForCausalLM if ModelFolder(folder).is_adapter else AutoModelForCausalLM
    model = auto_class.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    template = EMBEDDING_TEMPLATES[ModelFolder(folder).template]
    vectors = []
    for sentence in tqdm(sentences, desc="manual"):
        inputs = tokenizer(template.text(sentence), return_tensors="pt")
        with torch.no_grad():
            vectors.append(model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1])
    return torch.stack(vectors)


def readers(folder: Path) -> Iterator[tuple[str, SentenceTransformer]]:
    """Yield every reader of ``folder``, with both padding sides."""
    for side in ("left", "right"):
        native = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
        ours = sempa_st.load(folder, dtype="float32", device="cpu")
        for name, model in (("native", native), ("sempa_st", ours)):
            model.tokenizer.padding_side = side
            yield f"{name}, pad {side}", model


def main() -> int:
    """Run all comparisons; return exit code 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("sentences")
    parser.add_argument("--column")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--json")
    args = parser.parse_args()
    sentences = mixed_lengths([text for _, text in read_sentences(args.sentences, column=args.column)], args.count)
    reference = manual_vectors(args.folder, sentences)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"as is": args.folder}
        if ModelFolder(args.folder).is_adapter:
            folders["merged"] = copy_model(str(args.folder), Path(scratch) / "merged", merge=True)
        for kind, folder in folders.items():
            for reader, model in readers(folder):
                for batch_size in (1, 32):
                    vectors = model.encode(sentences, batch_size=batch_size, convert_to_tensor=True)
                    lowest = float(cosine_similarity(vectors, reference).min())
                    rows.append([kind, reader, batch_size, f"{lowest:.8f}", "ok" if lowest >= THRESHOLD else "LOW"])
                    print(*rows[-1], flush=True)
    header = ["folder", "reader", "batch", "lowest cosine", ""]
    print(table(header, rows))
    if args.json:
        cells = [dict(zip(header[:-1], row, strict=False)) for row in rows]
        write_json(args.json, {"sentences": len(sentences), "results": cells, "run": run_info()})
    return int(any(row[-1] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
