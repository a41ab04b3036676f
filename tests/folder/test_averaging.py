from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import finish_adapter, make_config, make_llama, make_tokenizer, save_base
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import sempa_st
from sempa_st.errors import SempaError
from sempa_st.folder.averaging import average_models
from sempa_st.folder.copying import copy_model
from sempa_st.folder.layout import ModelFolder
from sempa_st.model.adapter import merged_model
from sempa_st.model.base_model import load_causal_lm, resolve_base
from sempa_st.model.tokenizer import load_tokenizer, suffix_tokens
from sempa_st.training.run import train
from sempa_st.utils.files import read_json, write_json

pytestmark = pytest.mark.names_dtype


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> list[str]:
    """Three adapters of different ranks and scales."""
    settings: list[dict[str, Any]] = [{"r": 2, "alpha": 4}, {"r": 3, "alpha": 3}, {"r": 2, "alpha": 1}]
    folder = tmp_path_factory.mktemp("runs")
    return [
        str(finish_adapter(folder / f"run{seed}", tiny_base, make_llama(), seed=seed, **each))
        for seed, each in enumerate(settings, start=1)
    ]


def updates(base: Path, folder: str | Path) -> dict[str, torch.Tensor]:
    """Return what an adapter adds to the weights, by PEFT's own merge."""
    before = load_causal_lm(base, torch.float32).state_dict()
    merged = merged_model(resolve_base(str(base)), folder, torch.float32).state_dict()
    return {name: merged[name] - before[name] for name in before if not torch.equal(merged[name], before[name])}


def test_the_mean_is_that_of_the_merged_weights(tiny_base: Path, models: list[str], tmp_path: Path) -> None:
    output = average_models(models, tmp_path / "mean")
    each = [updates(tiny_base, model) for model in models]
    mean = updates(tiny_base, output)
    assert len(mean) == 3 * 7
    for name, update in mean.items():
        torch.testing.assert_close(update, sum(one[name] for one in each) / 3, atol=1e-6, rtol=1e-4)
    assert read_json(output / "adapter_config.json")["r"] == 7
    assert sempa_st.load(output, dtype="float32").encode(["A cat sleeps.", "Snow falls."]).shape == (2, 32)


def test_a_rank_keeps_the_largest_singular_values(tiny_base: Path, models: list[str], tmp_path: Path) -> None:
    whole = updates(tiny_base, average_models(models, tmp_path / "mean"))
    cut = average_models(models, tmp_path / "cut", rank=3)
    for name, update in updates(tiny_base, cut).items():
        left, values, right = torch.linalg.svd(whole[name].double(), full_matrices=False)
        nearest = (left[:, :3] * values[:3]) @ right[:3]
        torch.testing.assert_close(update, nearest.float(), atol=1e-6, rtol=1e-3)
    assert all(3 in tensor.shape for tensor in load_file(cut / "adapter_model.safetensors").values())


def test_activated_adapters_stay_activated(tiny_base: Path, tmp_path: Path) -> None:
    tokens = suffix_tokens(load_tokenizer(tiny_base), "prompteol")
    runs = [
        finish_adapter(tmp_path / f"run{seed}", tiny_base, make_llama(), seed=seed, invocation=tokens, format="custom")
        for seed in (1, 2)
    ]
    output = average_models([str(run) for run in runs], tmp_path / "mean")
    assert ModelFolder(output).invocation == tokens
    mean, *each = (load_file(folder / "adapter_model.safetensors") for folder in (output, *runs))
    name = next(name for name in mean if "lora_A" in name)
    up = name.replace("lora_A", "lora_B")
    scale = 32 / 8
    expected = sum(scale * one[up] @ one[name] for one in each) / 2
    torch.testing.assert_close(mean[up] @ mean[name], expected, atol=1e-6, rtol=1e-4)


def test_one_adapter_averaged_with_itself_is_itself(tiny_base: Path, models: list[str], tmp_path: Path) -> None:
    same = updates(tiny_base, average_models([models[0], models[0]], tmp_path / "same", rank=2))
    for name, update in updates(tiny_base, models[0]).items():
        torch.testing.assert_close(same[name], update, atol=1e-6, rtol=1e-4)


def test_the_record_and_the_card_name_the_runs(
    tiny_base: Path, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    runs = [str(tmp_path / f"seed{seed}") for seed in (41, 42)]
    for seed, run in zip((41, 42), runs, strict=True):
        train(make_config(tiny_base, Path(run), max_triplets=8, seed=seed))
    code, out, _ = run_cli("average", *runs, "--output", tmp_path / "mean", "--rank", 8)
    assert code == 0, out
    record = read_json(tmp_path / "mean" / "sempa_run.json")
    assert [each["seed"] for each in record["averaged"]] == [41, 42]
    assert (record["rank"], [each["model"] for each in record["averaged"]]) == (8, ["seed41", "seed42"])
    assert "of 2 adapters: seed41 (dpo), seed42 (dpo), cut to rank 8" in (tmp_path / "mean" / "README.md").read_text()


def test_the_card_of_a_mean_has_all_objectives_and_no_figures_of_one_run(tiny_base: Path, tmp_path: Path) -> None:
    runs = [str(tmp_path / name) for name in ("one", "two")]
    for run, objective, kl in zip(runs, ("contrastive", "retrieval"), (0.0, 1.0), strict=True):
        settings = {"objective": objective, "kl": kl, "kl_text": "template" if kl else ""}
        train(make_config(tiny_base, Path(run), max_triplets=8, **settings))
    table = {"title": "Spearman x 100 (SentEval protocol)", "columns": ["model", "STS12"], "rows": [["`one`", 71.23]]}
    record = Path(runs[0], "sempa_run.json")
    write_json(record, {**read_json(record), "results": [table]})
    assert "71.23" in card(copy_model(runs[0], tmp_path / "same"))
    assert "71.23" not in card(copy_model(runs[0], tmp_path / "half", scale=0.5))
    text = card(average_models([str(average_models(runs, tmp_path / "inner")), runs[0]], tmp_path / "mean"))
    assert "71.23" not in text
    assert "Trained by the mean of runs by `contrastive` (" in text
    assert "; and by `retrieval` (" in text and "tied to its base by a KL term on its own sentences" in text
    assert {"contrastive", "retrieval"} <= set(ModelCard(text).data.tags)
    assert "Trained by `contrastive` (" in card(average_models([runs[0], runs[0]], tmp_path / "alike"))


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def change(folder: str, name: str, value: object) -> None:
    path = Path(folder, "adapter_config.json")
    write_json(path, {**read_json(path), name: value})


def test_adapters_that_other_versions_of_peft_wrote_go_together(
    tiny_base: Path, models: list[str], tmp_path: Path
) -> None:
    other = finish_adapter(tmp_path / "other", tiny_base, make_llama(), seed=5)
    expected = updates(tiny_base, average_models([models[0], str(other)], tmp_path / "expected"))
    change(str(other), "peft_version", "0.99.0")
    change(str(other), "an_option_of_the_future", False)
    change(str(other), "layers_to_transform", [])
    mean = updates(tiny_base, average_models([models[0], str(other)], tmp_path / "mean"))
    torch.testing.assert_close(mean, expected)


def test_what_does_not_go_together_is_refused(
    tiny_base: Path, models: list[str], tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    output = tmp_path / "mean"
    other = finish_adapter(tmp_path / "other", tiny_base, make_llama())
    for name, value, message in [
        ("use_dora", True, r"use_dora\) cannot be averaged"),
        ("peft_type", "IA3", r"IA3\) cannot be averaged"),
        ("fan_in_fan_out", True, "differ in fan_in_fan_out"),
        ("layers_to_transform", [0], "differ in layers_to_transform"),
    ]:
        kept = read_json(other / "adapter_config.json")
        change(str(other), name, value)
        with pytest.raises(SempaError, match=message):
            average_models([models[0], str(other)], output)
        write_json(other / "adapter_config.json", kept)
    with pytest.raises(SempaError, match="Expected two or more"):
        average_models(models[:1], output)
    with pytest.raises(SempaError, match="to average: none"):
        average_models([], output)
    with pytest.raises(SempaError, match="holds no adapter"):
        average_models([models[0], str(tiny_base)], output)
    with pytest.raises(SempaError, match=r"--rank is 6. Expected 1 to 5"):
        average_models(models[:2], output, rank=6)
    with pytest.raises(SempaError, match="is read from"):
        average_models(models, models[0], overwrite=True)
    assert not output.exists()
    code, _, err = run_cli("average", models[0], "--output", output)
    assert (code, "Expected two or more" in err) == (2, True)


def test_adapters_of_two_bases_are_refused(tiny_base: Path, models: list[str], tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", make_llama(seed=5), make_tokenizer())
    strange = finish_adapter(tmp_path / "strange", other, make_llama(), seed=9, r=2, alpha=4)
    with pytest.raises(SempaError, match="were trained on different bases"):
        average_models([models[0], str(strange)], tmp_path / "mean")
    again = shutil.copytree(tiny_base, tmp_path / "again")
    same = finish_adapter(tmp_path / "same", again, make_llama(), seed=9, r=2, alpha=4)
    assert average_models([models[0], str(same)], tmp_path / "mean").is_dir()


def test_a_rank_beyond_a_layers_width_is_filled_with_zeros(tiny_base: Path, tmp_path: Path) -> None:
    wide = [str(finish_adapter(tmp_path / f"run{n}", tiny_base, make_llama(), seed=n, r=20)) for n in (1, 2)]
    whole = updates(tiny_base, average_models(wide, tmp_path / "whole"))
    cut = average_models(wide, tmp_path / "cut", rank=39)
    assert read_json(cut / "adapter_config.json")["r"] == 39
    for name, update in updates(tiny_base, cut).items():
        torch.testing.assert_close(update, whole[name], atol=1e-5, rtol=1e-3)
