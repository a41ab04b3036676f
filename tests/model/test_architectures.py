"""The table of architectures in docs, against what is found on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.architectures import ARCHITECTURES, COLUMNS, INTRODUCTION, TABLE, find, line
from helpers.families import make_causal_lm
from helpers.tiny import add_random_adapter, make_config, make_tokenizer, save_base

import sempa_st
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model
from sempa_st.model.adapter import left_out, linear_suffixes, lora_config
from sempa_st.model.base_model import Base
from sempa_st.training.run import train

pytestmark = pytest.mark.names_dtype


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_table_says_what_is_found(family: str, tmp_path: Path) -> None:
    assert line(find(family, tmp_path)) in TABLE.read_text(encoding="utf-8").splitlines()


def test_the_table_holds_every_architecture_once() -> None:
    text = TABLE.read_text(encoding="utf-8")
    assert text.startswith(INTRODUCTION)
    rows = text.removeprefix(INTRODUCTION).splitlines()
    assert rows[0] == line(list(COLUMNS))
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[2:]] == list(ARCHITECTURES.values())


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("gpt2", ["c_attn", "c_fc", "c_proj"]),
        ("mamba", ["in_proj"]),
        ("gpt_neo", ["c_fc", "c_proj", "k_proj", "out_proj", "q_proj", "v_proj"]),
    ],
)
def test_linear_layers_of_every_make_are_adapted(family: str, layers: list[str]) -> None:
    model = make_causal_lm(family)
    assert linear_suffixes(model) == layers
    assert lora_config(model).fan_in_fan_out is (family == "gpt2")


@pytest.mark.parametrize("family", ["gpt2", "mamba", "falcon:alibi", "granitemoe", "llama4_text", "phimoe"])
@pytest.mark.parametrize("objective", ["contrastive", "dpo"])
def test_a_run_from_data_to_vectors(family: str, objective: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_causal_lm(family), make_tokenizer())
    record = train(make_config(base, tmp_path / "model", max_triplets=8, objective=objective)).record
    assert len(record["training"]) == 2
    plain, tuned = (
        sempa_st.load(folder, device="cpu", dtype="float32").encode(["A cat."]) for folder in (base, tmp_path / "model")
    )
    assert tuned.shape == (1, 32)
    assert abs(tuned - plain).max() > 1e-4


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", []),
        ("falcon", []),
        ("mixtral", ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate"]),
        ("phimoe", ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.router"]),
        ("mamba", ["mixer.dt_proj", "mixer.out_proj", "mixer.x_proj"]),
    ],
)
def test_weights_that_the_adapter_leaves_out_are_named(family: str, names: list[str], tmp_path: Path) -> None:
    """Against the tensors of an adapter: each name is of the base's weights, and of none that has an update."""
    model = make_causal_lm(family)
    base = save_base(tmp_path / "base", model, make_tokenizer())
    assert left_out(Base("tiny", base), lora_config(model)) == names
    weights = [name for name, tensor in model.named_parameters() if tensor.dim() > 1]
    adapted = {
        name.partition(".lora_")[0] for name, _ in add_random_adapter(model).named_parameters() if "lora_" in name
    }
    for name in names:
        assert any(f".{name}" in weight for weight in weights)
        assert not any(path.endswith(f".{name}") for path in adapted)


def test_a_run_says_what_its_adapter_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_base(tmp_path / "base", make_causal_lm("mixtral"), make_tokenizer())
    record = train(make_config(base, tmp_path / "model", max_triplets=8, objective="contrastive")).record
    names = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate"]
    assert record["left_out"] == names
    listed = ", ".join(names)
    assert f"or that PEFT cannot update: {listed}." in capsys.readouterr().err
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert f"all linear layers but the LM head and {listed} |" in card


def test_layers_that_peft_cannot_activate_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_causal_lm("deepseek_v3"), make_tokenizer())
    with pytest.raises(SempaError, match="does not work with DeepseekV3ForCausalLM: PEFT has no activated"):
        train(make_config(base, tmp_path / "model", max_triplets=8, objective="one-word", activation="template"))
    assert not list(tmp_path.glob("model*"))


def test_what_hides_its_tokens_from_peft_is_not_activated(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_causal_lm("opt"), make_tokenizer())
    train(make_config(base, tmp_path / "model", max_triplets=8, objective="contrastive"))
    with pytest.raises(SempaError, match=r"cannot be activated: the layers of OPTForCausalLM hide from PEFT"):
        copy_model(str(tmp_path / "model"), tmp_path / "activated", activate=True)
    assert not (tmp_path / "activated").exists()
