"""The one loss behind every objective: a Plackett-Luce choice among candidates (the paper, "Theory")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


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


def log_ratio_score(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return DPO's implicit reward: s(x, y) = beta (log pi(y | x) - log pi_ref(y | x)).

    Args:
        policy: Log-probabilities of whole answers under the model, of any shape.
        reference: The same under the reference, of the same shape.
        beta: Strength of the tie to the reference, above 0.
    """
    return beta * (policy - reference)


def word_score(policy: Tensor, reference: Tensor | None, bags: Tensor, beta: float) -> Tensor:
    """Score sentences by their words at the one position that is the embedding.

        s(x, y) = beta * mean over v in B(y) of ( log pi(v | T(x)) - log pi_ref(v | T(x)) )

    where T(x) is the embedding template around x, pi the next-token distribution at its last position, and B(y) the
    bag of words of y. The normalisers of pi and pi_ref do not depend on y, so they cancel in every choice among
    candidates of one x: logits stand for log-probabilities, and only those of the words at hand are needed.

    Args:
        policy: Logits of the batch's distinct words at the template's last position, of shape (rows, words).
        reference: The same under the reference; None leaves the reference out.
        bags: Weight of each word in each candidate's bag, of shape (candidates, words); each row sums to 1.
        beta: Strength, above 0.

    Returns:
        Scores of shape (rows, candidates), each row up to a constant.
    """
    moved = policy if reference is None else policy - reference
    return beta * moved @ bags.T


def similarity_score(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return the contrastive score: s(x, y) = cos(f(x), f(y)) / temperature.

    Args:
        first: Embeddings of shape (rows, hidden).
        second: Embeddings of shape (candidates, hidden).
        temperature: Above 0.

    Returns:
        Scores of shape (rows, candidates).
    """
    return functional.normalize(first, dim=-1) @ functional.normalize(second, dim=-1).T / temperature


@dataclass(frozen=True)
class ObjectiveLoss:
    """What an objective says of a batch.

    Args:
        loss: Scalar.
        margins: s(x, entailed) - s(x, contradicted) of each row, of shape (rows,), without gradients.
    """

    loss: Tensor
    margins: Tensor


def ranked_answers_loss(policy: Tensor, reference: Tensor, answers: Tensor, beta: float) -> ObjectiveLoss:
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
    return ObjectiveLoss(plackett_luce_loss(scores, ranking, absent), (scores[:, 0] - worst).detach())


def one_word_loss(policy: Tensor, reference: Tensor | None, bags: Tensor, beta: float) -> ObjectiveLoss:
    """Prefer the words of the entailed sentence to those of the contradicted one (objective ``one-word``).

        loss = - log sigmoid( s(x, y+) - s(x, y-) ),  s as in :func:`sempa_st.training.losses.word_score`

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
    return ObjectiveLoss(plackett_luce_loss(own, first), (own[:, 0] - own[:, 1]).detach())


def in_batch_loss(scores: Tensor, same: Tensor, neutral_known: Tensor, *, neutral: str) -> ObjectiveLoss:
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
    return ObjectiveLoss(loss, (scores[:, :rows].diagonal() - scores[:, rows : 2 * rows].diagonal()).detach())


def reference_kl(policy: Tensor, reference: Tensor) -> Tensor:
    """Return KL(pi_ref || pi), the mean over positions of ordinary text.

    Args:
        policy: Float32 logits of shape (positions, vocabulary).
        reference: The same under the reference.
    """
    target = torch.log_softmax(reference, dim=-1)
    return (target.exp() * (target - torch.log_softmax(policy, dim=-1))).sum(dim=-1).mean()
