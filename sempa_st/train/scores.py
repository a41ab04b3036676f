"""The scores s(x, y) that an objective can put into the Plackett-Luce loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


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
