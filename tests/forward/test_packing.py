"""Packed sequences equal sequences run one at a time: hidden states and gradients, on many architectures."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Event, get_ident
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.families import FAMILIES, make_causal_lm
from helpers.tiny import make_llama, make_tokenizer
from sentence_transformers import SentenceTransformer
from transformers import CONFIG_MAPPING

from sempa_st.forward import packing
from sempa_st.forward.batching import min_batch_characters
from sempa_st.forward.bin_packing import fill_packs
from sempa_st.forward.embed import embed_rows_fast
from sempa_st.forward.last_layer import last_layer_only_at
from sempa_st.forward.packing import can_pack, last_states_packed, states_packed
from sempa_st.forward.sentence_transformers import SentenceTransformer as Reordering
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.model.tokenizer import install_template

pytestmark = [pytest.mark.names_dtype, pytest.mark.usefixtures("prefix_pass")]


def make_decoder(family: str, **changes: Any) -> Any:
    return make_causal_lm(family, **changes).base_model


def make_module() -> PromptEOL:
    tokenizer = make_tokenizer()
    install_template(tokenizer, EMBEDDING_TEMPLATES["prompteol"])
    return PromptEOL(make_llama(), tokenizer).eval()


def note_batches(module: Any, seen: list[list[str]]) -> None:
    original = module.preprocess

    def preprocess(inputs: list[str], *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs)
        return original(inputs, *args, **kwargs)

    module.preprocess = preprocess


def make_rows(lengths: list[int], shared: int, group: int = 1, begin: int = 0) -> list[torch.Tensor]:
    """Make sequences with a prefix that all share, and a longer one that each group shares."""
    generator = torch.Generator().manual_seed(1)

    def draw(number: int) -> torch.Tensor:
        return torch.randint(3, 600, (number,), generator=generator)

    first, rows = draw(shared), []
    for start in range(0, len(lengths), group):
        same = draw(begin)
        rows += [torch.cat([first, same, draw(length)]) for length in lengths[start : start + group]]
    return rows


def check_gradients(decoder: Any, found: torch.Tensor, expected: torch.Tensor) -> None:
    gradients = []
    for total in (found, expected):
        decoder.zero_grad()
        total.backward()
        gradients.append({name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None})
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in gradients[1].values())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def check_last(decoder: Any, rows: list[torch.Tensor]) -> None:
    """Compare the last tokens' hidden states, for which the last layer runs at these tokens only."""
    together = last_states_packed(decoder, rows)
    alone = torch.stack([decoder(input_ids=row[None], use_cache=False).last_hidden_state[0, -1] for row in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    direction = torch.randn(alone.shape, generator=torch.Generator().manual_seed(2))
    check_gradients(decoder, (together * direction).mean(), (alone * direction).mean())


def check_equal(decoder: Any, rows: list[torch.Tensor]) -> None:
    assert can_pack(decoder, max(len(row) for row in rows))
    packed = states_packed(decoder, rows)
    together = [packed.states[places] for places in packed.indices]
    alone = [decoder(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows]
    directions = [torch.randn(states.shape, generator=torch.Generator().manual_seed(2)) for states in alone]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    totals = [
        torch.stack([(states * way).mean() for states, way in zip(found, directions, strict=True)]).sum()
        for found in (together, alone)
    ]
    check_gradients(decoder, *totals)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])  # GPT-2 has its layers by another name
@pytest.mark.parametrize("shared", [0, 4])
def test_packed_sequences_equal_sequences_alone(family: str, shared: int) -> None:
    rows = make_rows([40, 3, 1, 22, 30, 8, 9, 51, 12], shared)
    check_equal(make_decoder(family), rows)
    check_last(make_decoder(family), rows)


def test_the_last_states_of_one_sequence_and_after_a_projection() -> None:
    check_last(make_decoder("llama"), make_rows([7], 0))
    check_last(make_decoder("opt", word_embed_proj_dim=16), make_rows([9, 4, 30], 4))


def test_a_last_layer_with_positional_arguments_runs_whole() -> None:
    layer = make_decoder("gpt2").h[0]
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    whole = layer(states, None)
    with last_layer_only_at(layer, torch.tensor([[4], [1]])):
        found = layer(states, None)
    states_of = [output[0] if isinstance(output, tuple) else output for output in (whole, found)]
    torch.testing.assert_close(states_of[1], states_of[0][[0, 1], [4, 1]][:, None], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["beam", "hrm_text"])
def test_a_last_layer_that_has_more_arguments_or_runs_again_runs_whole(family: str) -> None:
    """BEAM gives its layers a scale for each query; HRM-Text runs its layers several times."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    decoder, rows = make_decoder(family), make_rows([40, 3, 1, 22, 30], 4)
    assert can_pack(decoder, 44)
    with torch.no_grad():
        alone = torch.stack([decoder(input_ids=row[None], use_cache=False).last_hidden_state[0, -1] for row in rows])
        torch.testing.assert_close(last_states_packed(decoder, rows), alone, rtol=1e-4, atol=1e-4)
    assert torch.pdist(alone).min() > 0.1


def test_layers_of_another_kind_are_not_packed() -> None:
    decoder = make_decoder("qwen3")
    assert can_pack(decoder, 10)
    decoder.config.layer_types = ["full_attention", "conv", "full_attention"]
    assert not can_pack(decoder, 10)


def test_an_error_leaves_the_last_layer_as_it_was() -> None:
    decoder, rows = make_decoder("llama"), make_rows([9, 4], 4)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = decoder.layers[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        last_states_packed(decoder, rows)
    handle.remove()
    check_last(decoder, rows)
    check_equal(decoder, rows)


def test_two_threads_may_embed_with_one_model() -> None:
    """The second begins within the pass of the first and ends after it."""
    module = make_module()
    batches = [module.preprocess(texts) for texts in (["A cat sleeps", "Snow"], ["Is it red?", "Two", "dogs run"])]
    with torch.no_grad():
        expected = [embed_rows_fast(module, **batch) for batch in batches]
        inside, done = Event(), Event()
        first, calls, started = get_ident(), Counter[int](), list[Any]()
        with ThreadPoolExecutor(1) as pool:

            def meet(*_: Any) -> None:
                calls[get_ident()] += 1
                if calls[get_ident()] != 2:  # the shared prefix's pass, or the one after both
                    return
                if get_ident() == first:
                    started.append(pool.submit(torch.no_grad()(embed_rows_fast), module, **batches[1]))
                    inside.wait(0.5)
                else:
                    inside.set()
                    done.wait(5)

            handle = module.decoder.get_submodule("layers.1").register_forward_pre_hook(meet)
            found = embed_rows_fast(module, **batches[0])
            done.set()
            other = started[0].result()
            handle.remove()
        again = embed_rows_fast(module, **batches[0])
    torch.testing.assert_close([found, other, again], [*expected, expected[0]], rtol=0, atol=1e-6)


def test_the_last_layer_runs_for_the_pooled_tokens_only() -> None:
    decoder = make_llama().base_model
    seen: dict[str, list[int]] = {"q_proj": [], "k_proj": [], "down_proj": []}
    for number in (1, 2):
        for name, module in decoder.layers[number].named_modules():
            if (short := name.split(".")[-1]) in seen:
                module.register_forward_pre_hook(
                    lambda _, inputs, short=short: seen[short].append(inputs[0].shape[:2].numel())
                )
    last_states_packed(decoder, make_rows([6, 6, 6, 6], 5))
    # Layer 1: the shared prefix, then all tokens. Layer 2: the prefix, all up to the attention, four last tokens.
    assert seen["down_proj"] == [5, 5, 24, 4]
    assert seen["q_proj"] == [5, 5, 24, 24, 4]
    assert decoder.layers[2].forward.__func__ is type(decoder.layers[2]).forward


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", [0, 4])
def test_packed_groups_equal_sequences_alone(family: str, shared: int) -> None:
    """Answers to one request, whose tokens run once; one answer has a single token."""
    check_equal(make_decoder(family), make_rows([5, 9, 1, 12, 3, 3, 8, 30, 20], shared, group=3, begin=6))


def test_the_attention_of_the_model_may_be_eager() -> None:
    decoder = make_decoder("llama", attn_implementation="eager")
    assert decoder.config._attn_implementation == "eager"
    check_equal(decoder, make_rows([9, 4, 30], 4))


def test_gradient_checkpointing_keeps_no_cache_and_packs_all_the_same() -> None:
    decoder = make_decoder("llama")
    decoder.gradient_checkpointing_enable()
    decoder.train()
    check_equal(decoder, make_rows([9, 4, 30, 7], 4, group=2, begin=3))
    check_last(decoder, make_rows([9, 4, 30, 7], 4))


def test_sequences_longer_than_the_sliding_window_are_not_packed() -> None:
    decoder = make_decoder("gemma3_text")
    assert can_pack(decoder, 64)
    assert not can_pack(decoder, 65)


@pytest.mark.parametrize("some_shared", [False, True])
def test_packs_hold_everything_once_and_leave_little_room(some_shared: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [int(size) for size in torch.randint(4, 60, (96,), generator=generator)]
    shared = [0, *(int(torch.randint(min(pair), (1,), generator=generator)) // 3 for pair in pairwise(sizes))]
    shared = [some_shared * tokens for tokens in shared]
    packs, width = fill_packs(sizes, shared)
    assert sorted(row for pack in packs for row, _ in pack) == list(range(96))
    for pack in packs:
        assert pack == sorted(pack)
        assert pack[0][1] == 0
        assert all(same == min(shared[one + 1 : two + 1]) for (one, _), (two, same) in pairwise(pack))
    assert max(sum(sizes[row] - same for row, same in pack) for pack in packs) == width
    assert len(packs) * width < 1.05 * sum(sizes)


def test_sequences_that_share_prefixes_of_every_length_equal_sequences_alone() -> None:
    """A prefix tree: some sequences are prefixes of others, some differ at their first token, two are equal."""
    first, rows = torch.arange(10, 40), []
    for cut, rest in ((30, 0), (12, 0), (12, 9), (12, 3), (20, 5), (20, 1), (3, 4), (0, 6), (0, 1), (20, 5)):
        rows.append(torch.cat([first[:cut], torch.arange(50 * len(rows) + 50, 50 * len(rows) + 50 + rest)]))
    rows[9] = rows[4]
    for prefix in (torch.arange(3), torch.arange(0)):
        for family in ("llama", "gemma3_text", "opt"):
            decoder = make_decoder(family)
            assert not decoder.training
            check_equal(decoder, [torch.cat([prefix, row]) for row in rows])
            check_last(decoder, [torch.cat([prefix, row]) for row in rows])


def test_a_shared_prefix_runs_once() -> None:
    """Three answers to each of four requests: the shared prefix runs once, each request once."""
    decoder = make_llama().base_model
    seen: list[int] = []
    decoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2].numel()))
    rows = make_rows([6] * 12, 5, group=3, begin=20)
    states_packed(decoder, rows)
    assert seen == [5, 4 * (20 + 18)]
    assert sum(len(row) for row in rows) == 12 * 31


def test_a_shared_prefix_runs_first_if_that_saves_more_than_a_pass(
    prefix_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_PASS", prefix_pass)
    decoder = make_llama().base_model
    seen: list[tuple[int, ...]] = []
    decoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    last_states_packed(decoder, make_rows([9], 5))
    assert seen == [(1, 14)]  # one sequence, one pass
    check_equal(decoder, make_rows([40, 3, 1, 22, 30, 8, 9, 51, 12], 4))
    assert (1, 4) not in seen
    seen.clear()
    check_last(decoder, make_rows([60] * 8, 80))
    assert seen[0] == (1, 80)  # before several packs


def test_equal_sequences_run_once_except_in_training() -> None:
    module = make_module()
    seen: list[int] = []
    module.decoder.get_submodule("layers.0").register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[:2].numel())
    )
    once, twice = (module.preprocess(texts) for texts in (["A cat sleeps", "Snow"], ["Snow", "A cat sleeps", "Snow"]))
    with torch.no_grad():
        expected = embed_rows_fast(module.eval(), once["input_ids"], once["attention_mask"])
        found = embed_rows_fast(module, twice["input_ids"], twice["attention_mask"])
        embed_rows_fast(module.train(), twice["input_ids"], twice["attention_mask"])
    torch.testing.assert_close(found, expected[[1, 0, 1]], rtol=0, atol=1e-5)
    first, second, third = seen[1::2]
    assert first == second < third


def test_batches_hold_texts_that_begin_alike_and_vectors_come_in_the_order_of_the_texts() -> None:
    """Against sentence-transformers' own class around the same module, which sorts by length."""
    module = make_module()
    module.forward_rows = embed_rows_fast
    starts, ends = ["A cat sleeps", "The dog runs", "Snow"], ["", " here", " and there", " in the red house"]
    texts = [f"{start}{end}" for end in ends for start in starts] * 2 + ["Is it red? " * 40]
    reordering, plain = Reordering(modules=[module], device="cpu"), SentenceTransformer(modules=[module], device="cpu")
    seen: list[list[str]] = []
    note_batches(module, seen)
    for options in ({}, {"convert_to_tensor": True}, {"convert_to_numpy": False}, {"normalize_embeddings": True}):
        found, expected = (model.encode(texts, batch_size=1, **options) for model in (reordering, plain))
        assert type(found) is type(expected)
        torch.testing.assert_close(list(found), list(expected), rtol=0, atol=1e-5)
    first, second, third = seen[:3]
    assert first == texts[-1:]
    assert sorted(second + third) == sorted(texts[:-1])
    assert min(second) >= max(third)
    assert sum(map(len, second[:-1])) < 256 <= sum(map(len, second))
    assert reordering.encode("Snow").shape == (32,)


def test_texts_that_run_padded_stay_sorted_by_length() -> None:
    model = Reordering(modules=[make_module()], device="cpu")  # it runs padded batches
    seen: list[list[str]] = []
    note_batches(model[0], seen)
    model.encode(["A cat", "A cat sleeps in the snow", "The dog", "The dog runs in the snow"], batch_size=2)
    assert sorted(seen[0]) == ["A cat sleeps in the snow", "The dog runs in the snow"]


@pytest.mark.parametrize(
    ("device", "size", "expected"),
    [("cpu", 32, 8192), ("cuda", 32, 32_768), ("cuda:1", 64, 65_536), ("cuda", 128, 65_536), ("cuda", 512, 131_072)],
)
def test_a_gpu_gets_batches_that_keep_it_busy_and_no_larger_ones(device: str, size: int, expected: int) -> None:
    model: Any = SimpleNamespace(device=torch.device(device), max_seq_length=512)
    assert min_batch_characters(model, size) == expected
