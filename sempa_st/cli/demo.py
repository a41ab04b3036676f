"""The command ``sempa demo``: train a model, open it with plain libraries, compare it with others, generate."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.cli.arguments import add_command
from sempa_st.model.embedded import EMBEDDED_BASE
from sempa_st.training.config import TrainConfig
from sempa_st.utils.tables import table

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SENTENCES = (
    "A man is playing a guitar.",
    "Someone is making music on an instrument.",
    "A man is building a guitar.",
    "The shares fell sharply this morning.",
    "Stock prices went down a lot today.",
)
COMPARED = (
    (1, 2, "same meaning, other words"),
    (4, 5, "same meaning, other words"),
    (1, 3, "other meaning, same words"),
    (1, 4, "other meaning, other words"),
)
"""Two sentences by their number, from 1, and how they relate."""
PROMPT = "The best thing about a rainy Sunday is"
_OBJECTIVE = "one-word-listwise"
_TRIPLETS = 192


def add(commands: Any) -> None:
    """Add ``sempa demo``."""
    parser = add_command(
        commands,
        "demo",
        _demo,
        "Train a small adapter on the shipped sample and show what it does.",
        examples=("", "--output runs/demo"),
    )
    parser.add_argument("--output", default="runs/demo", help="folder to write the model to (default: runs/demo)")


def _demo(args: argparse.Namespace) -> None:
    run_demo(Path(args.output))


def run_demo(output: Path) -> None:
    """Train a small adapter on the shipped sample and print what it changes, in about five minutes on two cores.

    Args:
        output: Folder to write the model to. The model of an earlier demo is replaced.

    Raises:
        SempaError: If the folder holds anything else.
    """
    started = time.monotonic()
    from sempa_st.folder.layout import ModelFolder
    from sempa_st.training import train
    from sempa_st.training.record import run_table

    earlier = (ModelFolder(output).record or {}).get("data", {}).get("source") == "sample"

    _print_heading(f"1/4  Train {EMBEDDED_BASE} by {_OBJECTIVE} on {_TRIPLETS} of the shipped triplets")
    record = train(
        TrainConfig(
            base=EMBEDDED_BASE,
            data="sample",
            output=str(output),
            objective=_OBJECTIVE,
            max_triplets=_TRIPLETS,
            learning_rate=2e-4,
            batch_size=32,
            gradient_accumulation=1,
            checkpoint_samples=96,
            dev="sample",
            overwrite=earlier,
        )
    ).record
    print(f"Spearman x 100 on the {record['dev']['pairs']} shipped pairs, before (0 triplets) and after:")
    print(run_table(record))

    _print_heading(
        f"2/4  Open {output} with plain sentence-transformers and with sempa_st.load, and compare the vectors"
    )
    print(f"smallest cosine between the two readers' vectors: {_smallest_cosine(output):.7f}")

    _print_heading("3/4  Compare the base, the model just trained and the models that the package ships")
    print(comparison_table(_models(output)))

    _print_heading(f"4/4  Generate with {output}")
    print(generate(output))
    _print_heading(f"Done in {time.monotonic() - started:.0f} s. The model is in {output}.")


def _smallest_cosine(folder: Path) -> float:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import pairwise_cos_sim

    from sempa_st.loading import load

    native = SentenceTransformer(str(folder), model_kwargs={"dtype": "float32"}).encode(list(SENTENCES))
    return float(pairwise_cos_sim(load(folder, dtype="float32").encode(list(SENTENCES)), native).min())


def _models(output: Path) -> Iterator[tuple[str, SentenceTransformer]]:
    """Yield the heading of its column and each model on the demo's base; only one model is in memory at a time."""
    from sempa_st.folder import shipped
    from sempa_st.folder.layout import ModelFolder
    from sempa_st.loading import load

    yield "base", load(EMBEDDED_BASE)
    yield "just trained", load(output)
    for name in shipped.shipped_names():
        if ModelFolder(shipped.SHIPPED_MODELS / name).base == EMBEDDED_BASE:
            yield name, load(name)


def comparison_table(models: Iterator[tuple[str, SentenceTransformer]]) -> str:
    """Compare models side by side: cosines of pairs of the demo sentences, and the score on the shipped graded pairs.

    Args:
        models: Name and model, loaded by :func:`sempa_st.load`.
    """
    columns = {name: [*_cosines(model), _spearman(model)] for name, model in models}
    pairs = [f"{first} and {second}: {relation}" for first, second, relation in COMPARED]
    rows = zip([*pairs, "Spearman x 100 on the shipped pairs"], *columns.values(), strict=True)
    sentences = "\n".join(f"{number} {sentence}" for number, sentence in enumerate(SENTENCES, 1))
    return f"{sentences}\n\n{table(['cosine of', *columns], [list(row) for row in rows])}"


def _cosines(model: SentenceTransformer) -> list[float]:
    vectors = model.encode(list(SENTENCES))
    similarity = model.similarity(vectors, vectors).tolist()
    return [similarity[first - 1][second - 1] for first, second, _ in COMPARED]


def _spearman(model: SentenceTransformer) -> float:
    from sempa_st.data.sts import dev_pairs

    pairs = dev_pairs("sample", None)
    return pairs.spearman(model.encode(pairs.sentences, convert_to_tensor=True, show_progress_bar=False))


def generate(folder: Path) -> str:
    """Continue the demo prompt by greedy decoding, with plain PEFT and transformers."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    generator = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="float32", trust_remote_code=False)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = generator.generate(**inputs, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def _print_heading(text: str) -> None:
    print(f"\n== {text}", flush=True)
