"""Evaluation on MTEB's STS tasks and on lm-evaluation-harness's generation tasks; needs the extra ``eval``."""
