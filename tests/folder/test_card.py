from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from helpers.tiny import make_llama, make_tokenizer, save_base
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from sempa_st.errors import SempaError
from sempa_st.folder.card import card_text, check_card, licence_of
from sempa_st.folder.citation import BIBTEX
from sempa_st.folder.copying import copy_model
from sempa_st.folder.layout import ModelFolder
from sempa_st.folder.shipped import SHIPPED_MODELS, shipped_names
from sempa_st.model.base_model import Base
from sempa_st.model.embedded import EMBEDDED_BASES

pytestmark = pytest.mark.names_dtype
ROOT = Path(__file__).resolve().parents[2]
AUTHORS = ["Ziyang Chen", "Zhenxuan Huang", "Yile Wang", "Weiqin Wang", "Lu Yin", "Hui Huang"]


@pytest.mark.parametrize("name", shipped_names())
def test_the_metadata_of_a_shipped_card(name: str) -> None:
    check_card(SHIPPED_MODELS / name)
    data = ModelCard.load(SHIPPED_MODELS / name / "README.md").data
    base = EMBEDDED_BASES[ModelFolder(SHIPPED_MODELS / name).base]
    assert (data.license, data.base_model, data.base_model_relation) == (base.licence, base.hub_id, "adapter")
    assert {"sentence-transformers", "lora", "peft", "sempa"} <= set(data.tags)
    assert data.library_name == "sentence-transformers"
    assert data.widget[0]["sentences"]
    index = eval_results_to_model_index(data.model_name, data.eval_results)
    assert model_index_to_eval_results(index) == (name, data.eval_results)
    record = json.loads((SHIPPED_MODELS / name / "sempa_run.json").read_text())
    (table,) = [t for t in record["results"] if t["title"].startswith("Spearman x 100") and "STS12" in t["columns"]]
    row = dict(zip(table["columns"], table["rows"][-1], strict=True))
    scores = {r.dataset_name: r.metric_value for r in data.eval_results if r.dataset_split == "test"}
    assert scores["STS12"] == pytest.approx(float(row["STS12"]) / 100)
    assert len(scores) == 7
    dev = [r.metric_value for r in data.eval_results if r.dataset_split == "validation"]
    best = max(score["spearman"] for score in record["dev"]["scores"]) / 100
    assert dev == ([] if "averaged" in record else [pytest.approx(best, abs=1e-4)])


@pytest.mark.parametrize("name", shipped_names())
def test_the_first_line_says_which_objective_trained_it(name: str) -> None:
    config = json.loads((SHIPPED_MODELS / name / "sempa_run.json").read_text())["config"]
    first = (SHIPPED_MODELS / name / "README.md").read_text().split(f"# {name}\n\n")[1].partition("\n")[0]
    assert re.match(rf"Trained by (the mean of runs by )?`{config['objective']}` \(", first)
    assert ("tied to its base by a KL term on" in first) == bool(config["kl"])


def test_a_weighted_sum_is_named_by_its_parts(adapter_folder: Path, tiny_base: Path) -> None:
    record = json.loads((SHIPPED_MODELS / "sempa-gemma3-270m-activated" / "sempa_run.json").read_text())
    record |= {"objective": "dpo:0.3, contrastive:1", "averaged": None}
    text = card_text(ModelFolder(adapter_folder), "x", Base("acme/tiny", tiny_base), record)
    assert "\n# x\n\nTrained by `dpo` (preference optimisation of whole sentences" in text
    assert ") and `contrastive` (contrastive learning" in text


def test_the_card_says_who_to_cite_and_what_it_is_not_for() -> None:
    text = (SHIPPED_MODELS / "sempa-gemma3-270m" / "README.md").read_text()
    assert BIBTEX in text
    assert "## Out of scope" in text
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"][0]
    assert [f"{author['given-names']} {author['family-names']}" for author in cited["authors"]] == AUTHORS
    assert " and ".join(AUTHORS) in BIBTEX


@pytest.mark.parametrize(
    ("head", "licence"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        (
            "license: other\nlicense_name: acme\nlicense_link: https://x.org",
            {"license": "other", "license_name": "acme"},
        ),
        ("language: en", {}),
    ],
)
def test_the_licence_is_the_bases(head: str, licence: dict[str, str], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_llama(), make_tokenizer())
    (base / "README.md").write_text(f"---\n{head}\n---\n# Acme\n")
    card = ModelCard.load(copy_model(str(base), tmp_path / "native") / "README.md").data.to_dict()
    assert {key: card[key] for key in ("license", "license_name") if key in card} == licence
    assert licence_of(Base(str(base), base)) == licence.get("license")


def test_a_scaled_or_averaged_model_takes_over_no_scores(adapter_folder: Path, tiny_base: Path) -> None:
    record = json.loads((SHIPPED_MODELS / "sempa-gemma3-270m" / "sempa_run.json").read_text())
    folder, base = ModelFolder(adapter_folder), Base("acme/tiny", tiny_base)

    def sets(**changes: object) -> list[str]:
        text = card_text(folder, "x", base, {**record, **changes})
        return [
            result["dataset"]["split"]
            for result in yaml.safe_load(text.split("---\n")[1]).get("model-index", [{"results": []}])[0]["results"]
        ]

    assert sets().count("test") == 7
    assert sets(scale=0.5) == []
    assert "validation" not in sets(averaged=[{"model": "a", "seed": 1}])


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (None, "does not exist"),
        ("no metadata", "has no license, base_model, library_name"),
        ("---\nlicense: [\n---\n", "cannot be read"),
        ("---\nlicense: mit\nbase_model: a/b\n---\n", "has no library_name"),
    ],
)
def test_a_card_that_the_hub_would_refuse(card: str | None, message: str, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    with pytest.raises(SempaError, match=message):
        check_card(tmp_path)
