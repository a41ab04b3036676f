"""Every Python and shell block of the documents runs, or says why it does not.

A block is run as it stands, in a folder that holds what the documents speak of: tiny models under the documents' names,
data files, a data folder. The blocks of a page run in order and share their Python names, as for somebody who reads on.
Before a block may stand ``<!-- not run: REASON -->``, or ``<!-- real base -->`` for one that is also run on the real
Gemma 3 270M and the models that the package ships. ``<!-- real base; needs: PACKAGE,... -->`` is run there only, and
where one of these libraries is installed: such a page is run once for each library. A text after ``<!-- prints -->`` is
what the block before it prints there.
"""

from __future__ import annotations

import csv
import io
import re
import shlex
import shutil
import tomllib
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.generation_data import write_generation_data
from helpers.server import activated_adapter
from helpers.tiny import finish_adapter, make_gemma, make_llama, make_tokenizer, sample_sentences, save_base, save_sts

from sempa_st.cli import main
from sempa_st.data.rows import read_rows
from sempa_st.model.embedded import embedded_folder
from sempa_st.utils.assets import asset_path
from sempa_st.utils.files import cache_folder

pytestmark = pytest.mark.names_dtype  # each test says what "auto" means

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\S*).*?\n(.*?)^\1```$", re.M | re.S)
MARK = re.compile(r"<!-- (not run: \S.*|prints|real base)(?:; needs: (\S+))? -->\s*\Z")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
USERS_CACHE = cache_folder()
"""The cache that the other tests are kept out of."""
SHOWN = {"text", "yaml", "json", "csv"}
"""Languages of blocks that are there to be looked at."""


@dataclass(frozen=True)
class Block:
    """A block of code: where its first line stands, what it is and the comment before it."""

    page: str
    line: int
    language: str
    code: str
    mark: str = ""
    needs: tuple[str, ...] = ()
    """Packages for any of which the block is run; for all when empty."""

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        indent, language, code = match.groups()
        mark = MARK.search(text[: match.start()])
        code = "".join(line.removeprefix(indent) for line in code.splitlines(keepends=True))
        line = text[: match.start()].count("\n") + 2
        needs = tuple(mark[2].split(",")) if mark and mark[2] else ()
        found.append(Block(page, line, language, code, mark[1] if mark else "", needs))
    return found


def is_installed(package: str) -> bool:
    """Return whether a package is installed; one that is and does not import is an error of its block."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def run_block(block: Block, names: dict[str, Any]) -> None:
    if block.mark.startswith("not run") or block.language in SHOWN:
        return
    if block.language == "python":
        exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), names)
    elif block.language == "bash":
        for command in block.code.replace("\\\n", " ").splitlines():
            if words := shlex.split(command, comments=True):
                assert words[0] == "sempa", f"{block.where}: only sempa is run here; say why not before: {command}"
                assert main(words[1:]) == 0, f"{block.where}: {command}"
    else:
        pytest.fail(f"{block.where}: a block of {block.language or 'no language'}")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models and data under the names that the documents use."""
    root = tmp_path_factory.mktemp("documents") / "workspace"
    data = root / "data"
    data.mkdir(parents=True)
    save_sts(data)
    write_generation_data(data)
    triplets = read_rows(asset_path("nli_sample.jsonl"))[:16]
    with (root / "my_nli.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, list(triplets[0]))
        rows.writeheader()
        rows.writerows(triplets)
    with (root / "qa.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], *([row["sent0"], row["sent1"]] for row in triplets)])
    sentences = sample_sentences()[:20]
    (data / "nli").mkdir()
    pq.write_table(pa.Table.from_pylist(triplets), data / "nli" / "triplets.parquet")
    (root / "sentences.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    (root / "text.txt").write_text(" ".join(sample_sentences()[:300]), encoding="utf-8")
    with (root / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(sentences)])
    gemma = save_base(embedded_folder(), make_gemma(), make_tokenizer(chat=None))
    llama = save_base(root / "meta-llama" / "Meta-Llama-3-8B", make_llama(), make_tokenizer())
    finish_adapter(root / "sempa-gemma3-270m", gemma, make_gemma())
    finish_adapter(root / "sempa-llama3", llama, make_llama())
    activated_adapter(root / "sempa-gemma3-270m-activated", gemma, make_gemma())
    return root


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_the_blocks_of_a_page_run(page: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(workspace, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("SEMPA_DATA_DIR", str(workspace / "data"))  # in place of the Hub
    monkeypatch.setenv("SEMPA_AUTO_DTYPE", "float32")
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if not block.needs:
            run_block(block, names)


REAL = {page: blocks_of(page) for page in PAGES if any(block.mark == "real base" for block in blocks_of(page))}
CASES = [
    (page, needs)
    for page, blocks in REAL.items()
    for needs in sorted({package for block in blocks for package in block.needs}) or [""]
]


@pytest.mark.parametrize(("page", "needs"), CASES)
@pytest.mark.integration
def test_the_blocks_of_a_page_run_on_the_real_base(
    page: str, needs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if needs and not is_installed(needs):
        pytest.skip(f"{needs} is not installed: make recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(USERS_CACHE))
    monkeypatch.setenv("SEMPA_AUTO_DTYPE", "float32")
    Path("text.txt").write_text("\n".join(sample_sentences()), encoding="utf-8")
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = None
    for block in REAL[page]:
        if block.needs and needs not in block.needs:
            printed = None
        elif block.mark == "prints":
            assert printed in (None, block.code), block.where
        elif block.mark == "real base":
            with redirect_stdout(io.StringIO()) as output:
                run_block(block, names)
            printed = output.getvalue()


def test_the_libraries_of_recipes_are_in_their_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    installed = {re.split("[><=]", requirement)[0] for requirement in extras["recipes"]}
    needed = {needs for _, needs in CASES if needs}
    assert len(needed) > 1 and needed <= installed


@pytest.mark.parametrize(
    ("language", "code", "error"),
    [
        ("bash", "pip install sempa-st\n", AssertionError),
        ("bash", "sempa encode no-such-model sentences.txt --output v.npy\n", AssertionError),
        ("python", "import sempa_st\nsempa_st.no_such_name\n", AttributeError),
        ("", "sempa --version\n", pytest.fail.Exception),
    ],
)
def test_a_block_that_is_wrong_is_noticed(language: str, code: str, error: type[BaseException]) -> None:
    with pytest.raises(error):
        run_block(Block("page.md", 1, language, code), {})
    run_block(Block("page.md", 1, language, code, "not run: on purpose"), {})


def test_the_command_line_page_has_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^ +([a-z]+)\s+[A-Z]", capsys.readouterr().out, re.M)
    assert "train" in commands
    shown = re.findall(r"<!-- help: ([a-z]+) -->", (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(commands)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md"])
def test_links_to_files_lead_somewhere(page: str) -> None:
    for target in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        assert "://" in target or (ROOT / target).exists(), target
