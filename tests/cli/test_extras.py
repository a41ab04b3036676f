"""A command without the packages of its extra ends in one paragraph that says what to install."""

from __future__ import annotations

import json
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
import importlib.metadata, json, os, sys
import torch, transformers.modeling_utils  # of no extra; imported once for all commands
installed = importlib.metadata.Distribution.from_name
cases = json.load(sys.stdin)
for case in cases:
    if os.fork() == 0:
        package = case["package"]
        assert package not in sys.modules
        sys.modules[package] = None  # imports fail, and find_spec returns None
        def from_name(name):
            if name == package:
                raise importlib.metadata.PackageNotFoundError(name)
            return installed(name)
        importlib.metadata.Distribution.from_name = from_name
        sys.stderr = open(case["stderr"], "w", buffering=1)
        from sempa_st.cli import main
        code = 1
        try:
            code = main(case["argv"])
        finally:
            sys.stderr.flush()
            os._exit(code)
    case["code"] = os.waitstatus_to_exitcode(os.wait()[1])
print(json.dumps([case["code"] for case in cases]))
"""
"""The command line, in processes in which the package that a case names is not installed."""

CASES = {
    ("mteb", "evaluate BASE --data-dir DATA --output OUT"): ("Evaluation needs the mteb package", "eval"),
    ("datasets", "evaluate BASE --data-dir DATA --output OUT"): ("Evaluation needs the datasets package", "eval"),
    ("mteb", "table --base BASE --data-dir DATA --output OUT"): ("Evaluation needs the mteb package", "eval"),
    ("lm_eval", "generation BASE --data-dir DATA"): ("Measuring generation needs the lm-eval package", "eval"),
    ("datasets", "generation BASE --data-dir DATA"): ("Measuring generation needs the datasets package", "eval"),
    ("trl", "train --base BASE --data sample --output OUT"): ("Training needs the trl package", "train"),
    ("datasets", "train --base BASE --data sample --output OUT"): ("Training needs the datasets package", "train"),
    ("bitsandbytes", "train --base BASE --data sample --output OUT --load-in-4bit"): (
        "--load-in-4bit needs the bitsandbytes package",
        "4bit",
    ),
    ("tensorboard", "train --base BASE --data sample --output OUT --report-to tensorboard"): (
        "--report-to tensorboard needs the tensorboard package",
        "tensorboard",
    ),
    ("optuna", "sweep --base BASE --data sample --set lora_r=1,2 --output OUT"): (
        "A sweep needs the optuna package",
        "train",
    ),
    ("optuna", "analyze BASE --only templates --dtype float32 --output OUT"): (
        "The part templates needs the optuna",
        "train",
    ),
    ("trl", "demo --output OUT"): ("Training needs the trl package", "train"),
    ("fastapi", "serve BASE --port 0"): ("sempa serve needs the fastapi package", "serve"),
    ("matplotlib", "analyze BASE --output OUT"): ("An analysis needs the matplotlib package", "plots"),
}
"""The message, and the extra to install, by the package that is missing and the command."""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_generation_data(tmp_path_factory.mktemp("data"))
    save_sts(folder)
    return folder


@pytest.fixture(scope="module")
def endings(
    data_dir: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[int, str, Path]]:
    """For each case the exit status, what was printed as an error, and the output folder."""
    folder = tmp_path_factory.mktemp("endings")
    cases, outputs = [], []
    for number, (package, command) in enumerate(CASES):
        places = {"BASE": tiny_base, "DATA": data_dir, "OUT": folder / f"out-{number}"}
        argv = [str(places.get(word, word)) for word in command.split()]
        cases.append({"package": package, "argv": argv, "stderr": str(folder / f"{number}.txt")})
        outputs.append(places["OUT"])
    result = subprocess.run([sys.executable, "-c", HIDDEN], input=json.dumps(cases), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    codes = json.loads(result.stdout.splitlines()[-1])
    errors = [Path(case["stderr"]).read_text() for case in cases]
    return dict(zip(CASES, zip(codes, errors, outputs, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_missing_package_is_named(
    case: tuple[str, str], endings: dict[tuple[str, str], tuple[int, str, Path]]
) -> None:
    code, stderr, output = endings[case]
    assert code == 2, stderr
    message, extra = CASES[case]
    assert stderr.startswith(f"sempa: {message}")
    assert stderr.strip().endswith(f"Install it with: pip install 'sempa-st[{extra}]'")
    assert len(stderr.splitlines()) == 1
    assert not output.exists()


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
