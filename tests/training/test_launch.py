"""Launchers of several processes; two processes that train together are in test_run.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import sharded
from helpers.tiny import make_config

from sempa_st.errors import SempaError
from sempa_st.training.launch import check_processes, is_launched_in_parallel
from sempa_st.training.run import train

pytestmark = pytest.mark.names_dtype

ALONE = [
    {},
    {"WORLD_SIZE": "1"},
    {"MASTER_ADDR": "127.0.0.1"},  # of a cluster, not of a launcher
    {"ACCELERATE_MIXED_PRECISION": "no"},
    {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1"},
]
SEVERAL = [
    {"WORLD_SIZE": "2"},
    {"OMPI_COMM_WORLD_SIZE": "2"},
    {"PMI_SIZE": "4"},
    {"MV2_COMM_WORLD_SIZE": "2"},
    {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
]


def set_environment(patch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in {name for case in ALONE + SEVERAL for name in case}:
        patch.delenv(name, raising=False)
    for name, value in variables.items():
        patch.setenv(name, value)


@pytest.mark.parametrize("variables", ALONE)
def test_one_process_is_one(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, variables)
    assert not is_launched_in_parallel()
    check_processes(1)


@pytest.mark.parametrize("variables", SEVERAL)
def test_several_processes_are_not_taken_for_one(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, variables)
    assert is_launched_in_parallel()
    check_processes(2)
    with pytest.raises(SempaError, match=r"told to start several processes.*torchrun --nproc_per_node N"):
        check_processes(1)


def test_a_run_that_would_be_alone_writes_nothing(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, SEVERAL[-1])
    with pytest.raises(SempaError, match="told to start several"):
        train(make_config(tiny_base, tmp_path / "model"))
    assert list(tmp_path.iterdir()) == []


def test_accelerate_launch_on_cpus_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    """A real launch: accelerate starts one process for two."""
    arguments = (
        "-m accelerate.commands.launch --cpu --num_processes 2 -m sempa_st train --data sample --dev sample "
        f"--base {tiny_base} --max-triplets 8 --output {tmp_path / 'model'}"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    launched = subprocess.run(
        [sys.executable, *arguments.split()], capture_output=True, text=True, env=environment, timeout=300
    )
    assert launched.returncode != 0
    assert launched.stderr.count("told to start several processes") == 1
    assert not list(tmp_path.glob("model*"))


def test_the_decoder_of_a_sharded_model_gives_the_states_of_the_whole_one(tmp_path: Path) -> None:
    """FSDP2 itself, on two CPUs: the dev score's forward pass between and after steps."""
    output = tmp_path / "states.pt"
    arguments = f"-m torch.distributed.run --standalone --nproc_per_node 2 {Path(sharded.__file__)} {output}"
    environment = {**os.environ, "PYTHONPATH": str(Path(sharded.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    launched = subprocess.run(
        [sys.executable, *arguments.split()], capture_output=True, text=True, env=environment, timeout=300
    )
    assert launched.returncode == 0, launched.stderr
    found = torch.load(output)
    model = sharded.tuned_model()
    for states in found:
        sharded.step(model)
        torch.testing.assert_close(states, sharded.states(model))
    assert not torch.allclose(*found)
