"""Run by torchrun: shard a tiny model by FSDP2 over CPUs, and write what its decoder gives after each of two steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers.tiny import add_random_adapter, make_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sempa_st.training.launch import whole

IDS = torch.arange(3, 15).view(2, 6)


def tuned_model() -> Any:
    """Return the same PEFT model in every process, with its adapter trainable."""
    return add_random_adapter(make_llama())


def step(model: Any) -> None:
    """Take a step of gradient descent on the model's own loss, called whole."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=0.5)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimiser.step()
    optimiser.zero_grad()


def states(model: Any) -> torch.Tensor:
    """Return the decoder's last hidden states, as the dev score asks for them."""
    decoder = model.get_base_model().model
    with torch.no_grad(), whole(model, decoder):
        return decoder(input_ids=IDS, use_cache=False).last_hidden_state


def main(output: Path) -> None:
    """Write the states after each step of the sharded model."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = tuned_model()
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = []
    for _ in range(2):  # what `whole` gathered has been given back, so that the second step runs as the first
        step(model)
        found.append(states(model))
    if dist.get_rank() == 0:
        torch.save(found, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
