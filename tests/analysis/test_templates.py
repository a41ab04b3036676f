from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

import sempa_st
from sempa_st.analysis import templates_part
from sempa_st.analysis.registry import PARTS, find_parts
from sempa_st.analysis.templates import (
    TEMPLATES,
    TemplateCell,
    draw_matrix,
    run_matrix,
    template_cells,
    template_configs,
)
from sempa_st.data.preferences import PARAPHRASE_TEMPLATES
from sempa_st.data.sts import GradedPairs, read_pairs
from sempa_st.errors import SempaError
from sempa_st.utils.files import read_json

pytestmark = pytest.mark.names_dtype

PAIRS = GradedPairs(["A cat sleeps.", "It rains."], ["A cat rests.", "The sun \u2600 shines."], [4.5, 0.5])


def result(paraphrase: str, template: str, seed: int, score: float, state: str = "finished") -> dict[str, Any]:
    settings = {"paraphrase": paraphrase, "template": template, "seed": seed}
    return {"settings": settings, "state": state, "dev_score": score, "base_score": 60.0 + len(template)}


def test_mean_and_deviation_of_each_cell() -> None:
    """Of 70, 71 and 75: mean 72, deviation sqrt((4 + 1 + 9) / 2) = sqrt(7)."""
    runs = [result("keep", "prompteol", seed, score) for seed, score in enumerate([70.0, 71.0, 75.0])]
    runs += [result("rewrite", "pretended-cot", 0, 50.0), result("keep", "pretended-cot", 0, 0.0, "failed")]
    first, second = template_cells({"runs": runs[::-1]})
    assert (first.paraphrase, first.template, first.base) == ("keep", "prompteol", 69.0)
    assert first.mean == pytest.approx(72)
    assert first.deviation == pytest.approx(7**0.5)
    assert first.text == "72.00 ± 2.65\n(+3.00)"
    assert (second.paraphrase, second.mean, second.deviation) == ("rewrite", 50.0, None)
    assert second.text == "50.00\n(-23.00)"
    with pytest.raises(SempaError, match="No run of the template matrix has finished"):
        template_cells({"runs": runs[-1:]})


def test_the_settings_of_the_runs(tiny_base: Path, tmp_path: Path) -> None:
    configs = template_configs(str(tiny_base), "sample", tmp_path, PAIRS, triplets=7, seeds=[3, 4, 5], device="cpu")
    assert {(each.paraphrase, each.template, each.seed) for each in configs} == {
        (paraphrase, template, seed)
        for paraphrase in PARAPHRASE_TEMPLATES
        for template in ("prompteol", "pretended-cot")
        for seed in (3, 4, 5)
    }
    assert len(configs) == 30
    assert {(each.objective, each.lora_layers, each.max_triplets, each.checkpoint_samples) for each in configs} == {
        ("dpo", "2-2", 7, 7)
    }
    assert read_pairs([configs[0].dev]) == PAIRS


def test_the_picture_has_every_number_in_its_cell() -> None:
    cells = [
        TemplateCell(paraphrase, template, [60.0 + 7 * row + column, 61.0 + 7 * row + column], 60.0)
        for row, paraphrase in enumerate(PARAPHRASE_TEMPLATES)
        for column, template in enumerate(TEMPLATES)
    ]
    axes = Figure().subplots()
    draw_matrix(axes, cells[1:])
    assert [(text.get_position(), text.get_text()) for text in axes.texts] == [
        ((index % 2, index // 2), cell.text) for index, cell in enumerate(cells) if index
    ]
    assert axes.images[0].get_array().tolist()[1] == [cells[2].mean, cells[3].mean]
    assert bool(axes.images[0].get_array().mask[0, 0])
    assert [label.get_text() for label in axes.get_yticklabels()] == list(PARAPHRASE_TEMPLATES)


def test_the_matrix_trains_and_goes_on_where_it_was_interrupted(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one paraphrase template, to be quick."""
    names = {"rewrite": PARAPHRASE_TEMPLATES["rewrite"]}
    monkeypatch.setattr("sempa_st.analysis.templates.PARAPHRASE_TEMPLATES", names)
    trained: list[tuple[str, str, int]] = []
    stop = [1]

    def train(config: Any) -> Any:
        if len(trained) == stop[0]:
            raise KeyboardInterrupt
        trained.append((config.paraphrase, config.template, config.seed))
        return sempa_st.train(config)

    monkeypatch.setattr(templates_part, "run_matrix", lambda *args: run_matrix(*args, train=train))
    settings: dict[str, Any] = {"cell_triplets": 2, "cell_seeds": 2, "cell_pairs": 6, "dtype": "float32"}
    call = {"only": ["templates"], "device": "cpu", **settings}
    with pytest.raises(KeyboardInterrupt):
        sempa_st.analyze(str(tiny_base), tmp_path, **call)
    assert not (tmp_path / "parts" / "templates").exists()
    stop[0] = -1
    result = sempa_st.analyze(str(tiny_base), tmp_path, **call)["parts"]["templates"]["cells"]
    assert len(trained) == len(set(trained)) == 4  # none twice
    runs = tmp_path / "kept" / "templates" / "tiny-llama" / "runs" / "runs"
    records = [read_json(path / "sempa_run.json") for path in runs.iterdir()]
    for cell in result:
        own = [
            record["dev"]["scores"]
            for record in records
            if (record["config"]["paraphrase"], record["config"]["template"]) == (cell["paraphrase"], cell["template"])
        ]
        assert cell["runs"] == len(own) == 2
        assert cell["mean"] == pytest.approx(statistics.fmean(scores[-1]["spearman"] for scores in own))
        assert cell["sd"] == pytest.approx(statistics.stdev(scores[-1]["spearman"] for scores in own))
        assert cell["untrained"] == pytest.approx(own[0][0]["spearman"])
    sempa_st.analyze(str(tiny_base), tmp_path, **call)
    assert len(trained) == 4


def test_only_a_base_is_trained_and_only_by_name(tiny_base: Path, adapter_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SempaError, match=r"trains a base, and these are none: tiny-sempa, mean:tiny-llama"):
        sempa_st.analyze(
            [str(adapter_folder), f"mean:{tiny_base}"], tmp_path / "out", only=["templates"], dtype="float32"
        )
    assert not (tmp_path / "out").exists()
    assert [part.name for part in PARTS if part not in find_parts(None)] == ["templates"]
    with pytest.raises(SempaError, match=r"cell_seeds is 0\. Expected at least 1"):
        sempa_st.analyze(str(tiny_base), tmp_path / "out", only=["templates"], cell_seeds=0)
