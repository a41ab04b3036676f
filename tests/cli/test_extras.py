"""A command without the packages of its extra ends in one paragraph that says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.generation_data import write_generation_data
from helpers.tiny import save_sts

from sempa_st.data.nli import load_nli
from sempa_st.errors import SempaError

pytestmark = pytest.mark.names_dtype

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = """
import importlib.metadata, sys
package = sys.argv.pop(1)
sys.modules[package] = None  # imports fail, and find_spec returns None
installed = importlib.metadata.Distribution.from_name
def from_name(name):
    if name == package:
        raise importlib.metadata.PackageNotFoundError(name)
    return installed(name)
importlib.metadata.Distribution.from_name = from_name
from sempa_st.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The command line in a process where the package that the first argument names is not installed."""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_generation_data(tmp_path_factory.mktemp("data"))
    save_sts(folder)
    return folder


@pytest.mark.parametrize(
    ("package", "command", "message"),
    [
        ("mteb", "evaluate BASE --data-dir DATA --output OUT", "Evaluation needs the mteb package"),
        ("datasets", "evaluate BASE --data-dir DATA --output OUT", "Evaluation needs the datasets package"),
        ("mteb", "table --base BASE --data-dir DATA --output OUT", "Evaluation needs the mteb package"),
        ("lm_eval", "generation BASE --data-dir DATA", "Measuring generation needs the lm-eval package"),
        ("datasets", "generation BASE --data-dir DATA", "Measuring generation needs the datasets package"),
        ("trl", "train --base BASE --data sample --output OUT", "Training needs the trl package"),
        ("datasets", "train --base BASE --data sample --output OUT", "Training needs the datasets package"),
        ("optuna", "sweep --base BASE --data sample --set lora_r=1,2 --output OUT", "A sweep needs the optuna package"),
        ("trl", "demo --output OUT", "Training needs the trl package"),
        ("matplotlib", "analyze BASE --output OUT", "An analysis needs the matplotlib package"),
    ],
)
def test_a_missing_package_is_named(
    package: str, command: str, message: str, tiny_base: Path, data_dir: Path, tmp_path: Path
) -> None:
    places = {"BASE": tiny_base, "DATA": data_dir, "OUT": tmp_path / "out"}
    argv = [str(places.get(word, word)) for word in command.split()]
    result = subprocess.run([sys.executable, "-c", HIDDEN, package, *argv], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    extras = {"analyze": "plots", **dict.fromkeys(("evaluate", "table", "generation"), "eval")}
    extra = extras.get(command.split()[0], "train")
    assert result.stderr.startswith(f"sempa: {message}")
    assert result.stderr.strip().endswith(f"Install it with: pip install 'sempa-st[{extra}]'")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_reading_from_the_hub_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        SempaError, match=r"^Reading owner/name from the Hub needs the datasets package\. .*\[train\]'$"
    ):
        load_nli("owner/name")


def test_plots_name_their_package(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('{"rows": [], "base": {}}')
    code = (
        "import sys; sys.modules['matplotlib'] = None; import sempa_st\n"
        "from benchmarks.plot_recipe import main\n"
        "try: main()\nexcept sempa_st.SempaError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "curve", str(tmp_path / "data.json"), str(tmp_path / "plot.png")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert result.stdout.strip() == (
        "Drawing a plot needs the matplotlib package. Install it with: pip install 'sempa-st[plots]'"
    )
