from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.generation_data import write_generation_data
from helpers.tiny import finish_adapter, make_gemma

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_generation_data(tmp_path_factory.mktemp("data"))


def test_the_command_sets_models_side_by_side(
    run_cli: Cli, adapter_folder: Path, tiny_base: Path, data_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "g.json"
    command = (
        "generation", tiny_base, adapter_folder, "--base", tiny_base, "--tasks", "mmlu,truthfulqa_mc1,wikitext",
        "--limit", "mmlu=6,wikitext=1", "--data-dir", data_dir, "--dtype", "float32", "--device", "cpu",
        "--output", output,
    )  # fmt: skip
    code, out, err = run_cli(*command)
    assert code == 0, err
    report = json.loads(output.read_text())
    assert [model["model"] for model in report["models"]] == [tiny_base.name, adapter_folder.name]
    base, tuned = ([cell["score"] for cell in model["scores"]] for model in report["models"])
    assert base[2:] != tuned[2:]
    assert [cell["n"] for cell in report["models"][0]["scores"]] == [6, 3, 1, 1]
    assert report["models"][1]["average"] == pytest.approx(sum(tuned[:2]) / 2)
    assert report["run"]["limits"] == {"mmlu": 6, "truthfulqa_mc1": None, "wikitext": 1}
    assert "lm-eval" in report["run"]["versions"]
    assert [model["chat"] for model in report["models"]] == [False, False]  # though the tokenizer has a template
    lines = out.splitlines()
    assert lines[0].split() == ["task", "metric", "n", "shots", "tiny-llama", "stderr", "tiny-sempa", "stderr"]
    assert [line.split()[0] for line in lines[2:7]] == ["mmlu", "truthfulqa_mc1", "wikitext", "wikitext", "average"]
    assert f"{base[2]:.2f}" in out
    assert lines[-1].endswith("float32 on cpu; prompts without a chat template.")
    assert "INFO" not in err
    code, _, err = run_cli(*command)
    assert code == 2
    assert "g.json exists" in err
    code, out, err = run_cli(*command, "--overwrite", "--json")
    assert code == 0, err
    assert json.loads(out)["models"] == report["models"]
    code, out, err = run_cli(*command[:-2], "--chat", "--json")
    assert code == 0, err
    assert [model["chat"] for model in json.loads(out)["models"]] == [True, True]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "mmlu,arc"], "Unknown generation task 'arc'. Expected some of: mmlu, truthfulqa_mc1"),
        (["--tasks", ","], "Unknown generation task ','"),
        (["--tasks", "drop"], "drop_train.parquet does not exist. Tasks whose data is there: mmlu, truthfulqa_mc1, "),
        (["--tasks", "mmlu", "--limit", "gsm8k=3"], "--limit names 'gsm8k', which is not scored"),
        (["--tasks", "mmlu", "--limit", "mmlu=some"], "--limit has 'mmlu=some'. Expected a number above 0"),
        (["--tasks", "mmlu", "--limit", "0"], "--limit has '0'"),
        (["--tasks", "mmlu", "--output", "scores.csv"], "unknown ending"),
        (["--tasks", "mmlu", "--batch-size", "0"], "not a number above 0"),
    ],
)
def test_bad_requests(run_cli: Cli, tiny_base: Path, data_dir: Path, flags: list[str], message: str) -> None:
    code, _, err = run_cli("generation", tiny_base, "--data-dir", data_dir, *flags)
    assert code == 2
    assert message in err, err
    assert "Traceback" not in err


def test_a_model_without_a_head_is_refused(run_cli: Cli, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    SentenceTransformer(modules=[BoW(["cat", "dog"])]).save(str(tmp_path / "bow"))
    code, _, err = run_cli("generation", tmp_path / "bow", "--tasks", "mmlu")
    assert code == 2
    assert "is no language model" in err


def test_offline_without_files_is_one_clear_error(run_cli: Cli, tiny_base: Path) -> None:
    code, _, err = run_cli("generation", tiny_base, "--tasks", "gsm8k")
    assert code == 2
    assert "The data of gsm8k cannot be loaded from the Hub" in err
    assert "--data-dir" in err


def test_merged_and_adapter_models_score_alike(data_dir: Path, tmp_path: Path, tiny_gemma: Path, run_cli: Cli) -> None:
    adapter = finish_adapter(tmp_path / "a", tiny_gemma, make_gemma())
    assert run_cli("copy", adapter, tmp_path / "m", "--merge")[0] == 0
    code, out, err = run_cli(
        "generation", adapter, tmp_path / "m", "--tasks", "wikitext", "--data-dir", data_dir, "--json",
        "--dtype", "float32",
    )  # fmt: skip
    assert code == 0, err
    one, other = ([cell["score"] for cell in model["scores"]] for model in json.loads(out)["models"])
    assert one == pytest.approx(other, rel=1e-4)
