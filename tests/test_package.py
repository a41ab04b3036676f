from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sempa_st.assets import asset_path
from sempa_st.files import read_rows
from sempa_st.nli import load_nli
from sempa_st.stsdata import read_pairs

pytestmark = pytest.mark.names_dtype

PACKAGE = Path("sempa_st")
LAYERS = [
    {"files", "hub", "jinja_child"},
    {
        "cached",
        "prompts",
        "devices",
        "runinfo",
        "options",
        "names",
        "tokens",
        "patterns",
        "prompt_eol",
        "objectives",
        "words",
        "last_layer",
    },
    {"flash", "schemas", "jinja_bounds"},
    {"inspection"},
    {"readable"},
    {"weights"},
    {"finite", "nli", "bases", "closing", "packing", "methods.layers"},
    {"embed"},
    {"adapter_kinds"},
    {"methods.method"},
    {"methods.pooling", "methods.templates", "methods.echo", "methods.encoders"},
    {"methods.contrastive_prompting", "methods.token_prepending", "methods.llm2vec"},
    {"methods.registry"},
    {"methods.module"},
    {"preferences", "stsdata", "gendata", "adapters", "folder", "embedder", "config"},
    {"digests"},
    {"settings", "card", "encoding", "evaluate.shared_prefix", "evaluate.once"},
    {"shipped", "int8"},
    {"sources"},
    {"loading"},
    {
        "copying",
        "train.callbacks",
        "train.scores",
        "train.answers",
        "train.prefixes",
        "train.reference",
        "train.passages",
    },
    {"train.objectives", "train.batches", "train.forwards", "averaging"},
    {"train.checkpoints"},
    {"train.trainer", "train.workdir", "train.record", "evaluate.sts", "evaluate.generation"},
    {"train.alignment", "train.contrastive", "train.ranking", "train.journal"},
    {"train.parts"},
    {"train.build"},
    {"train.run"},
    {"demo", "train.sweep", "evaluate.systems"},
    {"sweep_cli", "generation_cli", "table_cli", "copy_cli"},
    {"cli"},
    {"__main__"},
]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level == 1:  # only what is copied into model folders is imported so, from the top
            names.add(str(node.module))
        elif (node.module or "").startswith("sempa_st."):
            names.add(str(node.module).removeprefix("sempa_st."))
    return names


def modules() -> dict[str, Path]:
    found = {str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path for path in PACKAGE.rglob("*.py")}
    return {name: path for name, path in found.items() if not name.endswith("__init__")}


def test_imports_point_downwards_only() -> None:
    level = {name: index for index, names in enumerate(LAYERS) for name in names}
    assert set(level) == set(modules())
    for name, path in modules().items():
        for other in imported(path):
            assert level[other] < level[name], f"{name} imports {other}"


def test_the_module_file_needs_nothing_of_the_package() -> None:
    assert imported(PACKAGE / "prompt_eol.py") == {"peft_models", "token_rows"}
    assert imported(PACKAGE / "peft_models.py") == imported(PACKAGE / "token_rows.py") == set()


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, sempa_st, sempa_st.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""


def test_importing_everything_changes_no_global_state() -> None:
    code = """
import logging, os, sys
import torch, trl, mteb, sentence_transformers
before = (torch.get_num_threads(), logging.getLogger().level, list(logging.getLogger().handlers), dict(os.environ))
import sempa_st.train.run, sempa_st.evaluate.sts, sempa_st.evaluate.generation, sempa_st.loading, sempa_st.copying
after = (torch.get_num_threads(), logging.getLogger().level, list(logging.getLogger().handlers), dict(os.environ))
assert before == after, (before, after)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_files_stay_short() -> None:
    for path in modules().values():
        assert len(path.read_text().splitlines()) <= 320, path


def test_the_shipped_triplets() -> None:
    data = load_nli("sample")
    assert len(data.triplets) >= 300
    sentences = [s for t in data.triplets for s in (t.premise, t.entailed, t.contradicted)]
    assert len(set(sentences)) == len(sentences)
    lengths = [len(t.premise.split()) for t in data.triplets]
    assert min(lengths) <= 6
    assert max(lengths) >= 25


def test_the_shipped_pairs() -> None:
    pairs = read_pairs([asset_path("sts_sample.jsonl")])
    assert len(pairs) >= 120
    assert min(pairs.scores) == 0
    assert max(pairs.scores) == 5
    for grade in range(6):
        assert sum(abs(score - grade) <= 0.5 for score in pairs.scores) >= 15
    rows = read_rows(asset_path("sts_sample.jsonl"))
    assert len({json.dumps(row) for row in rows}) == len(rows)


@pytest.mark.parametrize("name", ["train", "sweep", "encode", "evaluate", "generation", "copy", "demo"])
def test_every_command_has_help(name: str) -> None:
    result = subprocess.run([sys.executable, "-m", "sempa_st", name, "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: sempa {name}")


def test_every_dependency_has_a_lower_and_an_upper_bound() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = [entry for name, group in project["optional-dependencies"].items() if name != "dev" for entry in group]
    for entry in project["dependencies"] + extras:
        assert re.search(r">=[\d.]+,<[\d.]+$|==[\d.]+$", entry), entry
