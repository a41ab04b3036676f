"""Score many activated adapters, and their base, on the seven STS test sets in one pass over the sentences.

Up to the template's closing tokens all of them compute the same, so that each batch of sentences is run once, as a
key/value cache, and then continued once per model. The scores are those of ``sempa evaluate --protocol senteval``.

    python benchmarks/score_activated.py MODEL ... --data-dir DIR --output FILE.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from scipy.stats import spearmanr
from sentence_transformers.util import pairwise_cos_sim

from sempa_st.bases import load_causal_lm, load_tokenizer
from sempa_st.closing import OpenRows
from sempa_st.console import table
from sempa_st.errors import SempaError
from sempa_st.files import read_json, write_json
from sempa_st.folder import is_activated, template_name
from sempa_st.loading import adapter_base, find_model
from sempa_st.prompt_eol import PromptEOL
from sempa_st.runinfo import run_info
from sempa_st.stsdata import STS_TASKS, GradedPairs, local_files, read_pairs
from sempa_st.train.reference import in_batches

_TOKENS = 3000
_BASE = "base"


def main() -> None:
    """Score the models named on the command line; finished sets of an earlier call are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="folders with activated adapters on one base and template")
    parser.add_argument("--data-dir", required=True, help="folder with sts/*.parquet")
    parser.add_argument("--split", default="test", choices=("test", "dev"))
    parser.add_argument("--tasks", default=",".join(STS_TASKS))
    parser.add_argument("--output", required=True, help="JSON file to write")
    args = parser.parse_args()
    output = Path(args.output)
    folders = {name: find_model(name).folder for name in args.models}
    module = load_together(list(folders.values()))
    scores: dict[str, dict[str, float]] = read_json(output)["scores"] if output.is_file() else {}
    names = [_BASE, *args.models]
    for task in args.tasks.split(","):
        if all(task in scores.get(name, {}) for name in names):
            continue
        pairs = read_pairs(local_files(args.data_dir, task, args.split, "senteval"))
        for name, score in zip(names, score_pairs(module, pairs, len(folders), task), strict=True):
            scores.setdefault(name, {})[task] = score
        write_json(output, {**run_info(), "protocol": "senteval", "split": args.split, "scores": scores})
    tasks = [task for task in STS_TASKS if task in scores[_BASE]]
    rows = [
        [name, *(scores[name][t] for t in tasks), sum(scores[name][t] for t in tasks) / len(tasks)] for name in names
    ]
    print(table(["model", *tasks, "average"], rows))


def load_together(folders: list[Path]) -> PromptEOL:
    """Put the adapters of all folders on one base, named 0, 1, ...

    Raises:
        SempaError: If a folder holds no activated adapter.
    """
    for folder in folders:
        if not is_activated(folder):
            raise SempaError(f"{folder} holds no activated adapter. Score it with sempa evaluate.")
    model = load_causal_lm(adapter_base(folders[0]).folder, torch.float32)
    tuned = PeftModel.from_pretrained(model, folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        tuned.load_adapter(str(folder), adapter_name=str(number))
    module = PromptEOL(tuned.eval(), load_tokenizer(folders[0]), template=str(template_name(folders[0])))
    if not module.closing_only:
        raise SempaError(
            f"The adapter of {folders[0]} acts on more than the closing tokens. Score it with sempa evaluate."
        )
    return module


@torch.no_grad()
def score_pairs(module: PromptEOL, pairs: GradedPairs, models: int, task: str) -> list[float]:
    """Return the Spearman correlation times 100 of the base, then of each model."""
    sentences = list(dict.fromkeys([*pairs.first, *pairs.second]))
    rows = module.token_rows(sentences)
    vectors = [torch.empty(len(rows), module.get_embedding_dimension()) for _ in range(models + 1)]
    for batch in in_batches([len(row) for row in rows], _TOKENS, task):
        for store, states in zip(vectors, continued(module, [rows[index] for index in batch], models), strict=True):
            store[batch] = states
    place = {sentence: index for index, sentence in enumerate(sentences)}
    first, second = ([place[sentence] for sentence in side] for side in (pairs.first, pairs.second))
    return [100 * float(spearmanr(pairwise_cos_sim(v[first], v[second]), pairs.scores).statistic) for v in vectors]


def continued(module: PromptEOL, rows: list[list[int]], models: int) -> Iterator[torch.Tensor]:
    """Yield the last token's states of the base, then of each model, the sentences themselves run once."""
    padded = module.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    open_rows = OpenRows(module, padded["input_ids"], padded["attention_mask"])
    yield open_rows.base_states()
    for number in range(models):
        module.model.set_adapter(str(number))
        yield open_rows.last_states()


if __name__ == "__main__":
    main()
