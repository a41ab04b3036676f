"""What the robustness suite counts as a failure, and that it sees one."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from benchmarks import robustness
from benchmarks.attacks import kill, world
from benchmarks.attacks.texts import strings
from benchmarks.attacks.world import Child, Outcome, World, content
from benchmarks.robustness import report
from sempa_st.utils.files import read_json, write_json

pytestmark = pytest.mark.names_dtype


def test_a_trial_that_does_not_hold_is_a_failure() -> None:
    outcome = Outcome("kill: x")
    outcome.check(True, "never")
    outcome.check(False, "lost a row")
    assert (outcome.trials, outcome.failures) == (2, ["lost a row"])
    assert report([outcome]).splitlines()[-1] == "kill: x: lost a row"


def test_what_the_file_says_of_other_attacks_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str, failures: tuple[str, ...] = ()) -> int:
        for name in ("kill", "push"):
            made = Outcome(f"{name}: x", 1, list(failures))
            monkeypatch.setitem(robustness.ATTACKS, name, lambda world, made=made: iter([made]))
        monkeypatch.setattr(sys, "argv", ["robustness", "--output", str(tmp_path / "r.json"), *words])
        return robustness.main()

    monkeypatch.setattr(robustness, "ATTACKS", {})
    monkeypatch.setattr(World, "build", lambda root, quick: World(root, quick))
    assert run() == 0
    assert run("--only", "push", "--quick", failures=("lost",)) == 1
    record = read_json(tmp_path / "r.json")
    assert [(name, record[name]["quick"]) for name in record] == [("kill", False), ("push", True)]
    assert [record[name]["outcomes"][0]["failures"] for name in record] == [[], ["lost"]]
    assert "push: x: lost" in capsys.readouterr().out
    assert run() == 0
    assert not any(part["outcomes"][0]["failures"] for part in read_json(tmp_path / "r.json").values())


def test_records_are_compared_without_what_differs_from_run_to_run(tmp_path: Path) -> None:
    for name, seconds, score in (("a", 1, 80), ("b", 2, 80), ("c", 1, 81)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "x.json", {"seconds": seconds, "rows": [{"created": seconds, "score": score}]})
        (tmp_path / name / "v.npy").write_bytes(b"v")
    a, b, c = (content(tmp_path / name) for name in "abc")
    assert a == b and sorted(a) == ["v.npy", "x.json"]
    assert {key for key in a if a[key] != c[key]} == {"x.json"}


def test_scores_of_a_job_that_goes_on_may_differ_in_their_last_digits(tmp_path: Path) -> None:
    for name, score in (("a", 0.8), ("b", 0.8 + 1e-7), ("c", 0.8 + 1e-3)):
        (tmp_path / name / "out").mkdir(parents=True)
        write_json(tmp_path / name / "out" / "x.json", {"rows": [{"score": score, "task": "STS12"}]})
    a, b, c = (tmp_path / name / "out" for name in "abc")
    assert world.unlike(b, [content(a)], "a") == "other than a: x.json"
    assert world.unlike(b, [content(a)], "a", rounded=True) == ""
    assert world.unlike(c, [content(a)], "a", rounded=True) == "other than a: x.json"
    (b / "y.json").write_text("{}")
    assert world.unlike(b, [content(a)], "a", rounded=True) == "other than a: x.json, y.json"


def test_strings_are_many_kinds_and_none_is_half_a_character() -> None:
    found = strings(4000)
    assert found == strings(4000) and found != strings(4000, seed=1)
    assert "" in found and any(len(text) > 100 for text in found)
    assert any("\x00" in text for text in found) and any("<bos>" in text for text in found)
    for text in found:
        text.encode()


def test_a_command_is_killed_and_told_apart_from_one_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the command line: this process has threads, which a fork does not take along."""

    def command(words: list[str]) -> int:
        if words == ["ends"]:
            os.write(1, b"done\n")
            return 3
        signal.pause()
        return 0

    monkeypatch.setattr(world, "main", command)
    ended = Child.start(["ends"], tmp_path / "log.txt")
    assert (ended.wait(), ended.last_line) == (3, "done")
    assert Child.start(["hangs"], tmp_path / "log.txt").kill_after(0.2, signal.SIGKILL) == -signal.SIGKILL
    assert Child.start(["ends"], tmp_path / "log.txt").kill_after(60, signal.SIGKILL) == 3


@pytest.mark.parametrize(
    ("fault", "named"),
    [("", ""), ("other", "other than undisturbed: rows.json"), ("left", "left: .partial"), ("refused", "exit code 2")],
)
def test_each_fault_of_a_killed_command_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, named: str
) -> None:
    first, undisturbed = [True], tmp_path / "undisturbed"

    def command(words: list[str]) -> int:
        output = Path(words[-1])
        disturbed = undisturbed.exists()
        undisturbed.touch()
        if disturbed and first[0]:
            signal.pause()
        if disturbed and fault == "refused":
            return 2
        output.write_text(json.dumps([1, 2, 3] if fault == "other" and disturbed else [1, 2]))
        if disturbed and fault == "left":
            (output.parent / ".partial").touch()
        return 0

    original = Child.kill_after

    def kill_after(self: Child, seconds: float, number: int) -> int:
        code = original(self, 0.1, number)
        first[0] = False
        return code

    monkeypatch.setattr(world, "main", command)
    monkeypatch.setattr(Child, "kill_after", kill_after)
    job = kill.Job("x", "x --output OUT", "rows.json")
    outcome = kill.attack_job(World(tmp_path), job, trials=1)
    assert outcome.trials == 3
    assert any(named in failure for failure in outcome.failures) if named else outcome.failures == []
