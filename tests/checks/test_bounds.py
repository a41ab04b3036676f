"""Bounds on options: values that would exhaust the memory, or never end, are refused before they are expanded."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sempa_st.cli.sweep import read_grid
from sempa_st.errors import SempaError
from sempa_st.methods.registry import parse_method
from sempa_st.training.config import TrainConfig
from sempa_st.utils.options import load_yaml, option_values

FIELDS = dataclasses.fields(TrainConfig)
FLOATS = [field.name for field in FIELDS if get_type_hints(TrainConfig)[field.name] is float]
INTEGERS = [field.name for field in FIELDS if get_type_hints(TrainConfig)[field.name] in (int, int | None)]


def laughs() -> str:
    levels = "abcdefghi"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in itertools.pairwise(levels)]
    return "\n".join(lines)


YAMLS = {
    "references to references": laughs(),
    "as a value": laughs() + "\nbeta: *i",
    "of merges": "\n".join(
        ["a: &a {x: 1}", *(f"{n}: &{n} [{{<<: *{o}}}, *{o}, *{o}, *{o}]" for o, n in itertools.pairwise("abcdefghijk"))]
    ),
    "a list that holds itself": "beta: &a [*a]",
    "depth": "beta: " + "[" * 10_000,
    "depth of lines": "\n".join(" " * n + "a:" for n in range(1400)),
    "length": "beta: 0.1 # " + "x" * (2 << 20),
    "digits": "max_triplets: " + "9" * 5000,
    "infinite": "beta: .inf",
    "infinite as a whole number": "max_triplets: .inf",
    "no number": "beta: .nan",
    "no day": "beta: 2001-99-99",
    "another type": "beta: !!python/object/apply:os.system [true]",
}


@pytest.mark.parametrize("name", YAMLS)
def test_a_file_of_options(run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path, name: str) -> None:
    file, output = tmp_path / "options.yaml", tmp_path / "out"
    file.write_text(YAMLS[name])
    for argv in (
        ("train", "--config", file, "--data", "sample", "--output", output),
        ("sweep", "--grid", file, "--data", "sample", "--output", output),
    ):
        code, _, error = run_cli(*argv)
        assert code == 2, error
        assert error.startswith("sempa: ")
        assert len(error) < 2000
        assert str(file) in error
    assert [path.name for path in tmp_path.iterdir()] == ["options.yaml"]


def test_references_of_a_usual_number_are_followed(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("common: &c {beta: 0.1}\n" + "".join(f"r{n}: {{<<: *c, seed: {n}}}\n" for n in range(200)))
    assert load_yaml(file)["r199"] == {"beta": 0.1, "seed": 199}


def test_a_pipe_is_no_file_of_options(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SempaError, match="it is not a file"):
        load_yaml(tmp_path / "pipe")


def test_a_grid_of_millions_is_told_its_number(tmp_path: Path) -> None:
    values = ",".join(map(str, range(1, 301)))
    axes = [f"{name}={values}" for name in ("seed", "lora_r", "lora_alpha")]
    with pytest.raises(SempaError, match="The grid has 27,000,000 points"):
        read_grid(None, axes)
    assert len(read_grid(None, [f"seed={values}", "lora_r=4,8"])) == 600


@pytest.mark.parametrize(
    "layers", ["0-99999999999", "0-" + "9" * 5000, "99999", "3-1", "٣", "1-2-3", "-1", "0,", "1e3"]
)
def test_layers_are_of_a_decoder(layers: str) -> None:
    with pytest.raises(SempaError, match=r"lora_layers is .*Expected numbers and ranges") as error:
        TrainConfig(data="sample", output="out", lora_layers=layers)
    assert len(str(error.value)) < 500


@given(st.sampled_from(FLOATS + INTEGERS), st.sampled_from([math.inf, -math.inf, math.nan, 1e300, -1e300, 10**400]))
def test_every_number_is_finite_and_of_a_size(name: str, value: Any) -> None:
    with pytest.raises(SempaError, match=f"{name} is "):
        TrainConfig(**{"data": "sample", "output": "out", name: value})


@pytest.mark.parametrize("name", ["inf", "nan", "1e400", "-inf"])
@pytest.mark.parametrize("flag", [name.replace("_", "-") for name in FLOATS])
def test_no_flag_takes_another(
    run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path, flag: str, name: str
) -> None:
    code, _, error = run_cli("train", "--data", "sample", "--output", tmp_path / "out", f"--{flag}={name}")
    assert (code, error.startswith(f"sempa: {flag.replace('-', '_')} is ")) == (2, True), error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("seed", 2**31), ("lora_r", 4097), ("lora_r", 30_000_000)])
def test_whole_numbers_are_of_a_size(name: str, value: int) -> None:
    with pytest.raises(SempaError, match=f"{name} is {value}. Expected"):
        TrainConfig(**{"data": "sample", "output": "out", name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [".inf", ".nan", "2001-99-99", "[" * 5000])
def test_a_method_takes_no_other_either(value: str) -> None:
    with pytest.raises(SempaError, match="contrastive-prompting"):
        parse_method(f"contrastive-prompting:strength={value}")


@pytest.mark.parametrize(
    "value",
    ["!!float ''", "!!int ''", "!!bool x", "!!timestamp x", ":".join(["59"] * 3000)],
    ids=["float", "int", "bool", "timestamp", "base 60"],
)
def test_a_value_that_yaml_itself_cannot_make_is_one_paragraph(value: str, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text(f"beta: {value}\n")
    with pytest.raises(SempaError, match=r"options\.yaml"):
        option_values(TrainConfig, {"config": str(tmp_path / "options.yaml")})


@pytest.mark.parametrize("name", ["base", "data", "output", "dev", "kl_text", "data_dir"])
@pytest.mark.parametrize("value", ["a\0b", "\ud800", "0-9999," * 20_000])
def test_text_that_no_path_can_hold_is_refused(name: str, value: str) -> None:
    with pytest.raises(SempaError, match=f"{name} is .*Expected text of 4096 characters at most"):
        TrainConfig(**{"data": "sample", "output": "out", "kl": 1.0, name: value})
