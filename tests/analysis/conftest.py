from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny import save_sts

from sempa_st.data.rows import read_rows
from sempa_st.utils.assets import asset_path


@pytest.fixture(scope="session")
def analysis_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the shipped triplets and pairs."""
    root = tmp_path_factory.mktemp("analysis-data")
    save_sts(root)
    (root / "nli").mkdir()
    pq.write_table(pa.Table.from_pylist(read_rows(asset_path("nli_sample.jsonl"))), root / "nli" / "triplets.parquet")
    return root
