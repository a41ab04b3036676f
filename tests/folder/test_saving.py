"""What a loaded model saves: the folder that it came from, with what has changed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny import finish_adapter, make_gemma, make_tokenizer, randomise, save_base
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import sempa_st
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model
from sempa_st.folder.layout import ModelFolder
from sempa_st.model.embedded import embedded_folder
from sempa_st.utils.files import read_json, write_json

pytestmark = pytest.mark.names_dtype

TEXTS = ["A man plays the guitar.", "Snow fell.", 'Who said "no"?']
RECORD = {
    "objective": "dpo", "base": "gemma3-270m", "config": {"template": "prompteol", "max_seq_length": 160, "seed": 3},
    "data": {"source": "sample", "triplets": 24, "sha256": "0" * 64},
    "dev": {"source": "sample", "pairs": 9, "scores": [{"samples": 8, "step": 2, "spearman": 50.0}]},
    "best_step": 2, "training": [], "seconds": 1.0,
}  # fmt: skip


def load(folder: Path) -> SentenceTransformer:
    return sempa_st.load(folder, dtype="float32", device="cpu")


def assert_same_vectors(vectors: Any, expected: Any) -> None:
    assert torch.cosine_similarity(torch.as_tensor(vectors), torch.as_tensor(expected)).min() >= 1 - 1e-6


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A native folder with a run record, on a tiny Gemma in the place of the embedded base."""
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(tmp_path / "cache"))
    base = save_base(embedded_folder(), make_gemma(), make_tokenizer(chat=None))
    (base / "GEMMA_TERMS.html").write_text("terms")
    folder = finish_adapter(tmp_path / "made", base, make_gemma())
    write_json(folder / "sempa_run.json", RECORD)
    return copy_model(str(folder), tmp_path / "trained")


def test_a_saved_model_is_the_folder_that_it_was_loaded_from(trained: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    load(trained).save_pretrained(str(saved))
    files = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    assert {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()} == files
    assert {"NOTICE", "GEMMA_TERMS.html", "sempa_run.json"} < files
    assert ModelFolder(saved).format == "native"
    for name in files - {"README.md"}:
        assert (saved / name).read_bytes() == (trained / name).read_bytes(), name
    text = (trained / "README.md").read_text().replace("# trained", "# saved").replace("name: trained", "name: saved")
    assert (saved / "README.md").read_text() == text.replace('("trained"', '("saved"')
    card = ModelCard.load(saved / "README.md").data
    assert (card.license, card.base_model) == ("gemma", "google/gemma-3-270m")
    expected = load(trained).encode(TEXTS)
    assert_same_vectors(SentenceTransformer(str(saved), device="cpu").encode(TEXTS), expected)
    tuned, kept = (AutoPeftModelForCausalLM.from_pretrained(folder) for folder in (saved, trained))
    ids = torch.tensor([[1, 9, 200, 31]])
    assert torch.equal(tuned(ids).logits, kept(ids).logits)


def test_a_changed_model_is_saved_as_it_is(trained: Path, tmp_path: Path) -> None:
    model, saved = load(trained), tmp_path / "saved"
    randomise(model)
    model.truncate_dim, model.default_prompt_name = 8, "topic"
    model.prompts["topic"] = "Topic: "
    model.similarity_fn_name = "dot"
    model.max_seq_length = 90
    model.save_pretrained(str(saved))
    again = load(saved)
    assert again.prompts["topic"] == "Topic: "
    assert (again.truncate_dim, again.similarity_fn_name, again.max_seq_length) == (8, "dot", 90)
    expected = model.encode(TEXTS)
    assert not np.allclose(expected, load(trained).encode(TEXTS, truncate_dim=8, prompt="Topic: "), atol=1e-3)
    assert_same_vectors(again.encode(TEXTS), expected)
    assert_same_vectors(SentenceTransformer(str(saved), device="cpu").encode(TEXTS), expected)
    assert not (saved / "sempa_run.json").exists()  # its scores are those of the weights before
    card = ModelCard.load(saved / "README.md").data
    assert (card.license, card.base_model) == ("gemma", "google/gemma-3-270m")
    assert (saved / "NOTICE").is_file()


def test_whole_weights_keep_their_type_in_whatever_type_they_are_read(trained: Path, tmp_path: Path) -> None:
    merged = copy_model(str(trained), tmp_path / "merged", merge=True)
    sempa_st.load(merged, dtype="bfloat16", device="cpu").save_pretrained(str(tmp_path / "saved"))
    weights, kept = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", merged))
    assert weights.keys() == kept.keys()
    assert all(torch.equal(weights[name], kept[name]) for name in kept)
    changed = load(merged)
    with torch.no_grad():
        changed[0].decoder.norm.weight.add_(torch.linspace(0, 1, 32))
    changed.save_pretrained(str(tmp_path / "saved"))
    assert_same_vectors(load(tmp_path / "saved").encode(TEXTS), changed.encode(TEXTS))
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert not torch.equal(weights["model.norm.weight"], kept["model.norm.weight"])


def test_saving_over_another_model_leaves_nothing_of_it(trained: Path, tmp_path: Path) -> None:
    target = copy_model(str(trained), tmp_path / "target", merge=True)
    (target / "optimizer.pt").write_bytes(b"kept")
    for source in (trained, copy_model(str(trained), tmp_path / "custom", format="custom"), trained, target):
        expected = load(source).encode(TEXTS)
        load(source).save_pretrained(str(target))
        assert_same_vectors(load(target).encode(TEXTS), expected)
        assert ModelFolder(target).format == ModelFolder(source).format
        assert (target / "prompt_eol.py").exists() == (source / "prompt_eol.py").exists()
    assert not (target / "model.safetensors").exists()
    assert (target / "optimizer.pt").read_bytes() == b"kept"


def test_what_cannot_be_saved_leaves_no_folder(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(SempaError, match="int8 layers cannot be saved"):
        sempa_st.load(trained, int8=True).save_pretrained(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()
    (tmp_path / "file").touch()
    with pytest.raises(SempaError, match="is a file"):
        load(trained).save_pretrained(str(tmp_path / "file"))


def test_added_modules_are_saved_as_sentence_transformers_saves_them(trained: Path, tmp_path: Path) -> None:
    model = load(trained)
    model.append(Dense(32, 4, activation_function=torch.nn.Tanh()))
    model.save_pretrained(str(tmp_path / "saved"))
    assert [Path(module["type"]).suffix for module in ModelFolder(tmp_path / "saved").modules][-1] == ".Dense"
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    assert_same_vectors(again.encode(TEXTS), model.encode(TEXTS))


def test_a_trainer_goes_on_from_its_checkpoint(trained: Path, tmp_path: Path) -> None:
    def train(**options: Any) -> Any:
        model = load(trained)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), max_steps=1, save_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
            use_cpu=True, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        data = Dataset.from_list([{"anchor": text, "positive": text} for text in TEXTS])
        loss = MultipleNegativesRankingLoss(model)
        SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss).train(**options)
        return model.encode(TEXTS)

    vectors = train()
    assert abs(vectors - load(trained).encode(TEXTS)).max() > 1e-3
    checkpoint = tmp_path / "checkpoint-1"
    assert ModelFolder(checkpoint).format == "native"
    assert_same_vectors(load(checkpoint).encode(TEXTS), vectors)
    assert_same_vectors(train(resume_from_checkpoint=str(checkpoint)), vectors)


class FakeHub:
    """The Hub's client as sentence-transformers uses it; what is uploaded lands in a folder."""

    uploaded = Path()

    def __init__(self, token: str | None = None) -> None:
        self.created: list[str] = []

    def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, folder_path: str, **options: Any) -> SimpleNamespace:
        shutil.copytree(folder_path, self.uploaded)
        return SimpleNamespace(commit_url="url")


def push(source: Path, target: Path) -> None:
    FakeHub.uploaded = target
    load(source).push_to_hub("me/model", replace_model_card=True)


def plain_save(source: Path, target: Path) -> None:
    SentenceTransformer(str(source), device="cpu").save_pretrained(str(target))


STEPS: dict[str, Callable[[Path, Path], object]] = {
    "save": lambda source, target: load(source).save_pretrained(str(target)),
    "copy": lambda source, target: copy_model(str(source), target),
    "custom": lambda source, target: copy_model(str(source), target, format="custom"),
    "push": push,
    "native": lambda source, target: copy_model(str(source), target, format="native"),
    "plain": plain_save,
    "activate": lambda source, target: copy_model(str(source), target, activate=True),
    "merge": lambda source, target: copy_model(str(source), target, merge=True),
}


def possible(folder: ModelFolder) -> list[str]:
    steps = ["save", "copy", "custom", "push", "native"]
    plain_adapter = folder.is_adapter and not folder.is_activated
    # Plain sentence-transformers saves whole models without their LM head.
    is_readable = plain_adapter and folder.format == "native" and Path(folder.base).is_absolute()
    return steps + ["activate", "merge"] * plain_adapter + ["plain"] * is_readable


@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_steps_keeps_vectors_licences_and_base(
    seed: int, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sentence_transformers.base.model.HfApi", FakeHub)
    expected, folder, choose = load(trained).encode(TEXTS), trained, random.Random(seed)
    for number in range(5):
        step = choose.choice(possible(ModelFolder(folder)))
        folder, before = tmp_path / f"{number}-{step}", folder
        STEPS[step](before, folder)
        assert_same_vectors(load(folder).encode(TEXTS), expected)
        if step != "plain":
            assert all((folder / name).is_file() for name in ("NOTICE", "GEMMA_TERMS.html")), step
            assert ModelCard.load(folder / "README.md").data.license == "gemma"
        if step == "push" and ModelFolder(folder).is_adapter:
            assert read_json(folder / "adapter_config.json")["base_model_name_or_path"] == "gemma3-270m"
    other_machine = tmp_path / "other"
    (tmp_path / "cache").rename(other_machine)
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(other_machine))
    assert_same_vectors(load(folder).encode(TEXTS), expected)


def test_an_adapter_on_a_local_base_is_not_pushed(
    adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sentence_transformers.base.model.HfApi", FakeHub)
    with pytest.raises(SempaError, match=r"base .*tiny-llama is a folder that nobody else has\. Push a merged copy"):
        push(adapter_folder, tmp_path / "pushed")
    assert not (tmp_path / "pushed").exists()
    merged = copy_model(str(adapter_folder), tmp_path / "merged", merge=True)
    push(merged, tmp_path / "pushed")
    assert_same_vectors(load(tmp_path / "pushed").encode(TEXTS), load(adapter_folder).encode(TEXTS))
