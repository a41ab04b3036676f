"""The command ``sempa generation``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.cli.arguments import (
    NOTHING_KEPT,
    add_base,
    add_batch_size,
    add_command,
    add_compute_options,
    add_data_dir,
)
from sempa_st.errors import SempaError
from sempa_st.evaluation.generation_data import FILES, parse_limits
from sempa_st.utils.tables import table

if TYPE_CHECKING:
    from sempa_st.evaluation.generation import LoadedTask

_SHOWN_VERSIONS = ("lm-eval", "transformers", "torch")


def add(commands: Any) -> None:
    """Add ``sempa generation``."""
    parser = add_command(
        commands,
        "generation",
        _generation,
        "Measure how well models still generate, with lm-evaluation-harness.",
        examples=(
            "gemma3-270m sempa-gemma3-270m --tasks mmlu,wikitext --limit mmlu=2000",
            "runs/best --output generation.json",
        ),
        kept=lambda args: f"{NOTHING_KEPT} Scores are written when all are there; --tasks makes shorter runs.",
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="SemPA folder or Hub id, or base; several are compared side by side"
    )
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", default=",".join(FILES), help="comma-separated (default: %(default)s)")
    add_data_dir(tasks, "generation/*.parquet and text/wikitext2.test.txt")
    tasks.add_argument(
        "--limit",
        metavar="N",
        help="score a fixed subset of N documents of each task, or of some tasks: mmlu=2000,gsm8k=200 (MMLU: N over "
        "all subjects, in proportion to their size)",
    )
    tasks.add_argument(
        "--chat",
        action="store_true",
        help="put prompts into the tokenizer's chat template (default: plain text, as in the paper, for Instruct bases "
        "too)",
    )
    results = parser.add_argument_group("results")
    results.add_argument("--output", metavar="FILE", help="JSON file to write the scores to")
    results.add_argument("--overwrite", action="store_true", help="replace the output file")
    results.add_argument("--json", action="store_true", help="print the scores as JSON instead of a table")
    compute = add_compute_options(parser)
    add_base(compute)
    add_batch_size(compute, "prompts per batch")


def _generation(args: argparse.Namespace) -> None:
    from sempa_st.data.sts import data_dir_or_default
    from sempa_st.evaluation.generation import load_tasks, parse_tasks
    from sempa_st.folder.resolve import describe_method, find_model
    from sempa_st.utils.files import check_output_file, write_json
    from sempa_st.utils.portable import portable_name
    from sempa_st.utils.run_info import run_info

    if args.output:
        check_output_file(args.output, (".json",))
        if Path(args.output).exists() and not args.overwrite:
            raise SempaError(f"The output {args.output} exists. Choose another one, or pass --overwrite to replace it.")
    names = parse_tasks(args.tasks)
    limits = parse_limits(args.limit, names)
    sources = [find_model(model) for model in args.models]
    for model, source in zip(args.models, sources, strict=True):
        if source.kind == "sentence-transformers":
            raise SempaError(f"{model} is no language model. Expected a folder of this package, or a base.")
    adapters = any(source.kind == "sempa" for source in sources)
    tasks = load_tasks(names, data_dir=data_dir_or_default(args.data_dir), limits=limits)
    results = []
    for model, source in zip(args.models, sources, strict=True):
        # --base is for adapters; a bare base that they are compared with stays as it is.
        base = args.base if source.kind == "sempa" or not adapters else None
        results.append(_score(model, describe_method(source, None), tasks, base, args))
    report = {"models": results, "run": {"limits": limits, **run_info()}}
    shared = {**report, "models": [{**result, "model": portable_name(result["model"])} for result in results]}
    print(json.dumps(shared, indent=2, ensure_ascii=False) if args.json else _report(report))
    if args.output:
        write_json(args.output, shared)


def _score(
    name: str, method: str, tasks: Sequence[LoadedTask], base: str | None, args: argparse.Namespace
) -> dict[str, Any]:
    from sempa_st.evaluation.generation import GenerationEvaluator, average_share
    from sempa_st.loading import load
    from sempa_st.model.prompt_eol import PromptEOL

    model = load(name, dtype=args.dtype, device=args.device, base=base)
    module = model[0]
    assert isinstance(module, PromptEOL)
    generator = GenerationEvaluator(module, batch_size=args.batch_size, chat=args.chat)
    scores = []
    for task in tasks:
        print(f"{name}: {task.name}", file=sys.stderr, flush=True)
        scores += generator.score(task)
    if generator.lm.cut:
        print(f"{name}: {generator.lm.cut} prompts were too long; their beginning was cut off.", file=sys.stderr)
    return {
        "model": name,
        "method": method,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "chat": generator.chat,
        "prompts_cut": generator.lm.cut,
        "scores": [asdict(score) for score in scores],
        "average": average_share(scores),
    }


def _report(report: dict[str, Any]) -> str:
    models, run = report["models"], report["run"]
    single = len(models) == 1
    header = ["task", "metric", "n", "shots"]
    for name in _short_names([model["model"] for model in models]):
        header += ["score" if single else name, "stderr"]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in _SHOWN_VERSIONS)
    kinds = dict.fromkeys(f"{model['dtype']} on {model['device']}" for model in models)
    prompts = "in the chat template" if models[0]["chat"] else "without a chat template"
    return f"{table(header, list(_rows(models)))}\nRan with {versions}; {', '.join(kinds)}; prompts {prompts}."


def _rows(models: list[dict[str, Any]]) -> Iterator[list[object]]:
    for cells in zip(*(model["scores"] for model in models), strict=True):
        first = cells[0]
        row = [first["task"], first["metric"], first["n"], first["shots"]]
        for cell in cells:
            row += [cell["score"], cell["stderr"]]
        yield row
    if models[0]["average"] is not None:
        total = sum(cell["n"] for cell in models[0]["scores"] if cell["percent"])
        yield ["average", "", total, "", *(part for model in models for part in (model["average"], ""))]


def _short_names(names: Sequence[str]) -> list[str]:
    """Name models by the last part of their paths, or in full where two would look alike."""
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(short) else list(names)
