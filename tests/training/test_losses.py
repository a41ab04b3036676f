from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor

from sempa_st.training.losses import (
    in_batch_loss,
    one_word_loss,
    plackett_luce_loss,
    ranked_answers_loss,
    reference_kl,
    retrieval_loss,
    similarity_score,
    word_score,
)
from sempa_st.training.word_bags import (
    bag_matrix,
)

pytestmark = pytest.mark.names_dtype


def numbers(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ranking_probability(scores: Sequence[float], ranking: Sequence[int], absent: Sequence[int] = ()) -> float:
    """Draw the best, then the best of those left, and so on: one draw at a time."""
    left = [column for column in range(len(scores)) if column not in absent]
    probability = 1.0
    for column in ranking:
        probability *= math.exp(scores[column]) / sum(math.exp(scores[other]) for other in left)
        left.remove(column)
    return probability


def test_plackett_luce_loss_by_hand() -> None:
    scores = torch.log(torch.tensor([[1.0, 2.0, 5.0], [3.0, 3.0, 4.0]]))
    assert plackett_luce_loss(scores, torch.tensor([[2], [0]])) == pytest.approx(-math.log(5 / 8 * 3 / 10) / 2)
    whole = plackett_luce_loss(scores, torch.tensor([[2, 0, 1], [0, 2, 1]]))
    assert whole == pytest.approx(-math.log(5 / 8 * 1 / 3 * 3 / 10 * 4 / 7) / 2)


@pytest.mark.parametrize("ranked", [1, 2, 4])
def test_plackett_luce_is_drawing_one_candidate_after_another(ranked: int) -> None:
    scores = numbers(4)
    rankings = list(itertools.permutations(range(4), ranked))
    losses = [float(plackett_luce_loss(scores[None], torch.tensor([ranking]))) for ranking in rankings]
    expected = [-math.log(ranking_probability(scores.tolist(), ranking)) for ranking in rankings]
    assert losses == pytest.approx(expected, abs=1e-5)
    assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1, abs=1e-5)


def test_absent_candidates_and_short_rankings() -> None:
    scores = numbers(3, 5).requires_grad_()
    ranking = torch.tensor([[3, 0, 1], [2, -1, -1], [1, 4, -1]])
    absent = torch.zeros(3, 5, dtype=torch.bool)
    absent[0, [2, 4]] = absent[1, 0] = True
    before = absent.clone()
    loss = plackett_luce_loss(scores, ranking, absent)
    rows = [((3, 0, 1), (2, 4)), ((2,), (0,)), ((1, 4), ())]
    probabilities = [ranking_probability(row.tolist(), *case) for row, case in zip(scores.detach(), rows, strict=True)]
    assert float(loss.detach()) == pytest.approx(-sum(map(math.log, probabilities)) / 3, abs=1e-6)
    assert torch.equal(absent, before)
    loss.backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert (scores.grad[absent] == 0).all()
    assert (scores.grad[1, [1, 2, 3, 4]] != 0).all()
    torch.testing.assert_close(scores.grad.sum(dim=1), torch.zeros(3), rtol=0, atol=1e-6)


def test_an_absent_candidate_cannot_be_ranked() -> None:
    absent = torch.tensor([[False, True, False]])
    for ranking in ([[1]], [[0, 1]]):
        with pytest.raises(ValueError, match="absent or ranked twice"):
            plackett_luce_loss(numbers(1, 3), torch.tensor(ranking), absent)
    with pytest.raises(ValueError, match="absent or ranked twice"):
        plackett_luce_loss(numbers(1, 3), torch.tensor([[0, 0]]))


def test_ranked_answers_loss_with_three_and_with_two_answers() -> None:
    policy, reference = numbers(2, 3, seed=1), numbers(2, 3, seed=2)
    outcome = ranked_answers_loss(policy, reference, torch.tensor([3, 2]), beta=0.5)
    scores = (0.5 * (policy - reference)).tolist()
    expected = ranking_probability(scores[0], (0, 1, 2)) * ranking_probability(scores[1], (0, 1), (2,))
    assert float(outcome.loss) == pytest.approx(-math.log(expected) / 2, abs=1e-6)
    assert outcome.margins.tolist() == pytest.approx([scores[0][0] - scores[0][2], scores[1][0] - scores[1][1]])


def test_ranked_answers_loss_ranks_any_number_of_answers() -> None:
    policy, reference = numbers(2, 5, seed=3), numbers(2, 5, seed=4)
    outcome = ranked_answers_loss(policy, reference, torch.tensor([5, 4]), beta=2.0)
    scores = (2.0 * (policy - reference)).tolist()
    expected = ranking_probability(scores[0], (0, 1, 2, 3, 4)) * ranking_probability(scores[1], (0, 1, 2, 3), (4,))
    assert float(outcome.loss) == pytest.approx(-math.log(expected) / 2, abs=1e-5)
    assert outcome.margins.tolist() == pytest.approx([scores[0][0] - scores[0][4], scores[1][0] - scores[1][3]])


def random_bags(count: int, vocabulary: int, seed: int = 3) -> list[dict[int, float]]:
    draw = torch.Generator().manual_seed(seed)
    picks = [torch.randperm(vocabulary, generator=draw)[:4].tolist() for _ in range(count)]
    return [{token: (index + 1) / 10 for index, token in enumerate(pick)} for pick in picks]


def test_word_score_is_the_one_of_the_whole_vocabulary() -> None:
    """Up to a constant of each row: the normalisers cancel in the loss."""
    rows, vocabulary, beta = 3, 50, 0.7
    policy, reference = numbers(rows, vocabulary, seed=1), numbers(rows, vocabulary, seed=2)
    bags = random_bags(2 * rows, vocabulary)
    words, matrix = bag_matrix(bags)
    ours = word_score(policy[:, words], reference[:, words], torch.tensor(matrix), beta)
    moved = policy.log_softmax(-1) - reference.log_softmax(-1)
    full = torch.tensor(
        [[beta * sum(w * float(row[token]) for token, w in bag.items()) for bag in bags] for row in moved]
    )
    constant = ours - full
    assert constant.abs().max() > 1e-2
    torch.testing.assert_close(constant, constant[:, :1].expand_as(constant), rtol=0, atol=1e-5)
    own = torch.arange(rows)[:, None]
    assert float(plackett_luce_loss(ours, own)) == pytest.approx(float(plackett_luce_loss(full, own)), abs=1e-6)
    alone = word_score(policy[:, words], None, torch.tensor(matrix), beta)
    torch.testing.assert_close(alone, beta * policy[:, words] @ torch.tensor(matrix).T)


def test_one_word_prefers_the_entailed_words() -> None:
    rows, beta = 3, 0.7
    policy, reference = numbers(rows, 9, seed=1), numbers(rows, 9, seed=2)
    bags = numbers(2 * rows, 9, seed=3).softmax(-1)
    outcome = one_word_loss(policy, reference, bags, beta)
    moved = policy - reference
    margins = [beta * float((moved[i] * (bags[i] - bags[rows + i])).sum()) for i in range(rows)]
    expected = -sum(math.log(1 / (1 + math.exp(-margin))) for margin in margins) / rows
    assert float(outcome.loss) == pytest.approx(expected, abs=1e-6)
    assert outcome.margins.tolist() == pytest.approx(margins, abs=1e-6)


def test_in_batch_loss_of_cosines_is_sentence_transformers_loss() -> None:
    vectors = [numbers(4, 8, seed=seed) for seed in range(3)]
    scores = similarity_score(vectors[0], torch.cat(vectors[1:]), temperature=0.05)
    nothing = torch.zeros(4, 4, dtype=torch.bool)
    outcome = in_batch_loss(scores, nothing, torch.zeros(4, dtype=torch.bool), neutral="none")
    theirs = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=20.0)  # type: ignore[arg-type]
    expected = theirs.compute_loss_from_embeddings(vectors, torch.empty(0))
    assert float(outcome.loss) == pytest.approx(float(expected), abs=1e-6)
    cosines = [torch.nn.functional.cosine_similarity(vectors[0], other) for other in vectors[1:]]
    torch.testing.assert_close(outcome.margins, 20 * (cosines[0] - cosines[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("neutral", ["none", "negative", "second"])
def test_in_batch_loss_ignores_equal_premises_and_missing_neutrals(neutral: str) -> None:
    """Hypotheses of an equal premise, and the neutral sentences that rows do not have."""
    rows = 4
    scores = numbers(rows, (2 if neutral == "none" else 3) * rows)
    premises, known = ["a", "b", "a", "c"], [True, True, False, False]
    same = torch.tensor([[p == q and i != j for j, q in enumerate(premises)] for i, p in enumerate(premises)])
    outcome = in_batch_loss(scores, same, torch.tensor(known), neutral=neutral)
    expected = 0.0
    for row in range(rows):
        equal = {0: 2, 2: 0}.get(row)
        absent = [] if equal is None else list(range(equal, scores.shape[1], rows))
        absent += [] if neutral == "none" else [2 * rows + 2, 2 * rows + 3]
        ranking = [row, 2 * rows + row] if neutral == "second" and known[row] else [row]
        expected -= math.log(ranking_probability(scores[row].tolist(), ranking, absent)) / rows
    assert float(outcome.loss) == pytest.approx(expected, abs=1e-5)


def test_retrieval_loss_of_cosines_is_sentence_transformers_loss_of_either_direction() -> None:
    premises, entailed, contradicted = (numbers(4, 8, seed=seed) for seed in range(3))
    everything = torch.cat([premises, entailed, contradicted])
    scores = similarity_score(everything[:8], everything, temperature=0.05)
    nothing = torch.zeros(4, 4, dtype=torch.bool)
    outcome = retrieval_loss(scores, torch.arange(12), nothing, nothing[0], neutral="none")
    theirs = MultipleNegativesRankingLoss(
        torch.nn.Identity(),  # type: ignore[arg-type]
        scale=20.0,
        directions=("query_to_doc", "query_to_query"),
    )
    expected = [
        theirs.compute_loss_from_embeddings([*pair, contradicted], torch.empty(0))
        for pair in ([premises, entailed], [entailed, premises])
    ]
    assert float(outcome.loss) == pytest.approx(float(sum(expected)) / 2, abs=1e-6)
    cosines = [torch.nn.functional.cosine_similarity(premises, other) for other in (entailed, contradicted)]
    torch.testing.assert_close(outcome.margins, 20 * (cosines[0] - cosines[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("roles", "neutral"), [(2, "none"), (3, "none"), (4, "negative"), (4, "second")])
def test_retrieval_loss_leaves_out_repetitions_and_sentences_of_equal_premises(roles: int, neutral: str) -> None:
    texts = [list("xyxz"), list("aabc"), list("defa"), list("ghij")][:roles]  # by role, then by triplet
    flat = [text for role in texts for text in role]
    known = [True, False, True, True]
    scores = numbers(8, len(flat))
    same = torch.tensor([[p == q and i != j for j, q in enumerate(texts[0])] for i, p in enumerate(texts[0])])
    numbers_of = torch.tensor([flat.index(text) for text in flat])
    outcome = retrieval_loss(scores, numbers_of, same, torch.tensor(known), neutral=neutral)
    expected = 0.0
    for row in range(8):
        index, partner = row % 4, (row + 4) % 8
        absent = [
            column
            for column, text in enumerate(flat)
            if column != partner
            and (
                text in (flat[row], flat[partner])
                or (column % 4 != index and texts[0][column % 4] == texts[0][index])
                or (column >= 12 and not known[column % 4])
            )
        ]
        ranking = [partner, 12 + index] if neutral == "second" and known[index] else [partner]
        expected -= math.log(ranking_probability(scores[row].tolist(), ranking, absent)) / 8
    assert float(outcome.loss) == pytest.approx(expected, abs=1e-5)
    if roles == 2:
        assert outcome.margins[3] == pytest.approx(float(scores[3, 7] - scores[3, [0, 1, 2, 4, 5, 6]].max()))
    else:
        assert outcome.margins[3] == pytest.approx(float(scores[3, 7] - scores[3, 11]))


def test_reference_kl_is_torchs_divergence() -> None:
    policy, reference = numbers(5, 30, seed=1), numbers(5, 30, seed=2)
    logs = policy.log_softmax(-1), reference.log_softmax(-1)
    expected = torch.nn.functional.kl_div(*logs, log_target=True, reduction="batchmean")
    assert float(reference_kl(policy, reference)) == pytest.approx(float(expected), abs=1e-5)
    assert float(reference_kl(policy + 3, policy)) == pytest.approx(0, abs=1e-6)


def test_pairs_alone_are_compared_with_the_other_pairs_of_a_batch() -> None:
    """With the loss and gradients of sentence-transformers' own, as far as premises differ."""
    scores = numbers(4, 4).requires_grad_()
    same = torch.zeros(4, 4, dtype=torch.bool)
    outcome = in_batch_loss(scores, same, torch.zeros(4, dtype=torch.bool), neutral="none")
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(4))
    torch.testing.assert_close(outcome.loss, expected)
    gradients = [torch.autograd.grad(loss, scores)[0] for loss in (outcome.loss, expected)]
    torch.testing.assert_close(*gradients)
    for row, margin in enumerate(outcome.margins.tolist()):
        others = [float(scores[row, column].detach()) for column in range(4) if column != row]
        assert margin == pytest.approx(float(scores[row, row].detach()) - max(others))
    same[0, 1] = same[1, 0] = True
    left = [[0, 2, 3], [1, 2, 3]]
    first_two = in_batch_loss(scores[:2, :2], same[:2, :2], torch.zeros(2, dtype=torch.bool), neutral="none")
    assert (float(first_two.loss.detach()), first_two.margins.tolist()) == (0.0, [0.0, 0.0])  # nothing to compare with
    masked = in_batch_loss(scores, same, torch.zeros(4, dtype=torch.bool), neutral="none")
    by_hand = [torch.logsumexp(scores[row, left[row]], 0) - scores[row, row] for row in (0, 1)]
    by_hand += [torch.logsumexp(scores[row], 0) - scores[row, row] for row in (2, 3)]
    torch.testing.assert_close(masked.loss, torch.stack(by_hand).mean())


def test_similarities_of_bfloat16_are_computed_in_float32() -> None:
    """Of vectors that are all alike, as early in training, half of the pairs would have equal scores."""
    common = numbers(1, 64, seed=3)
    first, second = (common + 0.2 * numbers(8, 64, seed=seed) for seed in (1, 2))
    found = similarity_score(first.bfloat16(), second.bfloat16(), 0.05)
    rows, columns = (side.bfloat16().double() for side in (first, second))
    expected = torch.nn.functional.cosine_similarity(rows[:, None], columns[None], dim=-1) / 0.05
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-4)
