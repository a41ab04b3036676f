"""The whole way on two cores: score a base, train it by DPO, open the folder with plain tools, score, generate."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from sempa_st.bases import EMBEDDED_BASE
from sempa_st.config import TrainConfig
from sempa_st.console import table

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SENTENCES = (
    "A man is playing a guitar.",
    "Someone is making music on an instrument.",
    "A man is building a guitar.",
    "The shares fell sharply this morning.",
    "Stock prices went down a lot today.",
)
PROMPT = "The best thing about a rainy Sunday is"
_TRIPLETS = 96


def run_demo(output: Path) -> None:
    """Train a small adapter on the shipped sample and print what it changed; about five minutes on two cores.

    Args:
        output: Folder to write the model to; what an earlier demo left there is replaced, and nothing else is.
    """
    started = time.monotonic()
    from sempa_st.card import read_record
    from sempa_st.train.record import run_table
    from sempa_st.train.run import train

    earlier = (read_record(output) or {}).get("data", {}).get("source") == "sample"

    _say(f"1/4  Train {EMBEDDED_BASE} by DPO on {_TRIPLETS} of the shipped triplets")
    record, _ = train(
        TrainConfig(
            base=EMBEDDED_BASE,
            data="sample",
            output=str(output),
            max_triplets=_TRIPLETS,
            learning_rate=5e-5,
            batch_size=8,
            gradient_accumulation=1,
            checkpoint_samples=48,
            dev="sample",
            overwrite=earlier,
        )
    )
    print(f"Spearman x 100 on the {record['dev']['pairs']} shipped pairs, before (0 triplets) and after:")
    print(run_table(record))

    _say(f"2/4  Open {output} with plain sentence-transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import pairwise_cos_sim

    model = SentenceTransformer(str(output), model_kwargs={"dtype": "float32"})
    print(similarity_table(model))

    _say("3/4  Open the same folder with sempa_st.load and compare the vectors")
    import sempa_st

    ours = sempa_st.load(output, dtype="float32").encode(list(SENTENCES))
    cosine = pairwise_cos_sim(ours, model.encode(list(SENTENCES)))
    print(f"smallest cosine between the two readers' vectors: {cosine.min():.7f}")

    _say("4/4  Generate with the same folder")
    print(generate(output))
    _say(f"Done in {time.monotonic() - started:.0f} s. The model is in {output}.")


def similarity_table(model: SentenceTransformer) -> str:
    """Lay out the cosine of each demo sentence with each other one."""
    vectors = model.encode(list(SENTENCES))
    rows = zip(SENTENCES, model.similarity(vectors, vectors).tolist(), strict=True)
    header = ["", *(str(number) for number in range(1, len(SENTENCES) + 1))]
    return table(header, [[f"{number} {sentence}", *row] for number, (sentence, row) in enumerate(rows, 1)])


def generate(folder: Path) -> str:
    """Continue the demo prompt, greedily, with the generator that the folder still is."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="float32")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = generator.generate(**inputs, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)
