"""Untrusted folders: any invalid content gives a one-paragraph error, and nothing hangs or is written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import finish_adapter, make_llama, make_tokenizer, save_base
from safetensors.torch import load_file, save_file

import sempa_st
from sempa_st.checks.inspection import check_folder
from sempa_st.checks.schemas import SETTINGS_FILES
from sempa_st.errors import SempaError
from sempa_st.folder.averaging import average_models
from sempa_st.folder.copying import copy_model
from sempa_st.utils.files import read_json, write_json

pytestmark = pytest.mark.names_dtype

RunCli = Callable[..., tuple[int, str, str]]
FLOAT32 = ("--dtype", "float32")
INDEX = "model.safetensors.index.json"
TEMPLATE = "additional_chat_templates/prompteol.jinja"
RECORD: dict[str, Any] = {
    "objective": "dpo",
    "base": "some/base",
    "config": {"tuning": "lora", "lora_r": 8, "lora_alpha": 32, "learning_rate": 1e-4, "warmup_ratio": 0.05, "seed": 1},
    "data": {"source": "sample", "triplets": 3, "sha256": "0" * 64},
    "dev": {"source": "sample", "pairs": 3, "scores": [{"step": 0, "samples": 0, "spearman": 1.5}]},
    "best_step": 1,
    "a key of the future": [1, {"x": None}],
}
IN_BASE = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")
IN_ADAPTER = (
    "modules.json",
    "sentence_bert_config.json",
    "adapter_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "sempa_run.json",
    "adapter_model.safetensors",
    TEMPLATE,
)
FILES = [("base", name) for name in (*IN_BASE, INDEX)] + [("sempa", name) for name in IN_ADAPTER]
CONTENTS: dict[str, bytes] = {
    "list": b"[]",
    "null": b"null",
    "number": b"3",
    "text": b'"text"',
    "cut": b'{"a": [1, ',
    "empty": b"",
    "nested": b"[" * 10_000 + b"]" * 10_000,
    "nested-objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "digits": b'{"r": ' + b"9" * 5000 + b"}",
    "no-utf8": b'{"a": "\xff\xfe"}',
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a base and an adapter folder on it, with all the files that are checked."""
    root = tmp_path_factory.mktemp("sound")
    base = save_base(root / "base", make_llama(), make_tokenizer())
    folder = finish_adapter(root / "sempa", base, make_llama())
    write_json(folder / "sempa_run.json", RECORD)
    return root


@pytest.fixture
def folders(sound: Path, tmp_path: Path) -> Path:
    """Copy the valid folders, for a test to modify."""
    root = shutil.copytree(sound, tmp_path / "given")
    change(root / "sempa" / "adapter_config.json", base_model_name_or_path=str(root / "base"))
    (tmp_path / "in.txt").write_text("A cat sleeps.\n")
    return root


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**read_json(path), **values}))


def make_sharded(base: Path, names: dict[str, str] | None = None) -> None:
    """Give a base a weight index of its only file; ``names`` overrides the file of single tensors."""
    (base / "model.safetensors").rename(base / "shard.safetensors")
    weights = dict.fromkeys(load_file(base / "shard.safetensors"), "shard.safetensors")
    write_json(base / INDEX, {"metadata": {}, "weight_map": {**weights, **(names or {})}})


def assert_refused(run_cli: RunCli, folder: Path, tmp_path: Path, named: str) -> None:
    """Assert that encoding, copying and loading all end in a one-paragraph error that contains ``named``."""
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    for argv in (
        ("encode", folder, tmp_path / "in.txt", "--output", tmp_path / "out.npy", "--device", "cpu", *FLOAT32),
        ("copy", folder, tmp_path / "copied"),
    ):
        code, _, error = run_cli(*argv)
        assert code == 2, error
        *_, error = error.rpartition("sempa: ")  # after the progress bars of libraries
        assert error.count("\n") == 1
        assert len(error) < 2000
        assert "unexpected; --debug" not in error
        assert named in error
    with pytest.raises(SempaError, match=r"\w"):
        sempa_st.load(folder, dtype="float32", device="cpu")
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_the_sound_folders_are_taken(run_cli: RunCli, folders: Path, tmp_path: Path) -> None:
    tail = ("--output", tmp_path / "out.npy", *FLOAT32)
    assert run_cli("encode", folders / "sempa", tmp_path / "in.txt", *tail)[0] == 0
    assert run_cli("copy", folders / "sempa", tmp_path / "copied")[0] == 0
    make_sharded(folders / "base")
    assert run_cli("copy", folders / "base", tmp_path / "base-copied")[0] == 0
    assert (tmp_path / "base-copied" / "shard.safetensors").is_file()


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(("kind", "name"), FILES, ids=["-".join(file) for file in FILES])
def test_malformed_files(run_cli: RunCli, folders: Path, tmp_path: Path, kind: str, name: str, content: str) -> None:
    if name == INDEX:
        make_sharded(folders / "base")
    (folders / kind / name).write_bytes(CONTENTS[content])
    assert_refused(run_cli, folders / kind, tmp_path, str(folders))


@pytest.mark.parametrize("put", ["folder", "pipe", "huge", "link out", "link to nothing"])
@pytest.mark.parametrize(("kind", "name"), FILES, ids=["-".join(file) for file in FILES])
def test_what_is_no_file(run_cli: RunCli, folders: Path, tmp_path: Path, kind: str, name: str, put: str) -> None:
    if name == INDEX:
        make_sharded(folders / "base")
    path = folders / kind / name
    path.rename(tmp_path / "kept")
    if put == "folder":
        path.mkdir()
    elif put == "pipe":
        os.mkfifo(path)
    elif put == "huge":
        with path.open("wb") as handle:
            handle.truncate(1 << 40)
    else:
        path.symlink_to(tmp_path / ("kept" if put == "link out" else "nowhere"))
    assert_refused(run_cli, folders / kind, tmp_path, str(folders))


WRONG_KEYS: list[tuple[str, str, str, Any]] = [
    *(("sempa", "adapter_config.json", "r", value) for value in ("8", 0, -1, True, 8.5, 9, 30_000_000, 10**30, [8])),
    *(("sempa", "adapter_config.json", "peft_type", value) for value in ("X", "IA3", 3, None, ["LORA"])),
    *(
        ("sempa", "adapter_config.json", key, value)
        for key in ("target_modules", "exclude_modules", "layers_pattern")
        for value in (
            "(a+)+$",
            "(?x)(.+) +!",
            "(?x:(.+)#\n+!)",
            "(",
            ".*a.*b.*c.*d.*e",
            "(.*a.*|b)(.*c.*|d).*e",
            r"(\d*)" * 9,
            "(a|a)" * 40,
            "(?:(a|ab)|c)" * 40,
            "[ab]*" * 5,
            "[ab]|" * 9 + "(" + "[ab]|" * 20 + "c)",
            [3],
            3,
            {"a": 1},
            "a" * 3000,
        )
    ),
    *(
        ("sempa", "adapter_config.json", key, value)
        for key in ("modules_to_save", "layers_pattern")
        for value in (["(a+)+$"], ["a", ".*.*"], [f"m{number}" for number in range(257)])
    ),
    *(
        ("sempa", "adapter_config.json", key, value)
        for key in ("rank_pattern", "alpha_pattern")
        for value in ({"(a+)+$": 8}, {"(.*.*)!": 8}, {f"{number}": 8 for number in range(257)})
    ),
    ("sempa", "adapter_config.json", "rank_pattern", {"q_proj": 30_000_000}),
    ("sempa", "adapter_config.json", "rank_pattern", []),
    ("sempa", "adapter_config.json", "alpha_pattern", {"((a*)*)*": 1}),
    ("sempa", "adapter_config.json", "alpha_pattern", {"q_proj": float("nan")}),
    *(("sempa", "adapter_config.json", "lora_alpha", value) for value in ("32", float("inf"), float("nan"), None)),
    ("sempa", "adapter_config.json", "layer_replication", [[0, 10**9]]),
    ("sempa", "adapter_config.json", "init_lora_weights", "pissa_niter_999999999"),
    ("sempa", "adapter_config.json", "megatron_config", {"x": 1}),
    ("sempa", "adapter_config.json", "alora_invocation_tokens", "1,2"),
    *(("sempa", "adapter_config.json", "trainable_token_indices", value) for value in (True, [], [[]], [1.5])),
    ("sempa", "adapter_config.json", "base_model_name_or_path", 3),
    ("sempa", "adapter_config.json", "task_type", "X"),
    ("sempa", "sentence_bert_config.json", "max_seq_length", 10),
    *(("sempa", "sentence_bert_config.json", "max_seq_length", value) for value in ("512", 0, -5, [512])),
    *(("sempa", "sentence_bert_config.json", "processing_kwargs", value) for value in ([], 3, {"chat_template": 3})),
    ("sempa", "sentence_bert_config.json", "processing_kwargs", {"chat_template": {"chat_template": 3}}),
    ("sempa", "sentence_bert_config.json", "processing_kwargs", {"chat_template": {"chat_template": "another"}}),
    ("sempa", "config_sentence_transformers.json", "prompts", ["query"]),
    ("sempa", "config_sentence_transformers.json", "prompts", {"query": 3}),
    ("sempa", "config_sentence_transformers.json", "default_prompt_name", "another"),
    ("sempa", "config_sentence_transformers.json", "similarity_fn_name", "another"),
    ("sempa", "config_sentence_transformers.json", "truncate_dim", "8"),
    ("sempa", "1_Pooling/config.json", "pooling_mode", 3),
    ("sempa", "tokenizer_config.json", "init_inputs", ["/etc/passwd"]),
    ("sempa", "tokenizer_config.json", "fast_tokenizer_files", ["../tokenizer.5.0.json"]),
    ("sempa", "tokenizer_config.json", "chat_template", [{"name": "../../x", "template": "y"}]),
    ("sempa", "tokenizer_config.json", "tokenizer_class", 3),
    *(("sempa", "tokenizer_config.json", "model_max_length", value) for value in ([], "x", {})),
    *(("sempa", "sempa_run.json", key, 3) for key in ("objective", "base", "data", "dev", "config")),
    ("sempa", "sempa_run.json", "objective", "dpo\nAnother line"),
    *(("sempa", "sempa_run.json", "created", value) for value in (3, "yesterday", "2026-13-01")),
    *(("sempa", "sempa_run.json", "averaged", value) for value in ([{}], [{"model": None}], [3])),
    *(
        ("sempa", "sempa_run.json", "averaged", [{"model": "a", "objectives": value}])
        for value in ("dpo", ["dpo"], [{}], [{"objective": 3}], [{"objective": "dpo`\n\n# Injected"}])
    ),
    *(("sempa", "sempa_run.json", "scale", value) for value in (0, "2", float("nan"))),
    ("sempa", "sempa_run.json", "dev", {**RECORD["dev"], "scores": [{"samples": 1, "spearman": "x"}]}),
    *(("base", "config.json", "architectures", value) for value in (3, [3], ["BertModel"])),
    ("base", "config.json", "num_hidden_layers", 10**9),
    ("base", "config.json", "hidden_size", "32"),
    ("base", "config.json", "vocab_size", -1),
    ("base", "config.json", "model_type", "unheard-of"),
    ("base", "config.json", "transformers_weights", "../other.safetensors"),
    ("base", "config.json", "text_config", 3),
    ("base", "config.json", "return_dict", False),
    *(
        ("base", "config.json", "id2label", json.loads('{"a":' * depth + "1" + "}" * depth))
        for depth in (120, 600, 900)
    ),
    *(
        ("sempa", "adapter_config.json", "base_model_name_or_path", name)
        for name in ("a" * 256, "é" * 200, "a/" * 3000, "a\0b", "a\nb", "\ud800")
    ),
    ("sempa", "config_sentence_transformers.json", "prompts", {"query": "\ud800"}),
    ("base", INDEX, "weight_map", {}),
    ("base", INDEX, "weight_map", ["a"]),
    *(
        ("base", INDEX, "weight_map", {"a": name})
        for name in ("../x", "../x.safetensors", "/x.safetensors", "x.bin", 3)
    ),
    ("base", INDEX, "weight_map", {"a": "missing.safetensors"}),
]


@pytest.mark.parametrize(("kind", "name", "key", "value"), WRONG_KEYS)
def test_wrong_keys(run_cli: RunCli, folders: Path, tmp_path: Path, kind: str, name: str, key: str, value: Any) -> None:
    if name == INDEX:
        make_sharded(folders / "base")
    change(folders / kind / name, **{key: value})
    assert_refused(run_cli, folders / kind, tmp_path, str(folders))


@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "!!!!"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    ],
)
def test_a_panic_of_the_tokenizer_is_an_error(
    run_cli: RunCli, folders: Path, tmp_path: Path, part: dict[str, Any]
) -> None:
    change(folders / "sempa" / "tokenizer.json", **part)
    assert_refused(run_cli, folders / "sempa", tmp_path, str(folders))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("sentence_bert_config.json", "module_output_name", "another"),
        ("sentence_bert_config.json", "modality_config", {}),
        ("1_Pooling/config.json", "pooling_mode", []),
        ("tokenizer_config.json", "pad_token", None),
    ],
)
def test_what_sentence_transformers_cannot_embed_with(
    run_cli: RunCli, folders: Path, tmp_path: Path, name: str, key: str, value: Any
) -> None:
    change(folders / "sempa" / name, **{key: value})
    tail = (tmp_path / "in.txt", "--output", tmp_path / "out.npy", "--reader", "native", *FLOAT32)
    code, _, error = run_cli("encode", folders / "sempa", *tail)
    assert (code, "embeds no text" in error) == (2, True), error
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize(
    ("kind", "name", "content", "told"),
    [
        ("base", "config.json", {"num_hidden_layers": 5000}, "num_hidden_layers is 5000. Expected less than or equal"),
        ("base", "config.json", {"text_config": {"num_experts": 5000}}, "text_config.num_experts is 5000. Expected"),
        ("base", "config.json", {"num_labels": 10**12}, "num_labels is 1000000000000. Expected"),
        (
            "base",
            "config.json",
            {"model_type": "mpt", "max_seq_len": 10**9},
            "max_seq_len is 1000000000. Expected less than or equal to 262144",
        ),
        ("base", "config.json", {"model_type": ["llama"]}, "model_type is ['llama']. Expected a valid string"),
        ("base", "tokenizer_config.json", {"chat_template": "\ud800"}, "a text in it holds a lone surrogate"),
        ("base", "tokenizer_config.json", {"a": [{"b": "\udfff"}]}, "a text in it holds a lone surrogate"),
        ("sempa", "adapter_config.json", {"lora_alpha": 1e308}, "lora_alpha is 1e+308. Expected less than or equal"),
        ("sempa", "adapter_config.json", {"alpha_pattern": {"x": -1e300}}, "alpha_pattern.x is -1e+300. Expected"),
        (
            "base",
            "config.json",
            {"model_type": "gpt_neo", "max_position_embeddings": 10**6},
            "max_position_embeddings is 1000000. Expected",
        ),
        (
            "base",
            "config.json",
            {"model_type": "gpt_bigcode", "n_positions": 10**6},
            "n_positions is 1000000. Expected less than or equal to 8192",
        ),
        ("sempa", "config_sentence_transformers.json", {"default_prompt_name": "x"}, "default_prompt_name is 'x'."),
        ("sempa", "config_sentence_transformers.json", {"default_prompt_name": "x", "prompts": 3}, "prompts is 3."),
        ("sempa", "sempa_run.json", {"averaged": [{}]}, "averaged.0.model is {}. Expected"),
    ],
)
def test_the_key_at_fault_is_named(folders: Path, kind: str, name: str, content: dict[str, Any], told: str) -> None:
    change(folders / kind / name, **content)
    with pytest.raises(SempaError) as caught:
        check_folder(folders / kind)
    assert f"{name}: {told}" in str(caught.value)


def test_a_record_may_lack_scores_and_a_scale(folders: Path, tmp_path: Path) -> None:
    scores = [{"step": 0, "samples": 111, "spearman": None}, {"step": 1, "samples": 222, "spearman": 1.5}]
    change(folders / "sempa" / "sempa_run.json", scale=None, dev={**RECORD["dev"], "scores": scores})
    copied = copy_model(str(folders / "sempa"), tmp_path / "copied", scale=0.5)
    assert read_json(copied / "sempa_run.json")["scale"] == 0.5
    card = (copied / "README.md").read_text()
    assert "| 222 | 1.50 |" in card
    assert "111" not in card


@pytest.mark.parametrize("path", ["../x", "/etc", 3, "a/../../x"])
def test_modules_lie_inside(run_cli: RunCli, folders: Path, tmp_path: Path, path: Any) -> None:
    modules = read_json(folders / "sempa" / "modules.json")
    write_json(folders / "sempa" / "modules.json", [modules[0], {**modules[1], "path": path}])
    assert_refused(run_cli, folders / "sempa", tmp_path, "modules.json: 1.path")


@pytest.mark.parametrize(
    "pattern",
    [
        "all-linear",
        "q_proj|v_proj",
        r".*\.self_attn\.(q_proj|v_proj)",
        r"model\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj))",
        r"model\.layers\.(?:[0-9]|1[0-9]|2[0-7])\.self_attn\.q_proj",
        r"model\.layers\.([2-9]|[12]\d|3[01])\.\w_proj",
        r"(.*model.*)(.*[kqv]_proj|.*fc[12]).*$",
        r".*\.layers\.\d+\..*\.[^.\]]+\.\[x\]",
        r"model\.layers\.(?:" + "|".join(map(str, range(32))) + r")\.self_attn\.q_proj",
        r"^(?!.*visual).*(?:q_proj|k_proj).*",
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?(?:k_proj|out_proj|o_proj|fc1|fc2).*?)|(?:\bx\.y)",
    ],
)
def test_patterns_that_end_soon_are_taken(folders: Path, pattern: str) -> None:
    change(folders / "sempa" / "adapter_config.json", target_modules=pattern)
    check_folder(folders / "sempa")


def test_names_in_lists_are_no_patterns(folders: Path) -> None:
    names = ["blocks[0].x", "(", "*.*.*.*.*.*.*", "a" * 3000]
    keys = ("target_modules", "exclude_modules", "target_parameters")
    change(folders / "sempa" / "adapter_config.json", **dict.fromkeys(keys, names))
    check_folder(folders / "sempa")


@pytest.mark.parametrize("pattern", [{"q_proj": 4, "v_proj": 8}, {"no_such_layer": 20}, {r".*\.q_proj": 4}])
def test_ranks_by_layer(folders: Path, pattern: dict[str, int]) -> None:
    """No layer needs to have the default rank, and PEFT ignores names that match no layer."""
    settings = folders / "sempa" / "adapter_config.json"
    change(settings, r=32, rank_pattern=pattern)
    check_folder(folders / "sempa")
    change(settings, r=4096)
    with pytest.raises(SempaError, match=r"r is 4096\. Expected 64 at most, the width of its layers"):
        check_folder(folders / "sempa")


def test_keys_of_other_versions_are_taken(folders: Path) -> None:
    for name in SETTINGS_FILES:
        path = folders / "sempa" / name
        if path.is_file() and name != "modules.json":
            deep: Any = [1, None, "x"]
            for _ in range(50):
                deep = {"deep": deep}
            change(path, a_key_of_the_future=deep)
    assert sempa_st.load(folders / "sempa", dtype="float32", device="cpu").encode(["A cat"]).shape == (1, 32)


def test_headers_of_weights(run_cli: RunCli, folders: Path, tmp_path: Path) -> None:
    """Headers with an invalid length are refused, and a rank that the tensors do not have."""
    path = folders / "sempa" / "adapter_model.safetensors"
    kept = path.read_bytes()
    for content in (struct.pack("<Q", 1 << 62) + kept[8:], kept[: len(kept) // 2], struct.pack("<Q", 2) + b"{}x"):
        path.write_bytes(content)
        assert_refused(run_cli, folders / "sempa", tmp_path, "adapter_model.safetensors is corrupted")
    path.write_bytes(kept)
    change(folders / "sempa" / "adapter_config.json", r=4096)
    assert_refused(run_cli, folders / "sempa", tmp_path, "r is 4096. Expected 8 at most")


def test_nothing_is_written_beside_a_copy(folders: Path, tmp_path: Path) -> None:
    """An index with an absolute name or .. must not make a copy write to the user's files."""
    mine = tmp_path / "mine.safetensors"
    mine.write_text("mine")
    for name in ("../mine.safetensors", str(mine)):
        make_sharded(folders / "base", {"another": name})
        with pytest.raises(SempaError, match=r"index.json: weight_map.another"):
            copy_model(str(folders / "base"), tmp_path / "copied")
        (folders / "base" / "shard.safetensors").rename(folders / "base" / "model.safetensors")
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("base", "generation_config.json"),
        ("base", "GEMMA_TERMS.html"),
        ("base", "chat_template.jinja"),
        ("base", "vocab.txt"),
        ("sempa", "NOTICE"),
        ("sempa", "additional_chat_templates/secret.jinja"),
        ("sempa", "additional_chat_templates"),
    ],
)
def test_no_link_brings_a_secret_into_a_copy(folders: Path, tmp_path: Path, kind: str, name: str) -> None:
    secret = tmp_path / "secrets"
    secret.mkdir()
    (secret / "prompteol.jinja").write_text("the secret")
    path = folders / kind / name
    if path.is_dir():
        shutil.rmtree(path)
        path.symlink_to(secret)
    else:
        path.unlink(missing_ok=True)
        path.symlink_to(secret / "prompteol.jinja")
    output = tmp_path / "out"
    with pytest.raises(SempaError, match="leads out of its folder"):
        copy_model(str(folders / kind), output)
    with pytest.raises(SempaError, match="leads out of its folder"):
        average_models([str(folders / "sempa")] * 2 if kind == "sempa" else [str(folders / "base")] * 2, output)
    assert not output.exists()


def test_links_inside_a_folder_and_its_cache_are_followed(folders: Path, tmp_path: Path) -> None:
    """The cache of the Hub's client consists of links to blobs."""
    repository = tmp_path / "hub" / "models--someone--something"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    for path in [path for path in (folders / "sempa").rglob("*") if path.is_file()]:
        name = path.relative_to(folders / "sempa")
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / str(name).replace("/", "-")
        shutil.copyfile(path, blob)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    (snapshot / "again.json").symlink_to("modules.json")
    expected = sempa_st.load(folders / "sempa", dtype="float32", device="cpu").encode(["A cat"])
    assert sempa_st.load(snapshot, dtype="float32", device="cpu").encode(["A cat"]) == pytest.approx(expected)
    copied = copy_model(str(snapshot), tmp_path / "copied")
    assert not any(path.is_symlink() for path in copied.rglob("*"))
    (snapshot / "other.json").symlink_to(folders / "base" / "config.json")
    with pytest.raises(SempaError, match=r"other.json is a link that leads out of its folder"):
        check_folder(snapshot)


def test_an_index_in_the_folder_of_a_module_is_looked_at(folders: Path) -> None:
    (folders / "sempa").rename(folders / "0_Transformer")
    (folders / "sempa").mkdir()
    (folders / "0_Transformer").rename(folders / "sempa" / "0_Transformer")
    inner = folders / "sempa" / "0_Transformer"
    modules = read_json(inner / "modules.json")[:1]
    write_json(folders / "sempa" / "modules.json", [{**modules[0], "path": inner.name}])
    check_folder(folders / "sempa")
    write_json(inner / INDEX, {"weight_map": {"a": "x.bin"}})
    with pytest.raises(SempaError, match=r"0_Transformer.*Expected a .safetensors file"):
        sempa_st.load(folders / "sempa", dtype="float32", device="cpu")


def test_files_that_nothing_reads_are_nobodys_concern(folders: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    (folders / "sempa" / "train.log").symlink_to(secret)
    os.mkfifo(folders / "sempa" / "pipe")
    (folders / "sempa" / "optimizer.safetensors").write_bytes(b"cut")
    with (folders / "sempa" / "corpus.txt").open("wb") as handle:
        handle.truncate(600 << 20)
    check_folder(folders / "sempa")
    for copied in (
        copy_model(str(folders / "sempa"), tmp_path / "copied"),
        average_models([str(folders / "sempa")] * 2, tmp_path / "mean", rank=4),
    ):
        assert not {"train.log", "pipe", "optimizer.safetensors", "corpus.txt"} & {
            path.name for path in copied.iterdir()
        }


def test_what_nothing_reads_is_not_copied(folders: Path, tmp_path: Path) -> None:
    """An irrelevant folder may be a link to anywhere."""
    (folders / "sempa" / "notes").symlink_to("/")
    sources = [str(folders / "sempa")] * 2
    averaged = average_models(sources, tmp_path / "mean", rank=4)
    assert not (averaged / "notes").exists()
    assert (averaged / "additional_chat_templates" / "prompteol.jinja").is_file()


def add_module(folder: Path, path: str, kind: str) -> None:
    modules = read_json(folder / "modules.json")
    type_name = f"sentence_transformers.sentence_transformer.modules.{kind}"
    write_json(folder / "modules.json", [*modules, {"idx": len(modules), "name": "x", "path": path, "type": type_name}])


@pytest.mark.parametrize(
    ("path", "kind", "inner"),
    [
        ("2_Dense", "dense.Dense", ""),
        ("", "dense.Dense", ""),
        ("2_Router", "router.Router", "document_0_Dense"),
        ("2_Router", "router.Router", ".hidden"),
        ("2_Router", "router.Router", "query_0_Router/query_0_Dense"),
        ("", "router.Router", "document_0_Dense"),
    ],
)
def test_pickled_weights_of_modules_are_refused(folders: Path, path: str, kind: str, inner: str) -> None:
    """Other safetensors files do not count, only the one that is loaded instead."""
    place = folders / "sempa" / path / inner
    place.mkdir(parents=True, exist_ok=True)
    add_module(folders / "sempa", path, kind)
    torch.save({}, place / "pytorch_model.bin")
    save_file({"x": torch.ones(1)}, place / "decoy.safetensors")
    write_json(place / INDEX, {"weight_map": {"x": "decoy.safetensors"}})
    with pytest.raises(SempaError, match=r"pytorch_model\.bin has no \.safetensors file beside it"):
        check_folder(folders / "sempa")
    save_file({"linear.weight": torch.ones(4, 32)}, place / "model.safetensors")
    check_folder(folders / "sempa")


def test_a_pickled_adapter_is_refused(folders: Path) -> None:
    (folders / "sempa" / "adapter_model.safetensors").rename(folders / "sempa" / "decoy.safetensors")
    torch.save({}, folders / "sempa" / "adapter_model.bin")
    with pytest.raises(SempaError, match=r"adapter_model\.bin has no .*convert them to adapter_model\.safetensors"):
        check_folder(folders / "sempa")


def test_pickled_weights_beside_parts_of_a_decoder_are_left_alone(folders: Path) -> None:
    make_sharded(folders / "base")
    torch.save({}, folders / "base" / "pytorch_model.bin")
    check_folder(folders / "base")


def test_folders_of_modules_are_looked_at_to_the_bottom(folders: Path) -> None:
    router = folders / "sempa" / "2_Router"
    (router / "a" / "b").mkdir(parents=True)
    add_module(folders / "sempa", router.name, "router.Router")
    check_folder(folders / "sempa")
    (router / "a" / "b" / "out").symlink_to("/etc")
    with pytest.raises(SempaError, match="leads out of its folder"):
        check_folder(folders / "sempa")
    (router / "a" / "b" / "out").unlink()
    (router / "a" / "b" / "round").symlink_to(router)
    with pytest.raises(SempaError, match="too many folders, or too deep ones"):
        check_folder(folders / "sempa")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "sentence_bert_config.json", "config.json"])
@pytest.mark.parametrize("content", ["null", "7"])
def test_settings_in_the_folders_of_modules_are_looked_at(folders: Path, name: str, content: str) -> None:
    inner = folders / "sempa" / "0_Transformer"
    inner.mkdir()
    add_module(folders / "sempa", inner.name, "transformer.Transformer")
    (inner / name).write_text(content)
    with pytest.raises(SempaError, match=rf"0_Transformer/{name}: its content is \w+\. Expected a valid dictionary"):
        check_folder(folders / "sempa")


@pytest.mark.parametrize("route", ["encode", "copy"])
def test_pickled_weights_alone_are_refused(
    run_cli: RunCli, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    """Whichever file names them, torch.load is never called."""

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("torch.load was reached")

    base = folders / "base"
    torch.save(load_file(base / "model.safetensors"), base / "x.bin")
    monkeypatch.setattr(torch, "load", fail)
    names = list(load_file(base / "model.safetensors"))
    (base / "model.safetensors").unlink()
    argv = {
        "encode": ("encode", base, tmp_path / "in.txt", "--output", tmp_path / "out.npy", *FLOAT32),
        "copy": ("copy", base, tmp_path / "out"),
    }[route]
    for index in (INDEX, "other.safetensors.index.json"):
        write_json(base / index, {"weight_map": dict.fromkeys(names, "x.bin")})
        code, _, error = run_cli(*argv)
        assert (code, "Expected a .safetensors file" in error) == (2, True), error
        (base / index).unlink()
    (base / "x.bin").rename(base / "pytorch_model.bin")
    code, _, error = run_cli(*argv)
    assert (code, "has no .safetensors file beside it" in error) == (2, True), error
