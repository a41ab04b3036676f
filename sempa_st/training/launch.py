"""Several processes: recognise launchers (torchrun, mpirun, ``accelerate launch``), and gather sharded weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def check_sharding(objective: str) -> None:
    """Raise :class:`SempaError` if weights are to be sharded and the objective's trainer cannot do that.

    All but TRL's trainer call the decoder inside the model, which FSDP and ZeRO-3 gather only when all of it is called.

    Args:
        objective: The objective, or the weighted sum.
    """
    is_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    is_zero3 = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    if (is_fsdp or is_zero3) and objective != "dpo":
        raise SempaError(
            f"The objective {objective} cannot be trained with weights sharded by {'FSDP' if is_fsdp else 'ZeRO-3'}, "
            "but dpo without --kl alone. Expected a launcher's configuration for DDP or ZeRO-2."
        )


@contextmanager
def whole(trained: Any, decoder: Any) -> Iterator[None]:
    """Let a decoder be called by itself within the block, in a model that FSDP2 has sharded.

    FSDP2 gathers the weights of a layer as the layer is called, and those that are in no layer (the final norm) as the
    whole model is called. The dev score calls the decoder alone, after the first step: FSDP2 wants the whole model to
    be called before a part of it.

    Args:
        trained: The model as it was given to FSDP2, or any other.
        decoder: The decoder in it.
    """
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(trained, FSDPModule):
        yield
        return
    hook = decoder.register_forward_pre_hook(lambda *_: trained.unshard())
    try:
        yield
    finally:
        hook.remove()
        trained.reshard()
