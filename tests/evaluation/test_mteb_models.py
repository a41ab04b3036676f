from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from helpers.tiny import make_llama
from mteb.mocks import ALL_MOCK_TASK_TEST_GRID
from mteb.mocks.mock_tasks import MockClassificationTask, MockRetrievalTask, MockSTSTask
from mteb.models.model_implementations import MODEL_REGISTRY
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer, models

import sempa_st
import sempa_st.mteb
from sempa_st.errors import SempaError
from sempa_st.evaluation.encode_cache import encode_cache
from sempa_st.evaluation.mteb_models import as_encoder, describe
from sempa_st.evaluation.mteb_tasks import score_on_tasks
from sempa_st.folder.layout import ModelFolder
from sempa_st.folder.shipped import SHIPPED_MODELS, shipped_names
from sempa_st.model.embedded import EMBEDDED_BASES

Cli = Callable[..., tuple[int, str, str]]
MAY_BE_UNKNOWN = {
    "n_active_parameters_override", "superseded_by", "contacts", "experiment_kwargs", "output_dtypes",
    "extra_requirements_groups", "public_training_code",
}  # fmt: skip


@pytest.fixture
def registry() -> Iterator[None]:
    """MTEB's registry, put back after the test."""
    before = dict(MODEL_REGISTRY)
    yield
    MODEL_REGISTRY.clear()
    MODEL_REGISTRY.update(before)


@pytest.fixture(scope="module")
def model(adapter_folder: Path) -> Any:
    return sempa_st.load(adapter_folder, dtype="float32", device="cpu")


@pytest.mark.parametrize("name", shipped_names())
def test_the_metadata_of_a_shipped_model_is_complete(name: str) -> None:
    meta = mteb.get_model_meta(f"sempa-st/{name}")
    assert {field for field, value in meta.model_dump().items() if value in (None, [], set(), "")} <= MAY_BE_UNKNOWN
    adapter = load_file_sizes(SHIPPED_MODELS / name / "adapter_model.safetensors")
    base = EMBEDDED_BASES[ModelFolder(SHIPPED_MODELS / name).base]
    assert meta.n_parameters == base.parameters + adapter
    assert meta.memory_usage_mb == round(4 * meta.n_parameters / 2**20)
    assert (meta.embed_dim, meta.max_tokens, meta.license) == (base.width, 512, base.licence)
    assert meta.adapted_from == base.hub_id
    assert len(str(meta.revision)) == 40
    with pytest.raises(ValueError, match="revision 0123 not found"):
        mteb.get_model_meta(f"sempa-st/{name}", revision="0123")


def load_file_sizes(path: Path) -> int:
    from safetensors.torch import load_file as load_tensors

    return sum(tensor.numel() for tensor in load_tensors(path).values())


def test_what_a_shipped_model_was_trained_on() -> None:
    meta = mteb.get_model_meta("sempa-st/sempa-gemma3-270m")
    assert meta.training_datasets == {"SNLI", "MNLI"}
    assert meta.is_zero_shot_on(mteb.get_benchmark("MTEB(eng, v2)").tasks)
    assert meta.is_zero_shot_on(["SNLI"]) is False
    assert "Ziyang Chen" in str(meta.citation)


def test_a_folder_in_the_registry(registry: None, adapter_folder: Path, model: Any, tmp_path: Path) -> None:
    meta = sempa_st.mteb.register(str(adapter_folder))
    assert str(meta.name).startswith("local/tiny-sempa-")
    assert str(adapter_folder.parent) not in str(meta.to_dict())
    plain, adapter = make_llama(), load_file(adapter_folder / "adapter_model.safetensors")
    assert meta.n_parameters == sum(p.numel() for p in plain.parameters()) + sum(a.size for a in adapter.values())
    assert meta.n_embedding_parameters == plain.get_input_embeddings().weight.numel()
    assert (meta.training_datasets, meta.is_zero_shot_on(["STS12"])) == (None, None)  # unknown, without a record
    encoder = mteb.get_model(str(adapter_folder), device="cpu")
    assert encoder.mteb_model_meta.revision == meta.revision
    np.testing.assert_allclose(encoder.model.encode(["A cat."]), model.encode(["A cat."]), atol=1e-5)
    result = mteb.evaluate(encoder, MockSTSTask(), cache=mteb.ResultCache(tmp_path), co2_tracker=False)
    assert result.model_revision == meta.revision
    (meta_file,) = (tmp_path / "results").rglob("model_meta.json")
    assert str(adapter_folder.parent) not in meta_file.read_text()


def test_only_models_of_this_package_are_registered(tmp_path: Path) -> None:
    SentenceTransformer(modules=[models.BoW(["a", "cat"])]).save(str(tmp_path / "bow"))
    with pytest.raises(SempaError, match="MTEB opens by itself"):
        sempa_st.mteb.register(str(tmp_path / "bow"))


def test_all_of_mtebs_mock_tasks_run(model: Any) -> None:
    """Classification, clustering, retrieval, reranking, bitext, multilabel, summarization, ...: text only."""
    with encode_cache(model):
        results = mteb.mock_run(as_encoder(model))
    text = {t.metadata.name: t.metadata.type for t in ALL_MOCK_TASK_TEST_GRID if t.metadata.modalities == ["text"]}
    failed = {name: str(results[name]) for name in text if type(results[name]).__name__ != "TaskResult"}
    assert failed == {}
    assert {
        "Classification",
        "Clustering",
        "Retrieval",
        "Reranking",
        "BitextMining",
        "MultilabelClassification",
    } <= set(text.values())
    assert {"Summarization", "PairClassification", "STS", "InstructionRetrieval"} <= set(text.values())


def test_a_cached_encode_takes_the_names_that_the_model_s_takes(model: Any) -> None:
    own = list(inspect.signature(SentenceTransformer.encode).parameters)
    with encode_cache(model) as cost:
        assert next(iter(inspect.signature(model.encode).parameters)) == own[1] == "inputs"
        for encode in (model.encode_query, model.encode_document):
            np.testing.assert_array_equal(encode(["A cat."]), model.encode(["A cat."]))
    assert cost.asked > cost.encoded


def test_results_pass_mtebs_own_checks(
    run_cli: Cli, adapter_folder: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``sempa evaluate`` on tasks of several types, read back as MTEB's results repository is."""
    tasks = {task.metadata.name: task for task in (MockRetrievalTask(), MockClassificationTask())}
    monkeypatch.setattr(mteb, "get_task", lambda name, **rest: tasks[name])
    arguments = ["--output", tmp_path, "--dtype", "float32", "--device", "cpu", "--json", tmp_path / "s.json"]
    code, out, err = run_cli("evaluate", adapter_folder, "--tasks", ",".join(tasks), *arguments)
    assert code == 0, err
    assert all(name in out for name in tasks)
    cache = mteb.ResultCache(tmp_path / "mteb" / "mteb")
    (result,) = cache.load_results(tasks=list(tasks.values()), validate_and_filter=True, require_model_meta=True)
    assert {each.task_name for each in result.task_results} == set(tasks)
    name = model.model_card_data.model_name
    assert (result.model_name, result.model_revision) == (name, describe(model).revision)
    for each in result.task_results:
        own = mteb.evaluate(as_encoder(model), tasks[each.task_name], cache=None, co2_tracker=False)
        assert each.get_score() == pytest.approx(own.task_results[0].get_score(), abs=1e-4)
        assert f"{100 * each.get_score():.2f}" in out


@pytest.mark.parametrize("change", ["weights", "truncate_dim"])
def test_a_model_that_was_changed_does_not_get_its_earlier_scores(
    adapter_folder: Path, tmp_path: Path, change: str
) -> None:
    model = sempa_st.load(adapter_folder, dtype="float32", device="cpu")

    def results() -> int:
        score_on_tasks(model, [MockSTSTask()], output=tmp_path)
        return len(list(tmp_path.rglob("MockSTSTask.json")))

    assert [results(), results()] == [1, 1]  # the second time they are those of the folder
    if change == "weights":
        next(model.parameters()).data.neg_()
    else:
        model.truncate_dim = 3
    assert [results(), results()] == [2, 2]


def test_names_and_benchmarks_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    from sempa_st.evaluation.mteb_tasks import find_tasks, split_names

    names = split_names("STS12, MTEB(eng, v2) ,ArguAna,")
    assert names == ["STS12", "MTEB(eng, v2)", "ArguAna"]
    expected = [task.metadata.name for task in mteb.get_benchmark("MTEB(eng, v2)").tasks]
    found = [task.metadata.name for task in find_tasks(names)]
    assert sorted(found) == sorted({"STS12", *expected})
    assert len(find_tasks(["sts", "STS12"])) == 7


def test_mtebs_command_line(
    run_cli: Cli, registry: None, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run_cli("mteb", "run", "--help")
    assert code == 0
    assert out.startswith("usage: sempa mteb run")
    code, _, err = run_cli("mteb", "run", "-m", adapter_folder, "-t", "NoSuchTask")
    assert code == 2
    assert "NoSuchTask" in err
    monkeypatch.setattr(mteb, "get_tasks", lambda **rest: [MockSTSTask()])
    code, _, err = run_cli("mteb", "run", "-m", adapter_folder, "-t", "any", "--output-folder", tmp_path)
    assert code == 0, err
    assert [path.name for path in (tmp_path / "results").glob("local__tiny-sempa-*/*/MockSTS*.json")]
