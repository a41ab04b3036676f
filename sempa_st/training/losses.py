"""The objectives, all of them Plackett-Luce losses over scored candidates (the paper, "Theory"), and the KL term.

The way from a batch to the scalar is drawn in :mod:`sempa_st.training.alignment`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


def plackett_luce_loss(scores: Tensor, ranking: Tensor, absent: Tensor | None = None) -> Tensor:
    """Return the mean negative log-probability of rankings under the Plackett-Luce model.

    For an example x with the ranking c_1 > c_2 > ... above all unranked candidates,

        loss = - sum_k log( exp s(x, c_k) / sum_{y not among c_1 .. c_{k-1}} exp s(x, y) )

    Ranking only the best candidate gives the form that contrastive learning and DPO share: it is InfoNCE if s is cosine
    over temperature, and DPO's sigmoid loss with two candidates if s is beta times the log ratio.

    Args:
        scores: s(x, y), of shape (batch, candidates).
        ranking: Indices of the ranked candidates, best first, of shape (batch, ranked), 1 <= ranked <= candidates.
            Shorter rankings are padded with -1.
        absent: True for candidates that an example does not have, of shape (batch, candidates). None if it has all.

    Returns:
        Scalar, the mean over the batch.

    Raises:
        ValueError: If a candidate is ranked twice or is absent, which would make the loss infinite.

    >>> scores = torch.log(torch.tensor([[1.0, 2.0, 5.0]]))
    >>> plackett_luce_loss(scores, torch.tensor([[2, 1]])).exp()  # 1 / (5/8 * 2/3)
    tensor(2.4000)
    """
    excluded = torch.zeros_like(scores, dtype=torch.bool) if absent is None else absent
    total = scores.new_zeros(len(scores))
    for column in ranking.split(1, dim=1):
        ranked = column >= 0
        candidate = column.clamp(min=0)
        if (excluded.gather(1, candidate) & ranked).any():
            raise ValueError("A ranked candidate is absent or ranked twice. Rank each present candidate once at most.")
        remaining = scores.masked_fill(excluded, -torch.inf)
        negative_log = remaining.logsumexp(dim=1) - scores.gather(1, candidate).squeeze(1)
        total = total + torch.where(ranked.squeeze(1), negative_log, 0.0)
        excluded = excluded.scatter(1, candidate, excluded.gather(1, candidate) | ranked)
    return total.mean()


def log_ratio_score(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return DPO's implicit reward: s(x, y) = beta (log pi(y | x) - log pi_ref(y | x)).

    Args:
        policy: Log-probabilities of whole answers under the trained model, of any shape.
        reference: The same under the reference model.
        beta: DPO's beta, above 0; larger values keep the model closer to the reference.
    """
    return beta * (policy - reference)


def word_score(policy: Tensor, reference: Tensor | None, bags: Tensor, beta: float) -> Tensor:
    """Score sentences by the log ratios of their words at the template's last position.

        s(x, y) = beta * mean over v in B(y) of ( log pi(v | T(x)) - log pi_ref(v | T(x)) )

    where T(x) is the embedding template filled with x, pi the next-token distribution after it, and B(y) the bag of
    words of y. The normalisers of pi and pi_ref do not depend on y and cancel among the candidates of one x. So logits
    replace log-probabilities, and only those of the batch's words are needed.

    Args:
        policy: Logits of the batch's distinct words at the template's last position, of shape (batch, words).
        reference: The same under the reference model; None to leave it out.
        bags: Weight of each word in each candidate's bag, of shape (candidates, words); each row sums to 1.
        beta: Scale of the scores, above 0.

    Returns:
        Scores of shape (batch, candidates), each row up to a constant.
    """
    log_ratio = policy if reference is None else policy - reference
    return beta * log_ratio @ bags.T


def similarity_score(first: Tensor, second: Tensor, temperature: float, width: int | None = None) -> Tensor:
    """Return the contrastive score: s(x, y) = cos(f(x), f(y)) / temperature.

    Args:
        first: Embeddings of shape (batch, hidden).
        second: Embeddings of shape (candidates, hidden).
        temperature: Above 0.
        width: Number of leading components to compare (Matryoshka, arXiv 2205.13147); all when None.

    Returns:
        Scores of shape (batch, candidates).
    """
    # In float32: over a small temperature, the steps of bfloat16 near a cosine of 1 are larger than the differences.
    first, second = (functional.normalize(vectors[:, :width].float(), dim=-1) for vectors in (first, second))
    return first @ second.T / temperature


@dataclass(frozen=True)
class ObjectiveLoss:
    """The loss of an objective on a batch, and its reward margins.

    Args:
        loss: Scalar.
        margins: s(x, entailed) - s(x, contradicted), of shape (batch,), without gradients.
    """

    loss: Tensor
    margins: Tensor


def ranked_answers_loss(policy: Tensor, reference: Tensor, counts: Tensor, beta: float) -> ObjectiveLoss:
    """Rank whole answers to a paraphrase prompt (objectives ``dpo`` and ``listwise``).

        loss = - log PL( entailed > neutral > contradicted ),  s(x, y) = beta (log pi(y|x) - log pi_ref(y|x))

    Two answers give DPO's sigmoid loss; three give the listwise form that the paper leaves to future work.

    Args:
        policy: Log-probabilities of the answers, best first, of shape (batch, answers). Missing answers come last and
            may have any value.
        reference: The same under the reference model.
        counts: Number of answers to each prompt, at least 2, of shape (batch,).
        beta: DPO's beta.
    """
    scores = log_ratio_score(policy, reference, beta)
    columns = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    absent = columns >= counts[:, None]
    # The last answer follows from the order of the others.
    ranking = columns[:, :-1].masked_fill(columns[:, :-1] >= counts[:, None] - 1, -1)
    worst = scores.gather(1, counts[:, None] - 1).squeeze(1)
    return ObjectiveLoss(plackett_luce_loss(scores, ranking, absent), (scores[:, 0] - worst).detach())


def one_word_loss(policy: Tensor, reference: Tensor | None, bags: Tensor, beta: float) -> ObjectiveLoss:
    """Prefer the words of the entailed to those of the contradicted sentence (objective ``one-word``).

        loss = - log sigmoid( s(x, y+) - s(x, y-) ),  s as in :func:`word_score`

    Args:
        policy: Logits of the batch's words at the template's last position, of shape (batch, words).
        reference: The same under the reference model, or None.
        bags: Bags of all entailed, then of all contradicted sentences, without the words that the two of a triplet
            share, of shape (2 * batch, words).
        beta: Scale of the scores.
    """
    size = len(policy)
    scores = word_score(policy, reference, bags, beta)
    own = torch.stack([scores[:, :size].diagonal(), scores[:, size:].diagonal()], dim=1)
    first = torch.zeros(size, 1, dtype=torch.long, device=own.device)
    return ObjectiveLoss(plackett_luce_loss(own, first), (own[:, 0] - own[:, 1]).detach())


def in_batch_loss(scores: Tensor, same_premise: Tensor, has_neutral: Tensor, *, neutral: str) -> ObjectiveLoss:
    """Pick a premise's entailed sentence among all hypotheses of the batch (``one-word-listwise``, ``contrastive``).

        loss = - log ( exp s(x_i, y+_i) / sum_j ( exp s(x_i, y+_j) + exp s(x_i, y-_j) [+ exp s(x_i, n_j)] ) )

    With ``neutral="second"``, the premise's own neutral sentence is ranked second. The candidates in a
    batch of two, and which are ranked first and second:

                 y+_1  y+_2  y-_1  y-_2  n_1  n_2
        x_1       1     .     .     .     2    .
        x_2       .     1     .     .     .    2

    Args:
        scores: s(x_i, y) for all entailed, all contradicted and, unless ``neutral`` is ``none``, all neutral sentences
            of the batch, of shape (batch, 2 * batch) or (batch, 3 * batch). For pairs alone, (batch, batch): the
            entailed sentences of the other pairs are the negatives, and the margin is that to the best of them.
        same_premise: True for another triplet with the same premise, whose hypotheses are not used as negatives. Shape
            (batch, batch).
        has_neutral: False for a triplet without a neutral sentence, whose column is ignored. Shape (batch,).
        neutral: ``none``, ``negative`` or ``second``.
    """
    size = len(scores)
    own = torch.arange(size, device=scores.device)[:, None]
    ranking, absent = own, same_premise.repeat(1, scores.shape[1] // size)
    if neutral != "none":
        absent[:, 2 * size :] |= ~has_neutral
    if neutral == "second":
        ranking = torch.cat([own, (own + 2 * size).masked_fill(~has_neutral[:, None], -1)], dim=1)
    loss = plackett_luce_loss(scores, ranking, absent)
    contradicted = scores[:, size : 2 * size].diagonal() if scores.shape[1] > size else None
    return ObjectiveLoss(loss, _margins(scores, own, absent, contradicted))


def _margins(scores: Tensor, best: Tensor, absent: Tensor, contradicted: Tensor | None) -> Tensor:
    """Return how far the scores of the preferred candidates are above those of the contradicted ones.

    Args:
        scores: Scores of shape (batch, candidates).
        best: Index of each example's preferred candidate, of shape (batch, 1).
        absent: True for candidates that an example does not have, of the shape of ``scores``.
        contradicted: Scores of the contradicted candidates, of shape (batch,); None for the best of all others. An
            example without any other then has the margin 0.
    """
    others = contradicted
    if others is None:
        others = scores.masked_fill(absent.scatter(1, best, True), -torch.inf).amax(1)
    margins = (scores.gather(1, best).squeeze(1) - others).detach()
    return margins.masked_fill(margins.isposinf(), 0.0)


def retrieval_loss(
    scores: Tensor, texts: Tensor, same_premise: Tensor, has_neutral: Tensor, *, neutral: str
) -> ObjectiveLoss:
    """Pick each sentence of an entailed pair, given the other, among all sentences of the batch (``retrieval``).

    The model is a policy that answers a sentence with another one, pi(y | x) = exp s(x, y) / sum_z exp s(x, z), and the
    preferred answer is the other sentence of the pair:

        loss = - 1/2 ( log pi(y+_i | x_i) + log pi(x_i | y+_i) )

    Candidates are the triplet's other sentences and all sentences of the other triplets, but for repetitions of x or of
    the preferred answer. In a batch of two, with 1 for the preferred answer, . for the others and a blank for what is
    no candidate:

                 x_1   x_2  y+_1  y+_2  y-_1  y-_2
        x_1             .     1     .     .     .
        x_2       .           .     1     .     .
        y+_1      1     .           .     .     .
        y+_2      .     1     .           .     .

    Args:
        scores: s of all premises and all entailed sentences (rows) with all premises, entailed, contradicted and,
            unless ``neutral`` is ``none``, neutral sentences (columns), of shape (2 * batch, 4 * batch),
            (2 * batch, 3 * batch) or, for pairs alone, (2 * batch, 2 * batch).
        texts: Numbers of the sentences, the same for equal ones, of shape (columns,).
        same_premise: As for :func:`in_batch_loss`; no sentence of such a triplet is a candidate.
        has_neutral: As for :func:`in_batch_loss`.
        neutral: ``none``, ``negative`` or ``second``; the second choice of a premise and of an entailed sentence alike.
    """
    size = len(same_premise)
    own = torch.arange(size, device=scores.device)
    partner = torch.cat([own + size, own])[:, None]
    absent = same_premise.repeat(2, scores.shape[1] // size)
    pair = torch.stack([texts[: 2 * size], texts[partner.squeeze(1)]], dim=1)
    repeated = (texts[None, :, None] == pair[:, None]).any(dim=2)
    absent = (absent | repeated).scatter(1, partner, False)
    ranking = partner
    if neutral != "none":
        absent[:, 3 * size :] |= ~has_neutral
    if neutral == "second":
        second = (own + 3 * size).repeat(2)
        missing = absent[torch.arange(2 * size, device=scores.device), second]
        ranking = torch.cat([partner, second.masked_fill(missing, -1)[:, None]], dim=1)
    loss = plackett_luce_loss(scores, ranking, absent)
    contradicted = scores[own, own + 2 * size] if scores.shape[1] > 2 * size else None
    return ObjectiveLoss(loss, _margins(scores[:size], partner[:size], absent[:size], contradicted))


def reference_kl(policy: Tensor, reference: Tensor) -> Tensor:
    """Return KL(pi_ref || pi), averaged over positions of a text.

    Args:
        policy: Float32 logits of shape (positions, vocab_size).
        reference: The same under the reference model.
    """
    target = torch.log_softmax(reference, dim=-1)
    return (target.exp() * (target - torch.log_softmax(policy, dim=-1))).sum(dim=-1).mean()
