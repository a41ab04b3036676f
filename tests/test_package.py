from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from sempa_st.data.nli import load_nli
from sempa_st.data.rows import read_rows
from sempa_st.data.sts import read_pairs
from sempa_st.model.patching import OVERRIDDEN
from sempa_st.utils.assets import asset_path

pytestmark = pytest.mark.names_dtype

PACKAGE = Path("sempa_st")
LAYERS = [
    {"errors"},
    {"utils"},
    {"checks"},
    {"model"},
    {"data", "forward"},
    {"folder", "methods"},
    {"training", "loading", "prompt_eol"},
    {"evaluation", "encoding", "hub"},
    {"analysis", "mteb"},
    {"serve"},
    {"cli"},
    {"__main__"},
]
"""A file imports its own folder, and those of the layers above it in this list."""


def modules() -> dict[str, Path]:
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name: path for name, path in names.items() if name != "__init__"}


def imported(name: str, path: Path) -> set[str]:
    """Return the modules of this package that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:  # what is copied into model folders
            found.add(f"{name.rpartition('.')[0]}.{node.module}")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sempa_st."):
            below = str(node.module).removeprefix("sempa_st.")
            inner = {f"{below}.{alias.name}" for alias in node.names}
            found |= {below} if below in modules() else inner & set(modules()) or {f"{below}.__init__"}
    return found


def test_folders_import_only_those_below_them() -> None:
    level = {name: index for index, names in enumerate(LAYERS) for name in names}
    for name, path in modules().items():
        folder = name.partition(".")[0]
        for other in imported(name, path):
            target = other.partition(".")[0]
            assert target == folder or level[target] < level[folder], f"{name} imports {other}"


def test_no_import_leads_back() -> None:
    waiting = {name: imported(name, path) for name, path in modules().items()}
    while leaves := {name for name, others in waiting.items() if not others & set(waiting)}:
        waiting = {name: others for name, others in waiting.items() if name not in leaves}
    assert waiting == {}


def test_nothing_private_is_imported_from_another_file() -> None:
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("sempa_st")):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert set(private) <= {"__version__"}, (name, private)


def private_names(tree: ast.AST) -> Iterator[str]:
    """Yield private attributes of anything but ``self`` and ``cls``, and private names imported from elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in _OWN):
            yield from [node.attr] * is_private(node.attr)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if any(map(is_private, alias.name.split("."))))
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from filter(is_private, names)


_OWN = {"self", "cls"}
_PUBLIC = {"_fields", "_actions"}
"""What the standard library documents in spite of its underscore, and argparse's options, which completion lists."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in _PUBLIC


def test_private_names_of_other_libraries_are_in_patching_only() -> None:
    hooks = {name.rpartition(".")[2] for name in OVERRIDDEN}  # a method that overrides one may call the base's
    for name, path in modules().items():
        found = set(private_names(ast.parse(path.read_text()))) - hooks
        assert found == set() or name == "model.patching", (name, found)
    sample = "from a._b import c\nimport d._e\nf._g()\nself._h = cls._i\nj(k)._l\nfrom m import _n\no.__p__"
    assert sorted(private_names(ast.parse(sample))) == ["_b", "_g", "_l", "_n", "d._e"]


def test_methods_of_other_libraries_are_replaced_in_patching_only() -> None:
    methods = {"forward", "encode", "generate", "__class__", "__call__"}
    for name, path in modules().items():
        changed = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del)
        }
        assert changed & methods == set() or name == "model.patching", name


def test_the_module_file_needs_nothing_else_of_the_package() -> None:
    names = {
        name: imported(name, PACKAGE / "model" / f"{name.partition('.')[2]}.py")
        for name in ("model.prompt_eol", "model.patching", "model.peft_models", "model.token_rows")
    }
    assert names == {
        "model.prompt_eol": {"model.patching", "model.peft_models", "model.token_rows"},
        "model.patching": set(),
        "model.peft_models": {"model.patching"},
        "model.token_rows": set(),
    }


def test_the_top_of_the_package_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 7


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
import sempa_st.training.run, sempa_st.evaluation.sts, sempa_st.evaluation.generation
import sempa_st.loading, sempa_st.folder.copying, sempa_st.analysis.run
after = (torch.get_num_threads(), logging.getLogger().level, list(logging.getLogger().handlers), dict(os.environ))
assert before == after, (before, after)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_files_and_functions_stay_short() -> None:
    """Files of 300 lines, functions of 50 beside their docstring."""
    for name, path in modules().items():
        assert len(path.read_text().splitlines()) <= 300, name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                docstring = (ast.get_docstring(node, clean=False) or "").splitlines()
                assert int(node.end_lineno or 0) - node.lineno + 1 - len(docstring) <= 50, (name, node.name)


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


COMMANDS = [
    "train",
    "sweep",
    "encode",
    "evaluate",
    "mteb",
    "compare",
    "generation",
    "analyze",
    "tokens",
    "copy",
    "push",
    "pull",
    "demo",
]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = subprocess.run([sys.executable, "-m", "sempa_st", name, "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: sempa {name}")


def test_every_dependency_has_a_lower_and_an_upper_bound() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = [entry for name, group in project["optional-dependencies"].items() if name != "dev" for entry in group]
    for entry in project["dependencies"] + extras:
        assert re.search(r">=[\d.]+,<[\d.]+$|==[\d.]+$", entry.partition(";")[0]), entry


def test_the_page_on_pypi_shows_pictures_and_links() -> None:
    readme = Path("README.md").read_text()
    assert len(readme.encode()) <= 12 * 1024
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)|<img[^>]*src=[\"']([^\"']*)", readme)
    assert pictures
    project = tomllib.loads(Path("pyproject.toml").read_text())
    urls = project["project"]["urls"]
    assert urls.keys() == {"Homepage", "Documentation", "Repository", "Issues", "Changelog"}
    raw = urls["Repository"].replace("https://github.com", "https://raw.githubusercontent.com") + "/main/"
    files = [(markdown or html).removeprefix(raw) for markdown, html in pictures]
    files += [url.removeprefix(urls["Repository"] + "/blob/main/") for url in urls.values() if "/blob/" in url]
    assert all(Path(file).is_file() for file in files), files
    assert all((markdown or html).startswith(raw) for markdown, html in pictures)
    page = str(metadata.metadata("sempa-st").get_payload())  # of the last installation
    assert "](https://github.com/sempa-st/sempa-st/blob/main/docs/" in page
    assert not re.search(r"\]\((docs|benchmarks)/", page)
    (change,) = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(change["pattern"], change["replacement"], readme))
    blob = urls["Repository"] + "/blob/main/"
    pages = [link.removeprefix(blob).partition("#")[0] for link in links if link.startswith(blob)]
    assert len(pages) > 20
    assert all(Path(page).exists() for page in pages), pages
    assert all(re.match("https://|#", link) for link in links)
