"""Score many adapters and their base on the seven STS test sets in one pass over the sentences.

Shared computation is run once per batch. Activated adapters continue from the base's key/value cache of all tokens
before the template's suffix. Plain adapters on upper layers only (``--lora-layers``) continue from the base's hidden
states below their first layer. A plain adapter on all layers shares nothing and is run packed. The scores are those
of ``sempa evaluate --protocol senteval``.

    python -m benchmarks.score_together MODEL ... --data-dir DIR --output FILE.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from sempa_st.data.sts import STS_TASKS, GradedPairs, local_files, read_pairs
from sempa_st.errors import SempaError
from sempa_st.folder.layout import ModelFolder
from sempa_st.folder.resolve import adapter_base, find_model
from sempa_st.forward.batching import batches_within_tokens
from sempa_st.forward.embed import embed_rows_fast
from sempa_st.forward.prefix_cache import PrefixCache
from sempa_st.model.base_model import load_causal_lm
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.tokenizer import load_tokenizer, suffix_tokens
from sempa_st.utils.files import read_json, write_json
from sempa_st.utils.options import split_list
from sempa_st.utils.run_info import run_info
from sempa_st.utils.tables import table

_TOKENS = 3000
_BASE = "base"


@dataclass
class Together:
    """Adapters on one base, in the order of their folders.

    Args:
        module: Embedding module around the base with all adapters.
        first_layers: First adapted layer of each plain adapter; None for an activated one, which uses the cache.
        closing: Number of the template's suffix tokens.
        below: The base's input hidden states of such a layer for the current batch, one tensor per micro-batch.
    """

    module: PromptEOL
    first_layers: list[int | None]
    closing: int
    below: dict[int, list[Tensor]] = field(default_factory=dict)


def main() -> None:
    """Score the models named on the command line; finished sets of an earlier call are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="folders of adapters on one base and template")
    parser.add_argument("--data-dir", required=True, help="folder with sts/*.parquet")
    parser.add_argument("--split", default="test", choices=("test", "dev"))
    parser.add_argument("--tasks", default=",".join(STS_TASKS))
    parser.add_argument("--output", required=True, help="JSON file to write")
    args = parser.parse_args()
    output = Path(args.output)
    folders = {name: find_model(name).folder for name in args.models}
    together = load_together(list(folders.values()))
    scores: dict[str, dict[str, float]] = read_json(output)["scores"] if output.is_file() else {}
    names = [_BASE, *args.models]
    for task in split_list(args.tasks):
        if all(task in scores.get(name, {}) for name in names):
            continue
        pairs = read_pairs(local_files(args.data_dir, task, args.split, "senteval"))
        for name, score in zip(names, score_pairs(together, pairs, task), strict=True):
            scores.setdefault(name, {})[task] = score
        write_json(output, {**run_info(), "protocol": "senteval", "split": args.split, "scores": scores})
    tasks = [task for task in STS_TASKS if task in scores[_BASE]]
    rows = [
        [name, *(scores[name][t] for t in tasks), sum(scores[name][t] for t in tasks) / len(tasks)] for name in names
    ]
    print(table(["model", *tasks, "average"], rows))


def load_together(folders: list[ModelFolder]) -> Together:
    """Put the adapters of all folders on one base, named 0, 1, ...

    Raises:
        SempaError: If a folder holds no adapter, or one that acts from the template's opening on.
    """
    template = str(folders[0].template)
    tokenizer = load_tokenizer(folders[0].path)
    closing = suffix_tokens(tokenizer, template)
    first_layers: list[int | None] = []
    for folder in folders:
        settings, invocation = folder.adapter_settings, folder.invocation
        if settings is None or invocation not in ([], closing):
            raise SempaError(
                f"{folder.path} cannot be scored with others. Expected an adapter, plain or of the closing tokens. "
                "Score it with sempa evaluate."
            )
        layers = settings.get("layers_to_transform")
        first_layers.append(None if invocation else min(layers or [0]))
    model = load_causal_lm(adapter_base(folders[0]).folder, torch.float32)
    tuned = PeftModel.from_pretrained(model, folders[0].path, adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        tuned.load_adapter(str(folder.path), adapter_name=str(number))
    return Together(PromptEOL(tuned.eval(), tokenizer, template=template), first_layers, len(closing))


@torch.no_grad()
def score_pairs(together: Together, pairs: GradedPairs, task: str) -> list[float]:
    """Return the Spearman correlation times 100 of the base, then of each model."""
    module = together.module
    rows = module.token_rows(pairs.sentences)
    vectors = [torch.empty(len(rows), module.get_embedding_dimension()) for _ in [_BASE, *together.first_layers]]
    for batch in batches_within_tokens([len(row) for row in rows], _TOKENS, task):
        for store, states in zip(vectors, continued(together, [rows[index] for index in batch]), strict=True):
            store[batch] = states
    return [pairs.spearman(found) for found in vectors]


def continued(together: Together, rows: list[list[int]]) -> Iterator[Tensor]:
    """Yield the last token's states of the base, then of each model, what they share run once."""
    module = together.module
    padded = module.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    activated = [str(number) for number, first in enumerate(together.first_layers) if first is None]
    module.model.set_adapter(activated[0] if activated else "0")
    with caught_below(together):
        inputs = (padded["input_ids"], padded["attention_mask"])
        open_rows = PrefixCache(module, *inputs, num_suffix_tokens=together.closing)
        yield open_rows.base_suffix_states()
    for number, first in enumerate(together.first_layers):
        module.model.set_adapter(str(number))
        if first is None:
            yield open_rows.suffix_states()
        elif first:
            yield go_on_above(together, open_rows, first)
        else:
            yield embed_rows_fast(module, padded["input_ids"], padded["attention_mask"])


@contextmanager
def caught_below(together: Together) -> Iterator[None]:
    """Keep the states that enter the first adapted layers, for the time of the base's passes over a batch."""
    handles = []
    for first in filter(None, set(together.first_layers)):
        together.below[first] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], first: int = first) -> None:
            together.below[first].append(inputs[0])

        handles.append(together.module.decoder.layers[first].register_forward_pre_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def go_on_above(together: Together, open_rows: PrefixCache, first: int) -> Tensor:
    """Return the last token's states under the active adapter, run from its first layer on."""
    decoder: Any = together.module.decoder
    states = torch.cat([piece.expand(len(open_rows.mask), -1, -1) for piece in together.below[first]], dim=1)
    layers = decoder.layers
    decoder.layers = nn.ModuleList([*[_PassOn() for _ in layers[:first]], *layers[first:]])
    try:
        output = decoder(
            inputs_embeds=states,
            attention_mask=open_rows.mask,
            position_ids=(open_rows.mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        )
    finally:
        decoder.layers = layers
    last: Tensor = output.last_hidden_state[:, -1]
    return last


class _PassOn(nn.Module):
    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return states


if __name__ == "__main__":
    main()
