from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny import make_config

from sempa_st.errors import SempaError
from sempa_st.training.objectives import parse_objective

pytestmark = pytest.mark.names_dtype


def test_objectives_and_their_weights() -> None:
    assert parse_objective("one-word") == {"one-word": 1.0}
    assert list(parse_objective("one-word-listwise:1.0, dpo:0.3").items()) == [("one-word-listwise", 1.0), ("dpo", 0.3)]
    for text, message in {
        "dop": "Unknown objective 'dop'",
        "": "Unknown objective ''",
        "dpo,": "Unknown objective ''",
        "dpo,one-word,dpo:2": "'dpo' is given twice",
        "dpo:0": "weight of 'dpo' is '0'",
        "dpo:-1": "Expected a number above 0",
        "dpo:nan": "Expected a number above 0",
        "dpo:inf": "Expected a number above 0",
        "dpo:much": "weight of 'dpo' is 'much'",
    }.items():
        with pytest.raises(SempaError, match=message):
            parse_objective(text)


def test_a_text_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SempaError, match=r"kl_text is 'text\.txt'.*without --kl nothing reads it"):
        make_config(tmp_path, tmp_path / "model", kl_text="text.txt")
