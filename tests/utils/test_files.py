from __future__ import annotations

from pathlib import Path

import pytest

from sempa_st.errors import SempaError
from sempa_st.utils.files import atomic_file, atomic_folder, check_output_folder, filled_folder, read_json, write_json


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "a.txt"
    with atomic_file(target) as partial:
        partial.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    with pytest.raises(RuntimeError), atomic_file(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


def test_a_folder_replaces_the_old_one_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as partial:
        (partial / "a").write_text("1")
    with pytest.raises(SempaError, match=r"not empty.*--overwrite"), atomic_folder(target):
        pass
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True) as partial:
        (partial / "b").write_text("2")
        raise RuntimeError
    assert (target / "a").read_text() == "1"
    with atomic_folder(target, overwrite=True) as partial:
        (partial / "b").write_text("2")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_outputs_that_cannot_be_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SempaError, match="is a file"):
        check_output_folder(tmp_path / "file")
    with pytest.raises(SempaError, match="not a folder that may be written to"):
        check_output_folder(tmp_path / "file" / "below")
    with pytest.raises(SempaError, match="cannot be written"), atomic_file(tmp_path / "file" / "a.npy"):
        pass


def test_json_round_trip_and_faults(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": [1, None]})
    assert read_json(tmp_path / "a.json") == {"é": [1, None]}
    with pytest.raises(SempaError, match="does not exist"):
        read_json(tmp_path / "b.json")


def test_a_folder_that_a_pattern_meets_stays(tmp_path: Path) -> None:
    (tmp_path / "out" / "adapter_notes").mkdir(parents=True)
    (tmp_path / "out" / "adapter_old.json").touch()
    with filled_folder(tmp_path / "out", ["adapter_*"]) as folder:
        (folder / "new.json").touch()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter_notes", "new.json"]
