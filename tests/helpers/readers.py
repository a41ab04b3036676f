"""A model folder as other readers see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

WITHOUT_SEMPA_ST = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sempa_st":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Block())
import json
from sentence_transformers import SentenceTransformer
folder, trust, sentences = sys.argv[1], sys.argv[2] == "trust", json.load(sys.stdin)
model = SentenceTransformer(folder, trust_remote_code=trust, device="cpu")
print(json.dumps(model.encode(sentences).tolist()))
"""


def encode_without_sempa_st(folder: Path, sentences: list[str], *, trust: bool, cwd: Path) -> np.ndarray:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_SEMPA_ST, str(folder), "trust" if trust else "no"],
        input=json.dumps(sentences),
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "HF_MODULES_CACHE": str(cwd / "modules")},
    )
    assert result.returncode == 0, result.stderr
    return np.array(json.loads(result.stdout.splitlines()[-1]), dtype=np.float32)


def assert_same(actual: np.ndarray | torch.Tensor, expected: np.ndarray | torch.Tensor) -> None:
    pair = torch.as_tensor(actual), torch.as_tensor(expected)
    assert cosine_similarity(*pair).min() >= 0.99999
    torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-3)
