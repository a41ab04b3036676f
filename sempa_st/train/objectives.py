"""The objectives of the embedding token and of ranked answers, as scores in one Plackett-Luce loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sempa_st.train.losses import plackett_luce_loss
from sempa_st.train.scores import log_ratio_score, word_score


@dataclass(frozen=True)
class Outcome:
    """What an objective says of a batch.

    Args:
        loss: Scalar.
        margins: s(x, entailed) - s(x, contradicted) of each row, of shape (rows,), without gradients.
    """

    loss: Tensor
    margins: Tensor


def ranked_answers_outcome(policy: Tensor, reference: Tensor, answers: Tensor, beta: float) -> Outcome:
    """Rank whole answers to a paraphrase request (objectives ``dpo`` and ``listwise``).

        loss = - log PL( entailed > neutral > contradicted ),  s(x, y) = beta (log pi(y|x) - log pi_ref(y|x))

    With two answers it is DPO's sigmoid loss; with three it is the listwise form that the paper leaves to future work.

    Args:
        policy: Log-probabilities of the answers, best first, of shape (rows, answers); a missing one holds anything.
        reference: The same under the reference.
        answers: Number of answers of each row, of shape (rows,), at least 2; those a row lacks stand last.
        beta: DPO's beta.
    """
    scores = log_ratio_score(policy, reference, beta)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    absent = places >= answers[:, None]
    ranking = places[:, :-1].masked_fill(places[:, :-1] >= answers[:, None] - 1, -1)
    worst = scores.gather(1, answers[:, None] - 1).squeeze(1)
    return Outcome(plackett_luce_loss(scores, ranking, absent), (scores[:, 0] - worst).detach())


def one_word_outcome(policy: Tensor, reference: Tensor | None, bags: Tensor, beta: float) -> Outcome:
    """Prefer the words of the entailed sentence to those of the contradicted one (objective ``one-word``).

        loss = - log sigmoid( s(x, y+) - s(x, y-) ),  s as in :func:`sempa_st.train.scores.word_score`

    Args:
        policy: Logits of the batch's words at the template's last position, of shape (rows, words).
        reference: The same under the reference, or None.
        bags: Bags of the entailed, then of the contradicted sentences, without the words that the two of a row share,
            of shape (2 rows, words).
        beta: Strength.
    """
    rows = len(policy)
    scores = word_score(policy, reference, bags, beta)
    own = torch.stack([scores[:, :rows].diagonal(), scores[:, rows:].diagonal()], dim=1)
    first = torch.zeros(rows, 1, dtype=torch.long, device=own.device)
    return Outcome(plackett_luce_loss(own, first), (own[:, 0] - own[:, 1]).detach())


def in_batch_outcome(scores: Tensor, same: Tensor, neutral_known: Tensor, *, neutral: str) -> Outcome:
    """Choose a row's entailed sentence among all hypotheses of the batch (``one-word-listwise``, ``contrastive``).

        loss = - log ( exp s(x_i, y+_i) / sum_j ( exp s(x_i, y+_j) + exp s(x_i, y-_j) [+ exp s(x_i, n_j)] ) )

    and with ``neutral="second"`` also the second choice of a full ranking, a row's own neutral sentence among all that
    are left.

    Args:
        scores: Columns are the entailed, the contradicted and, unless ``neutral`` is ``none``, the neutral sentences
            of all rows, of shape (rows, 2 rows) or (rows, 3 rows).
        same: True for another row with the same premise: its hypotheses are no negatives. Shape (rows, rows).
        neutral_known: False where a row has no neutral sentence: its column holds anything. Shape (rows,).
        neutral: ``none``, ``negative`` or ``second``.
    """
    rows = len(scores)
    own = torch.arange(rows, device=scores.device)[:, None]
    ranking, absent = own, same.repeat(1, scores.shape[1] // rows)
    if neutral != "none":
        absent[:, 2 * rows :] |= ~neutral_known
    if neutral == "second":
        ranking = torch.cat([own, (own + 2 * rows).masked_fill(~neutral_known[:, None], -1)], dim=1)
    loss = plackett_luce_loss(scores, ranking, absent)
    return Outcome(loss, (scores[:, :rows].diagonal() - scores[:, rows : 2 * rows].diagonal()).detach())


def reference_kl(policy: Tensor, reference: Tensor) -> Tensor:
    """Return KL(pi_ref || pi), the mean over positions of ordinary text.

    Args:
        policy: Float32 logits of shape (positions, vocabulary).
        reference: The same under the reference.
    """
    target = torch.log_softmax(reference, dim=-1)
    return (target.exp() * (target - torch.log_softmax(policy, dim=-1))).sum(dim=-1).mean()
