from __future__ import annotations

import itertools

import pytest
import torch

from sempa_st.forward.batching import batches_within_tokens
from sempa_st.training.reference import collect

pytestmark = pytest.mark.names_dtype


def test_collect_orders_the_results_of_batches() -> None:
    lengths = [5, 1, 9, 2, 2, 30, 7]
    batches = list(batches_within_tokens(lengths, 10, "rows"))
    assert sorted(itertools.chain(*batches)) == list(range(7))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 10 for batch in batches)
    assert len(batches) < len(lengths)
    result = collect(iter(batches), lambda batch: torch.tensor(batch)[:, None] * 2)
    assert result.tolist() == [[2.0 * index] for index in range(7)]
