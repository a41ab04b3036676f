"""The one loss behind every objective: a Plackett-Luce choice among candidates (the paper, "Theory")."""

from __future__ import annotations

import torch
from torch import Tensor


def plackett_luce_loss(scores: Tensor, ranking: Tensor, absent: Tensor | None = None) -> Tensor:
    """Return the mean negative log-probability of a ranking of candidates.

    With the ranked candidates c_1 > c_2 > ... of a row, and all of the row's other candidates below them,

        loss = - sum_k log( exp s(x, c_k) / sum_{y not among c_1 .. c_{k-1}} exp s(x, y) )

    One ranked candidate gives the top-1 form that contrastive learning and DPO share: with cosine over temperature for
    s it is InfoNCE, with two candidates and beta times log ratios it is DPO's sigmoid loss.

    Args:
        scores: s(x, y) of shape (rows, candidates).
        ranking: Columns of the ranked candidates, best first, of shape (rows, ranked), with 1 <= ranked <= candidates.
            A -1 ends the ranking of a row early.
        absent: True where a candidate does not stand for choice in a row, of shape (rows, candidates). A ranked
            candidate must be present.

    Returns:
        A scalar: the mean over rows.

    Raises:
        ValueError: If a ranked candidate is absent, which would make the loss infinite.
    """
    out = torch.zeros_like(scores, dtype=torch.bool) if absent is None else absent
    total = scores.new_zeros(len(scores))
    for place in range(ranking.shape[1]):
        column = ranking[:, place : place + 1]
        ranked = column >= 0
        column = column.clamp(min=0)
        if (out.gather(1, column) & ranked).any():
            raise ValueError("A ranked candidate is absent or ranked twice.")
        left = scores.masked_fill(out, -torch.inf)
        negative_log = left.logsumexp(dim=1) - scores.gather(1, column).squeeze(1)
        total = total + torch.where(ranked.squeeze(1), negative_log, 0.0)
        out = out.scatter(1, column, out.gather(1, column) | ranked)
    return total.mean()
