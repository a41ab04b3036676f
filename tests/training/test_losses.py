from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.tiny import CHAT_TEMPLATE, add_random_adapter, make_gemma, make_llama, make_tokenizer, randomise
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from sempa_st.data.nli import Triplet, load_nli
from sempa_st.data.preferences import DEFAULT_PARAPHRASE, preference_rows, ranked_answers
from sempa_st.errors import SempaError
from sempa_st.forward.batching import batches_within_tokens
from sempa_st.model.adapter import lora_config
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.model.tokenizer import install_template
from sempa_st.training.batches import AnswerRows, ReadingRows
from sempa_st.training.config import parse_objective
from sempa_st.training.forward import answer_log_probabilities, shared_states, word_logits
from sempa_st.training.losses import (
    in_batch_loss,
    one_word_loss,
    plackett_luce_loss,
    ranked_answers_loss,
    reference_kl,
    similarity_score,
    word_score,
)
from sempa_st.training.reference import collect
from sempa_st.training.word_bags import (
    STOP_WORDS,
    WordBags,
    bag_matrix,
    content_words,
    document_frequencies,
    without_shared,
)

pytestmark = pytest.mark.names_dtype

TRIPLETS = load_nli("sample").triplets[:8]


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


def test_the_loss_of_a_ranking_by_hand() -> None:
    scores = torch.log(torch.tensor([[1.0, 2.0, 5.0], [3.0, 3.0, 4.0]]))
    assert plackett_luce_loss(scores, torch.tensor([[2], [0]])) == pytest.approx(-math.log(5 / 8 * 3 / 10) / 2)
    whole = plackett_luce_loss(scores, torch.tensor([[2, 0, 1], [0, 2, 1]]))
    assert whole == pytest.approx(-math.log(5 / 8 * 1 / 3 * 3 / 10 * 4 / 7) / 2)


@pytest.mark.parametrize("ranked", [1, 2, 4])
def test_the_loss_is_that_of_drawing_one_candidate_after_another(ranked: int) -> None:
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


@pytest.fixture(scope="module", params=["chat", "text"])
def trls(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[DPOTrainer, Any]:
    """TRL's trainer with a random adapter on a tiny Llama that chats, and on a tiny Gemma that does not."""
    model = make_llama() if request.param == "chat" else make_gemma()
    tokenizer = make_tokenizer(chat=CHAT_TEMPLATE if request.param == "chat" else None)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            per_device_train_batch_size=len(TRIPLETS),
            use_cpu=True,
            bf16=False,
            report_to="none",
            beta=0.1,
        ),
        train_dataset=Dataset.from_list(preference_rows(TRIPLETS, tokenizer, paraphrase=DEFAULT_PARAPHRASE)),
        processing_class=tokenizer,
        peft_config=lora_config(model),
    )
    randomise(trainer.model)
    # In float64, so that the formula is compared: a sum of twenty float32 log-probabilities rounds by more than 1e-6.
    trainer.model.double().eval()
    return trainer, tokenizer


def answers_of(tokenizer: Any, triplets: Sequence[Triplet], answers: int, max_length: int = 1024) -> dict[str, Tensor]:
    rows = ranked_answers(triplets, tokenizer, paraphrase=DEFAULT_PARAPHRASE)
    return AnswerRows(tokenizer, rows, answers, max_length)(range(len(triplets)))


def test_answers_are_tokenised_as_trl_does(trls: tuple[DPOTrainer, Any]) -> None:
    trainer, tokenizer = trls
    batch = answers_of(tokenizer, TRIPLETS, 2)
    rows = [
        ids[mask.bool()] for ids, mask in zip(batch["answer_input_ids"], batch["answer_attention_mask"], strict=True)
    ]
    starts = batch["answer"].int().argmax(dim=1).tolist()
    split = [(ids[:start].tolist(), ids[start:].tolist()) for ids, start in zip(rows, starts, strict=True)]
    for index, (chosen, rejected) in enumerate(zip(split[::2], split[1::2], strict=True)):
        expected = trainer.train_dataset[index]
        assert chosen == (expected["prompt_ids"], expected["chosen_ids"])
        assert rejected == (expected["prompt_ids"], expected["rejected_ids"])


@pytest.mark.parametrize("cut", [0, 6])
def test_two_answers_give_trls_dpo_loss(
    trls: tuple[DPOTrainer, Any], monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    trainer, tokenizer = trls
    longest = answers_of(tokenizer, TRIPLETS, 2)["answer_input_ids"].shape[1]
    monkeypatch.setattr(trainer.data_collator, "max_length", longest - cut)
    batch = answers_of(tokenizer, TRIPLETS, 2, longest - cut)
    causal_lm = trainer.model.get_base_model()
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        policy = answer_log_probabilities(causal_lm, batch).view(-1, 2)
        with trainer.model.disable_adapter():
            reference = answer_log_probabilities(causal_lm, batch).view(-1, 2)
    outcome = ranked_answers_loss(policy, reference, batch["answers"], beta=0.1)
    assert abs(float(expected) - math.log(2)) > 1e-3  # the adapter says something
    assert float(outcome.loss) == pytest.approx(float(expected), abs=1e-6)
    chosen, rejected = (policy - reference).unbind(1)
    torch.testing.assert_close(outcome.margins, 0.1 * (chosen - rejected), rtol=0, atol=1e-5)


def test_log_probabilities_of_answers_token_by_token() -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    batch = answers_of(tokenizer, TRIPLETS[:3], 2)
    with torch.no_grad():
        actual = answer_log_probabilities(model, batch)
        for row, ids in enumerate(batch["answer_input_ids"]):
            length = int(batch["answer_attention_mask"][row].sum())
            logits = model(ids[None, :length]).logits[0].log_softmax(-1)
            places = [place for place in range(length) if batch["answer"][row, place]]
            total = sum(float(logits[place - 1, ids[place]]) for place in places)
            assert float(actual[row]) == pytest.approx(total, abs=1e-3)
            assert places[-1] == length - 1


@pytest.mark.parametrize("cut", [0, 20])
def test_a_request_run_once_has_the_gradients_of_one_run_per_answer(cut: int) -> None:
    """Layers that are run again for their gradients keep no cache, so with them every answer runs its own request."""
    tokenizer = make_tokenizer()
    model: Any = add_random_adapter(make_llama())
    causal_lm = model.get_base_model()
    batch = answers_of(tokenizer, [replace(triplet, neutral="A short one.") for triplet in TRIPLETS], 3)
    if cut:
        batch = answers_of(tokenizer, TRIPLETS, 3, batch["answer_input_ids"].shape[1] - cut)
    found = []
    for again in (False, True):
        if again:
            causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        log_probabilities = answer_log_probabilities(causal_lm, batch)
        (log_probabilities / 100).square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        found.append((log_probabilities.detach(), gradients))
    (shared, shared_gradients), (whole, gradients) = found
    torch.testing.assert_close(shared, whole, rtol=1e-6, atol=1e-5)
    assert all("lora_" in name for name in gradients)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients.values())
    torch.testing.assert_close(shared_gradients, gradients, rtol=1e-3, atol=1e-5)


def test_groups_that_share_nothing_are_run_as_they_are() -> None:
    decoder = make_llama().base_model
    ids = torch.tensor([[5, 6, 7], [5, 6, 8], [9, 6, 7], [4, 6, 7]])
    with torch.no_grad():
        expected = decoder(input_ids=ids).last_hidden_state
        for rows in ([0, 1], [2, 3], [0, 1, 2, 3]):
            found = shared_states(decoder, ids[rows], torch.ones_like(ids[rows]))
            torch.testing.assert_close(found, expected[rows], rtol=0, atol=1e-5)


def test_three_ranked_answers_and_rows_that_have_two() -> None:
    triplets = [Triplet("A cat sleeps.", "A cat rests.", "A cat runs.", neutral) for neutral in ("A big cat.", None)]
    batch = answers_of(make_tokenizer(), triplets, 3)
    assert batch["answers"].tolist() == [3, 2]
    policy, reference = numbers(2, 3, seed=1), numbers(2, 3, seed=2)
    outcome = ranked_answers_loss(policy, reference, batch["answers"], beta=0.5)
    scores = (0.5 * (policy - reference)).tolist()
    expected = ranking_probability(scores[0], (0, 1, 2)) * ranking_probability(scores[1], (0, 1), (2,))
    assert float(outcome.loss) == pytest.approx(-math.log(expected) / 2, abs=1e-6)
    assert outcome.margins.tolist() == pytest.approx([scores[0][0] - scores[0][2], scores[1][0] - scores[1][1]])


@pytest.mark.parametrize("kind", ["plain", "bias", "soft cap"])
def test_logits_of_some_words_are_the_models(kind: str) -> None:
    model = make_gemma() if kind == "soft cap" else make_llama()
    if kind == "soft cap":
        model.config.final_logit_softcapping = 3.0
    if kind == "bias":
        model.lm_head.bias = torch.nn.Parameter(numbers(600))
    ids, words = torch.tensor([[1, 7, 30], [1, 99, 4]]), torch.tensor([5, 17, 400])
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        states = model.model(ids).last_hidden_state[:, -1]
        torch.testing.assert_close(word_logits(model, states, words), expected[:, words], rtol=0, atol=1e-5)
    assert kind != "soft cap" or expected.abs().max() < 3


def random_bags(count: int, vocabulary: int, seed: int = 3) -> list[dict[int, float]]:
    draw = torch.Generator().manual_seed(seed)
    picks = [torch.randperm(vocabulary, generator=draw)[:4].tolist() for _ in range(count)]
    return [{token: (index + 1) / 10 for index, token in enumerate(pick)} for pick in picks]


def test_the_word_score_is_the_one_of_the_whole_vocabulary() -> None:
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


def test_the_in_batch_choice_of_cosines_is_sentence_transformers_loss() -> None:
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
def test_in_batch_choices_leave_out_what_is_no_negative(neutral: str) -> None:
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


def test_the_reference_term_is_torchs_divergence() -> None:
    policy, reference = numbers(5, 30, seed=1), numbers(5, 30, seed=2)
    logs = policy.log_softmax(-1), reference.log_softmax(-1)
    expected = torch.nn.functional.kl_div(*logs, log_target=True, reduction="batchmean")
    assert float(reference_kl(policy, reference)) == pytest.approx(float(expected), abs=1e-5)
    assert float(reference_kl(policy + 3, policy)) == pytest.approx(0, abs=1e-6)


def test_objectives_and_their_weights() -> None:
    assert parse_objective("one-word") == {"one-word": 1.0}
    assert list(parse_objective("one-word-listwise:1.0, dpo:0.3").items()) == [("one-word-listwise", 1.0), ("dpo", 0.3)]
    for text, message in {
        "dop": "Unknown objective 'dop'",
        "": "Unknown objective ''",
        "dpo,": "Unknown objective ''",
        "dpo,one-word,dpo:2": "'dpo' stands twice",
        "dpo:0": "weight of 'dpo' is '0'",
        "dpo:-1": "Expected a number above 0",
        "dpo:nan": "Expected a number above 0",
        "dpo:inf": "Expected a number above 0",
        "dpo:much": "weight of 'dpo' is 'much'",
    }.items():
        with pytest.raises(SempaError, match=message):
            parse_objective(text)


def test_bags_of_words(tokenizer: Any) -> None:
    def first(word: str) -> int:
        return int(tokenizer(word, add_special_tokens=False)["input_ids"][0])

    sentence = "The Children slept."
    assert content_words(sentence) == ["Children", "slept"]
    assert content_words(sentence, stop_words=False) == ["The", "Children", "slept"]
    assert content_words("It's not Dário's 70% snake_case") == ["It's", "Dário's", "70", "snake", "case"]
    assert {"not", "the"} <= STOP_WORDS
    assert WordBags(tokenizer, forms="written")(sentence) == {first("Children"): 0.5, first("slept"): 0.5}
    assert WordBags(tokenizer, forms="lower")(sentence) == {first("children"): 0.5, first("slept"): 0.5}
    spellings = ["children", "Children", "slept", "Slept"]
    both: dict[int, float] = {}
    for spelling in spellings:
        both[first(spelling)] = both.get(first(spelling), 0) + 1 / len(spellings)
    assert WordBags(tokenizer)(sentence) == pytest.approx(both)
    ids = tokenizer("Children", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    assert first("slept") not in ids
    whole = WordBags(tokenizer, forms="written", tokens="all")("Children slept")
    assert [whole[token] for token in ids] == pytest.approx([0.5 / len(ids)] * len(ids))  # a word's tokens share
    kept = WordBags(tokenizer, forms="written", stop_words=False)("the of")
    assert kept == WordBags(tokenizer, forms="written")("the of")  # nothing else is left of it
    assert set(kept) == {first("the"), first("of")}
    assert WordBags(tokenizer)("?!") == {first("?!"): 1.0}
    for settings in itertools.product(("first", "all"), ("written", "lower", "both"), (True, False)):
        bagger = WordBags(tokenizer, **dict(zip(("tokens", "forms", "stop_words"), settings, strict=True)))
        for triplet in TRIPLETS:
            assert sum(bagger(triplet.entailed).values()) == pytest.approx(1)


def test_rare_words_weigh_more_with_idf(tokenizer: Any) -> None:
    sentences = ["A cat sleeps", "The Cat sat: cat!", "dogs bark"]
    counts = document_frequencies(sentences)
    assert (counts["cat"], counts["the"], counts["dogs"], counts["bird"]) == (2, 1, 1, 0)
    bag = WordBags(tokenizer, forms="lower", frequencies=counts, sentences=3)("cat dogs bird")
    weights = [math.log(1 + 3 / (1 + count)) for count in (2, 1, 0)]
    firsts = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("cat", "dogs", "bird")]
    assert bag == pytest.approx({token: w / sum(weights) for token, w in zip(firsts, weights, strict=True)})


def test_shared_words_tell_nothing_apart() -> None:
    assert without_shared({1: 0.5, 2: 0.25, 3: 0.25}, {1: 0.2, 4: 0.8}) == ({2: 0.5, 3: 0.5}, {4: 1.0})
    assert without_shared({1: 1.0}, {1: 0.5, 2: 0.5}) == ({1: 1.0}, {2: 1.0})


def test_the_rows_of_a_batch_hold_what_their_names_say() -> None:
    tokenizer = make_tokenizer()
    install_template(tokenizer, EMBEDDING_TEMPLATES["prompteol"])
    module = PromptEOL(make_llama(), tokenizer)
    triplets = [
        Triplet("A cat sleeps.", "A cat rests.", "A cat runs.", "A big cat."),
        Triplet("A dog barks.", "A dog is loud.", "A dog is silent."),
        Triplet("A cat sleeps.", "An animal sleeps.", "A cat eats."),
    ]
    bagger = WordBags(tokenizer)
    candidates = ("entailed", "contradicted", "neutral")
    rows = ReadingRows(module, ("premise", "entailed"), candidates, bagger, pairwise=True)
    batch = rows(triplets)
    assert batch["same"].int().tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert batch["neutral_known"].tolist() == [True, False, False]
    read = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert read == module.token_rows([t.premise for t in triplets] + [t.entailed for t in triplets])

    def bags(name: str) -> list[dict[int, float]]:
        return [
            {int(word): float(w) for word, w in zip(batch["words"], weights, strict=True) if w}
            for weights in batch[name]
        ]

    found = bags("bags")
    expected = [bagger(t.entailed) for t in triplets] + [bagger(t.contradicted) for t in triplets]
    assert found[:6] == [pytest.approx(bag) for bag in expected]
    assert found[6] == pytest.approx(bagger("A big cat."))
    pairs = bags("pair_bags")
    assert not any(pairs[row].keys() & pairs[3 + row].keys() for row in range(3))
    assert pairs[3] == pytest.approx(without_shared(bagger("A cat rests."), bagger("A cat runs."))[1])


def test_results_of_batches_come_back_in_order() -> None:
    lengths = [5, 1, 9, 2, 2, 30, 7]
    batches = list(batches_within_tokens(lengths, 10, "rows"))
    assert sorted(itertools.chain(*batches)) == list(range(7))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 10 for batch in batches)
    assert len(batches) < len(lengths)
    result = collect(7, iter(batches), lambda batch: torch.tensor(batch)[:, None] * 2)
    assert result.tolist() == [[2.0 * index] for index in range(7)]


def test_a_word_is_spelt_as_it_goes_on_after_a_quote() -> None:
    """Tokenizers that mark the start of a text as the start of a word would give a lone word another first token."""
    core = Tokenizer(models.WordLevel({"[UNK]": 0, '▁"': 1, "▁cat": 2, "cat": 3}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Split(Regex(r'▁?"|▁?\w+'), behavior="isolated"),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokenizer("cat")["input_ids"] == [2]
    assert WordBags(tokenizer, forms="lower")("A cat") == {3: 1.0}
