"""The paper whose method this package implements."""

from __future__ import annotations

PAPER_URL = "https://arxiv.org/abs/2601.05075"
BIBTEX = """\
@misc{chen2026sempa,
  title         = {{SemPA}: Improving Sentence Embeddings of Large Language Models
                   through Semantic Preference Alignment},
  author        = {Ziyang Chen and Zhenxuan Huang and Yile Wang and Weiqin Wang and Lu Yin and Hui Huang},
  year          = {2026},
  eprint        = {2601.05075},
  archivePrefix = {arXiv},
  primaryClass  = {cs.CL},
  url           = {https://arxiv.org/abs/2601.05075}
}"""
