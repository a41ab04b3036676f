"""Recognise launchers of several processes, such as torchrun, mpirun and ``accelerate launch``."""

from __future__ import annotations

import os

from sempa_st.errors import SempaError

_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables with the number of processes: of torchrun and accelerate, and of three MPI libraries."""


def is_launched_in_parallel() -> bool:
    """Return whether the environment is that of a launcher told to start several processes.

    ``accelerate launch --num_processes N`` starts one process without a GPU, whatever N is, and sets no number of
    processes, but the address of a main process.
    """
    sizes = [os.environ.get(name, "") for name in _WORLD_SIZES]
    if any(sizes):
        return any(size.isdecimal() and int(size) > 1 for size in sizes)
    return "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ


def check_processes(num_processes: int) -> None:
    """Raise :class:`SempaError` if a launcher was told to start several processes, and this one is alone.

    Args:
        num_processes: Number of processes that train together.
    """
    if num_processes == 1 and is_launched_in_parallel():
        raise SempaError(
            "The launcher was told to start several processes, but this one would train alone, with a smaller batch. "
            "Without a GPU, accelerate launch starts one process whatever --num_processes is. For N processes on CPUs "
            "run torchrun --nproc_per_node N -m sempa_st train --device cpu ...; for one process run sempa train ..., "
            "with MASTER_ADDR unset."
        )
