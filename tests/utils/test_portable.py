from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny import make_config, make_gemma, make_llama, make_tokenizer, save_base

import sempa_st
from sempa_st.cli.main import main
from sempa_st.cli.sweep import make_configs
from sempa_st.folder.averaging import average_models
from sempa_st.folder.copying import copy_model
from sempa_st.folder.layout import ModelFolder
from sempa_st.training.record import settings_digest
from sempa_st.training.run import train
from sempa_st.training.run_results import assign_folders
from sempa_st.utils.portable import portable_command, portable_name, portable_record


@pytest.mark.parametrize(
    ("name", "portable"),
    [
        ("sample", "sample"),
        ("stsb", "stsb"),
        ("gemma3-270m", "gemma3-270m"),
        ("google/gemma-3-270m", "google/gemma-3-270m"),
        ("princeton-nlp/datasets-for-simcse:nli/train.csv", "princeton-nlp/datasets-for-simcse:nli/train.csv"),
        ("/home/me/nli.csv", "nli.csv"),
        ("/home/me/base/", "base"),
        ("~/base", "base"),
        ("../me/base", "base"),
        ("me/runs/base", "base"),
        ("me/nli.jsonl", "nli.jsonl"),
        ("here/there", "there"),
        (r"C:\Users\me\nli.csv", "nli.csv"),
        (r"\\server\me\base", "base"),
        ("here/there/..", "here"),
        ("/home/me/a..b", "a..b"),
        ("x" * 5000, "x" * 5000),
        ("dpo:0.3,one-word:1", "dpo:0.3,one-word:1"),
        ('Say "{sentence}" in his/her/its words', 'Say "{sentence}" in his/her/its words'),
        ("", ""),
    ],
)
def test_a_name_says_nothing_of_the_authors_folders(
    name: str, portable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert portable_name(name) == portable
    assert portable_name(portable) == portable


def test_a_command_keeps_its_flags(tmp_path: Path) -> None:
    spaced = tmp_path / "a b" / "lora_r=4,seed=1"
    spaced.mkdir(parents=True)
    words = ["sempa", "train", "--data=/me/a.csv", "--set", "data=/me/a.csv,~/b.csv", "--beta", "0.1", str(spaced)]
    command = portable_command(words)
    assert command == "sempa train --data=a.csv --set data=a.csv,b.csv --beta 0.1 lora_r=4,seed=1"
    text = "--paraphrase=Say it: his/her/its {sentence}, or /another/ one"
    assert portable_command([text]) == f"'{text}'"
    record = {"command": "sempa train '/home/al ice/x.csv' \"--dev=/home/al ice/y.csv\"", "training": [{"loss": 1.0}]}
    assert portable_record(record) == {"command": "sempa train x.csv --dev=y.csv", "training": [{"loss": 1.0}]}
    assert portable_record({"command": "sempa 'cut"}) == {}  # what cannot be read may hold anything


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a folder with local paths for all inputs, and with Gemma's notice."""
    root = tmp_path_factory.mktemp("portable")
    base = save_base(root / "secret" / "my-base", make_gemma(), make_tokenizer(chat=None))
    rows = [{"sent0": f"a {n}", "sent1": f"b {n}", "hard_neg": f"c {n}"} for n in range(8)]
    pairs = [{"sentence1": f"a {n}", "sentence2": f"b {n * n}", "score": float(n % 5)} for n in range(8)]
    for name, content in (("nli", rows), ("dev", pairs)):
        (root / "secret" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (root / "secret" / "text.txt").write_text("Some ordinary text of more than a word or two.\n" * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        command = (
            f"train --base {base} --data secret/nli.jsonl --dev={root}/secret/dev.jsonl --objective dpo --kl 0.1 "
            f"--kl-text {root}/secret/text.txt --batch-size 4 --gradient-accumulation 1 --device cpu --dtype float32 "
            f"--output {root}/secret/model"
        )
        patch.setattr("sys.argv", ["/usr/bin/sempa", *command.split()])
        assert main(command.split()) == 0
    return root / "secret" / "model"


def texts_that_name(folder: Path, word: str) -> list[str]:
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and word.encode() in path.read_bytes():
            found.append(path.name)
    return found


def test_nothing_that_is_shared_names_the_authors_folders(trained: Path, tmp_path: Path) -> None:
    merged = copy_model(str(trained), tmp_path / "merged", merge=True)
    copies = [
        trained,
        copy_model(str(trained), tmp_path / "copy", format="custom"),
        copy_model(str(trained), tmp_path / "half", scale=0.5),
        average_models([str(trained), str(trained)], tmp_path / "mean"),
    ]
    for folder in copies:
        # The adapter must find its base on this machine.
        assert texts_that_name(folder, "secret") == ["adapter_config.json"], folder
    again = copy_model(str(merged), tmp_path / "again", format="custom")
    for folder in (merged, again):
        assert texts_that_name(folder, "secret") == [], folder
        assert texts_that_name(folder, str(Path.home())) == [], folder
        assert "my-base" in (folder / "README.md").read_text()
    record = json.loads((merged / "sempa_run.json").read_text())
    assert record["base"] == record["config"]["base"] == "my-base"
    assert (record["data"]["source"], record["config"]["kl_text"]) == ("nli.jsonl", "text.txt")
    assert record["dev"]["source"] == "dev.jsonl"
    assert record["command"].startswith("sempa train --base my-base --data nli.jsonl --dev=dev.jsonl")


def test_an_older_record_is_made_portable_when_it_is_copied(trained: Path, tmp_path: Path) -> None:
    old = copy_model(str(trained), tmp_path / "old")
    record = json.loads((old / "sempa_run.json").read_text())
    record["command"] = "sempa train --base /home/secret/base --output secret/runs/x"
    record["base"] = record["config"]["base"] = "/home/secret/base"
    record["data"]["source"] = record["config"]["data"] = "../secret/nli.csv"
    (old / "sempa_run.json").write_text(json.dumps(record))
    assert texts_that_name(copy_model(str(old), tmp_path / "new", merge=True), "secret") == []


def test_a_base_that_moved_with_its_adapter_is_found(trained: Path, tmp_path: Path) -> None:
    root = tmp_path / "elsewhere"
    root.mkdir()
    copy_model(str(trained), tmp_path / "model").rename(root / "moved")
    settings = json.loads((root / "moved" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "/gone/my-base"
    (root / "moved" / "adapter_config.json").write_text(json.dumps(settings))
    assert ModelFolder(root / "moved").base == "/gone/my-base"  # nothing better is known
    save_base(root / "my-base", make_gemma(), make_tokenizer(chat=None))
    assert ModelFolder(root / "moved").base == str(root / "my-base")
    vectors = [sempa_st.load(f, dtype="float32", device="cpu").encode("A cat") for f in (trained, root / "moved")]
    assert vectors[1] == pytest.approx(vectors[0], abs=1e-5)
    for name in ("gemma3-270m", "owner/base"):
        record = json.loads((root / "moved" / "sempa_run.json").read_text()) | {"base": name}
        (root / "moved" / "sempa_run.json").write_text(json.dumps(record))
        assert ModelFolder(root / "moved").base == name


def test_a_sweep_knows_its_finished_runs_by_the_settings_as_given(tmp_path: Path) -> None:
    """Two bases with the same last path component differ in the grid, though not in their portable names."""
    bases = [save_base(tmp_path / part / "base", make_llama(seed), make_tokenizer()) for seed, part in enumerate("ab")]
    fixed = {"data": "sample", "output": "o", "dev": "sample", "device": "cpu"}
    configs, varied = make_configs(fixed, [{"base": str(base)} for base in bases])
    config = make_config(bases[1], tmp_path / "runs" / "second", max_triplets=8, checkpoint_samples=4)
    record = train(config).record
    names = {record["settings_digest"]: "second"}
    runs = assign_folders([configs[0], config], varied, tmp_path / "runs", names)
    assert runs[0].record is None
    assert runs[1].record == record
    (tmp_path / "runs" / "second").rename(runs[0].folder)
    assert assign_folders(configs, varied, tmp_path / "runs", {})[0].record is None


def test_an_option_of_a_later_version_changes_no_digest() -> None:
    assert settings_digest({"data": "x", "beta": 0.1}) == settings_digest({"data": "x"})
    assert settings_digest({"data": "x", "beta": 0.2}) != settings_digest({"data": "x"})
