from __future__ import annotations

import base64
import csv
import io
import json
import re
import weakref
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

import sempa_st
from sempa_st.analysis import registry
from sempa_st.analysis.context import Context, find_models
from sempa_st.analysis.data import AnalysisData
from sempa_st.analysis.part import Part, PartResult, Table
from sempa_st.analysis.report import write_report
from sempa_st.analysis.settings import AnalysisSettings
from sempa_st.errors import SempaError
from sempa_st.forward.sentence_transformers import hidden_states

pytestmark = pytest.mark.names_dtype

Cli = Callable[..., tuple[int, str, str]]
QUICK = {"sentences": 12, "dtype": "float32", "device": "cpu"}
FLAGS = ("--sentences", 12, "--dtype", "float32", "--device", "cpu")


class Page(HTMLParser):
    """Names of the elements, addresses of everything that is loaded, and the visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.loaded += [str(values[name]) for name in ("src", "srcset", "data") if name in values]
        if tag in ("link", "script", "iframe"):
            self.loaded.append(str(values.get("href")))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the parts by two small ones that note each run."""
    runs: list[str] = []

    def part(name: str, **kwargs: Any) -> Part:
        def run(context: Context) -> PartResult:
            runs.append(name)
            rows = [(model, 0.5, None) for model in context.models]
            return PartResult({"models": len(rows)}, [Table(name, "A <table> & more.", ("model", "x", "y"), rows)])

        return Part(name, f"Part {name}", run, **kwargs)

    parts = (part("first", needs=("triplets",), settings=("seed",)), part("second", needs=("sts",), settings=("k",)))
    monkeypatch.setattr(registry, "PARTS", parts)
    return runs


def test_a_finished_part_is_not_computed_again(
    counted: list[str], tiny_base: Path, adapter_folder: Path, analysis_data: Path, tmp_path: Path
) -> None:
    base, out = str(tiny_base), tmp_path / "out"
    first = sempa_st.analyze(base, out, **QUICK)
    assert counted == ["first", "second"]
    again = sempa_st.analyze(base, out, **QUICK)
    assert counted == ["first", "second"]
    assert again["parts"] == first["parts"] == {"first": {"models": 1}, "second": {"models": 1}}
    sempa_st.analyze(base, out, k=3, **QUICK)
    assert counted[2:] == ["second"]
    sempa_st.analyze(base, out, seed=1, k=3, only=["first"], **QUICK)
    assert counted[3:] == ["first"]
    sempa_st.analyze([base, str(adapter_folder)], out, seed=1, k=3, **QUICK)
    assert counted[4:] == ["first", "second"]
    sempa_st.analyze([base, str(adapter_folder)], out, seed=1, k=3, data_dir=analysis_data, **QUICK)
    assert counted[6:] == ["second"]  # the folder has the same triplets as the sample, and other pairs


def test_a_part_that_fails_leaves_nothing(
    counted: list[str], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(context: Context) -> PartResult:
        raise SempaError("no more")

    broken = Part("second", "Part second", fail)
    monkeypatch.setattr(registry, "PARTS", (registry.PARTS[0], broken))
    with pytest.raises(SempaError, match="no more"):
        sempa_st.analyze(str(tiny_base), tmp_path / "out", **QUICK)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["parts"]
    assert [path.name for path in (tmp_path / "out" / "parts").iterdir()] == ["first"]


def test_the_report_and_its_files(
    counted: list[str], run_cli: Cli, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEMPA_DATA_DIR", raising=False)
    code, out, err = run_cli("analyze", tiny_base, "--output", tmp_path / "out", "--json", *FLAGS)
    assert code == 0, err
    results = json.loads(out)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["data"], results["models"]) == ("sample", [tiny_base.name])
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "A <table> & more." in page.text
    assert "table" in page.tags
    assert page.loaded == []
    rows = list(csv.reader((tmp_path / "out" / "parts" / "first" / "first.csv").open()))
    assert rows == [["model", "x", "y"], [tiny_base.name, "0.5", ""]]


def test_a_text_that_rows_begin_with_covers_them_all(tmp_path: Path) -> None:
    """As pandas reads the table, every row is whole again."""
    rows = [["A <cat>.", "x", 0.5], ["A <cat>.", "y", 1.0], ["Why?", "x", None], *[["long", "z", 2]] * 9]
    table = {"name": "t", "caption": "c", "columns": ["sentence", "model", "n"], "rows": rows, "decimals": 1}
    result = {"name": "p", "title": "P", "tables": [table], "pictures": [], "notes": []}
    run = {"command": "c", "created": "now", "versions": {}, "hardware": {"cpu": "x", "cpu_count": 1}}
    summary = {"models": ["m"], "data": "d", "settings": {}, "run": run}
    write_report(tmp_path / "report.html", [result], tmp_path, summary)
    page = (tmp_path / "report.html").read_text()
    assert page.count("A &lt;cat&gt;.") == 1
    assert page.count(">long<") == 9  # a cell of nine rows may be out of sight
    (found,) = pandas.read_html(io.StringIO(page), keep_default_na=False)
    expected = [["A <cat>.", "x", "0.5"], ["A <cat>.", "y", "1.0"], ["Why?", "x", ""], *[["long", "z", "2"]] * 9]
    assert found.astype(str).to_numpy().tolist() == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no-such-model", "--output", "OUT"], "no-such-model"),
        (["MODEL", "--output", "OUT", "--only", "geometri"], "Unknown part 'geometri'. Expected some of: geometry"),
        (["MODEL", "--output", "OUT", "--only", ""], "Unknown part ''"),
        (["MODEL", "MODEL", "--output", "OUT"], "Two models have the name 'tiny-llama'"),
        (["mean:", "--output", "OUT"], "names a method and no model"),
        (["mean:layer=x:MODEL", "--output", "OUT"], "layer"),
        (["bert-avg:MODEL", "--output", "OUT"], "does not apply"),
        (["MODEL", "--output", "OUT", "--sentences", "1"], "sentences is 1. Expected at least 2"),
        (["MODEL", "--output", "OUT", "--share", "0"], "share is 0.0. Expected a number above 0"),
        (["MODEL", "--output", "OUT", "--data-dir", "OUT"], "There are no NLI triplets in"),
        (["MODEL", "--output", "OUT", "--corpus", "no.txt"], "no.txt"),
        (
            ["MODEL", "--output", "OUT", "--records", "benchmarks/results/generation-wikitext.json"],
            "No model has both STS and generation scores",
        ),
        (["MODEL", "--output", "MODEL/config.json"], "is a file. Expected a folder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    run_cli: Cli, tiny_base: Path, tmp_path: Path, argv: list[str], message: str
) -> None:
    argv = [word.replace("MODEL", str(tiny_base)).replace("OUT", str(tmp_path / "out")) for word in argv]
    code, _, err = run_cli("analyze", *argv, "--dtype", "float32")
    assert code == 2, err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_setting_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(SempaError, match="unknown key 'sentence'"):
        sempa_st.analyze(str(tiny_base), tmp_path / "out", sentence=3)


def test_sentences_are_encoded_once_and_as_the_model_does(tiny_base: Path, tmp_path: Path) -> None:
    settings = AnalysisSettings(dtype="float32", device="cpu", batch_size=2)
    models = find_models([str(tiny_base), f"mean:{tiny_base}"])
    assert list(models) == ["tiny-llama", "mean:tiny-llama"]
    context = Context(models, AnalysisData(), settings, tmp_path)
    texts = ["A dog runs.", "It rains.", "A dog runs.", "Who is there?"]
    for name, method in (("tiny-llama", None), ("mean:tiny-llama", "mean")):
        model = hidden_states(sempa_st.load(tiny_base, method=method, dtype="float32", device="cpu"))
        expected = model.encode(texts)
        found = context.vectors(name, texts)
        assert found.shape == expected.shape
        np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-4, atol=1e-5)
        encoder = context.load(name)
        encoder.encode = None  # type: ignore[assignment]
        np.testing.assert_array_equal(context.vectors(name, texts[::-1])[1:3], np.asarray(found)[::-1][1:3])


def test_the_data_of_an_analysis(analysis_data: Path, tmp_path: Path) -> None:
    sample, folder = AnalysisData(), AnalysisData(analysis_data)
    assert sample.source == "sample"
    assert list(sample.triplets) == list(folder.triplets)
    assert list(folder.sts) == ["STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark", "SICK-R"]
    assert len(set(sample.corpus)) == len(sample.corpus) >= 1000
    chosen = sample.sentences(20, 3)
    assert len(set(chosen)) == 20
    assert set(chosen) <= set(sample.corpus)
    assert chosen == sample.sentences(20, 3) != sample.sentences(20, 4)
    (tmp_path / "corpus.txt").write_text("One.\nTwo.\nOne.\n")
    own = AnalysisData(corpus_file=tmp_path / "corpus.txt")
    assert own.sentences(9, 0) == ["One.", "Two."]
    assert own.digest("corpus") != sample.digest("corpus")


def test_geometry_of_two_models(run_cli: Cli, tiny_base: Path, analysis_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("analyze", tiny_base, f"mean:{tiny_base}", "--only", "geometry", "--data-dir", analysis_data)
    code, printed, err = run_cli(*command, "--output", out, *FLAGS)
    assert code == 0, err
    assert "Wrote geometry of 2 model(s)" in printed
    values = json.loads((out / "results.json").read_text())["parts"]["geometry"]
    assert (values["sentences"], values["pairs"]) == (12, 1)
    sentences = AnalysisData(analysis_data).sentences(12, 0)
    for name, method in (("tiny-llama", None), ("mean:tiny-llama", "mean")):
        vectors = sempa_st.load(tiny_base, method=method, dtype="float32", device="cpu").encode(
            sentences, normalize_embeddings=True
        )
        cosines = (vectors @ vectors.T)[np.tril_indices(12, -1)]
        found = values["models"][name]
        assert found["mean cosine"] == pytest.approx(cosines.mean(), abs=1e-4)
        assert found["uniformity"] == pytest.approx(np.log(np.exp(4 * cosines - 4).mean()), abs=1e-4)
    page = Page((out / "report.html").read_text())
    (picture,) = page.loaded
    png = base64.b64decode(re.sub("^data:image/png;base64,", "", picture))
    file = out / "parts" / "geometry" / "geometry.png"
    assert png == file.read_bytes()
    assert png.startswith(b"\x89PNG")
    file.unlink()  # a part that lost a file is not finished
    assert run_cli(*command, "--output", out, *FLAGS)[0] == 0
    assert file.read_bytes() == png


@pytest.mark.parametrize("both_fit", [True, False])
def test_models_stay_loaded_while_they_fit(
    both_fit: bool, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = AnalysisSettings(dtype="float32", device="cpu")
    context = Context(find_models([str(tiny_base), f"mean:{tiny_base}"]), AnalysisData(), settings, tmp_path)
    first = weakref.ref(context.load("tiny-llama")[0])
    size = sum(weight.nbytes for weight in context.load("tiny-llama").parameters())
    monkeypatch.setattr("sempa_st.analysis.context._LOADED_BYTES", 2 * size - (not both_fit))
    assert context.load("tiny-llama")[0] is first()
    context.load("mean:tiny-llama")
    assert (first() is not None) is both_fit


def test_kept_embeddings_are_not_encoded_again(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Context(find_models([str(tiny_base)]), AnalysisData(), AnalysisSettings(), tmp_path)
    given = np.arange(12, dtype=np.float32).reshape(4, 3)
    monkeypatch.setattr(Context, "load", lambda *args: pytest.fail("a model is loaded"))
    context.keep("tiny-llama", ["a", "b", "a"], given[[0, 1, 0]])
    context.keep("tiny-llama", ["b", "c"], given[[3, 2]])  # "b" has an embedding already
    np.testing.assert_array_equal(context.vectors("tiny-llama", ["c", "b", "a"])[:], given[[2, 1, 0]])
