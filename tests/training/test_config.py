from __future__ import annotations

import pytest

from sempa_st.errors import SempaError
from sempa_st.training.config import parse_objective

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
