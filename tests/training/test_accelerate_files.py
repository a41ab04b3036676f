"""The files for accelerate are read by accelerate itself, into what it starts processes with."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from helpers.tiny import make_config

from sempa_st.errors import SempaError
from sempa_st.training.run import train
from sempa_st.utils.assets import PACKAGE

pytestmark = pytest.mark.names_dtype

FILES = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed-zero2": DistributedType.DEEPSPEED,
    "deepspeed-zero3": DistributedType.DEEPSPEED,
}


def path_of(name: str) -> str:
    return str(PACKAGE / "configs" / "accelerate" / f"{name}.yaml")


def test_every_file_is_tested() -> None:
    assert sorted(FILES) == sorted(path.stem for path in (PACKAGE / "configs" / "accelerate").iterdir())


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_file(name: str) -> None:
    config = load_config_from_file(path_of(name))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == FILES[name]
    assert (config.num_processes, config.mixed_precision, config.use_cpu) == (4, "bf16", False)


def launch_arguments(name: str) -> Namespace:
    """Return the arguments that ``accelerate launch`` makes of the file."""
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", path_of(name), "-m", "sempa_st", "train", "--config", "llama3-8b"])
    return _validate_launch_command(args)[0]


def test_fsdp2_shards_the_layers_of_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in prepare_multi_gpu_env(launch_arguments("fsdp2")).items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_has_its_stage(stage: int) -> None:
    args = launch_arguments(f"deepspeed-zero{stage}")
    assert args.use_deepspeed
    assert args.zero_stage == stage
    plugin = DeepSpeedPlugin(
        zero_stage=args.zero_stage,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        gradient_clipping=args.gradient_clipping,
    )
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == stage
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"


@pytest.mark.parametrize(
    ("variable", "value"), [("ACCELERATE_USE_FSDP", "true"), ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")]
)
def test_sharded_weights_are_for_dpo_alone(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SempaError, match="contrastive cannot be trained with weights sharded"):
        train(make_config(tiny_base, tmp_path / "model", objective="contrastive"))
    assert list(tmp_path.iterdir()) == []
