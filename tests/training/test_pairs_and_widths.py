"""Pairs alone, Matryoshka widths, frozen weights in 4 bits, and the programs that show a log."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rows import write_rows
from helpers.tiny import make_config, make_llama, make_tokenizer, save_base
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional

import sempa_st
from sempa_st.data.nli import load_nli
from sempa_st.errors import SempaError
from sempa_st.folder.layout import ModelFolder
from sempa_st.training.alignment import AlignmentTrainer
from sempa_st.training.build import build_trainer
from sempa_st.training.contrastive import ContrastiveTrainer
from sempa_st.training.run import load_inputs, train
from sempa_st.training.run_folder import RunFolder

pytestmark = pytest.mark.names_dtype

SHORT = {"max_triplets": 8, "checkpoint_samples": 8, "dev_batch_size": 128, "learning_rate": 1e-3}
WIDTHS = [32, 16, 8]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [{"question": t.premise, "answer": t.entailed} for t in load_nli("sample").triplets[:8]]
    return write_rows(tmp_path_factory.mktemp("data") / "qa.csv", rows)


@pytest.mark.parametrize("objective", ["contrastive", "one-word-listwise", "contrastive,one-word-listwise"])
def test_pairs_alone_train(
    questions: str, tiny_base: Path, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]], objective: str
) -> None:
    code, _, err = run_cli(
        "train", "--base", tiny_base, "--data", questions, "--columns", "anchor=question,positive=answer",
        "--objective", objective, "--word-weights", "idf", "--batch-size", 4, "--gradient-accumulation", 1,
        "--dev", "sample", "--device", "cpu", "--dtype", "float32", "--output", tmp_path / "m",
    )  # fmt: skip
    assert code == 0, err
    assert "qa.csv holds pairs alone: the other pairs of a batch are the negatives." in err
    record = ModelFolder(tmp_path / "m").record or {}
    assert (record["data"]["triplets"], len(record["training"])) == (8, 2)
    assert "8 pairs (SHA-256" in (tmp_path / "m" / "README.md").read_text()
    if objective == "one-word-listwise":
        assert record["training"][0]["loss"] == pytest.approx(math.log(4), abs=1e-4)
    assert all(tensor.any() for tensor in load_file(tmp_path / "m" / "adapter_model.safetensors").values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "dpo"}, r"pairs alone, .*\(negative or hard_neg\), and the objective dpo compares with one"),
        ({"objective": "contrastive,one-word"}, r"the objective one-word compares with one"),
        (
            {"objective": "contrastive", "neutral": "second"},
            r"Expected --neutral none, and a --batch-size of 2 or more",
        ),
        ({"objective": "contrastive", "batch_size": 1}, r"Expected --neutral none, and a --batch-size of 2 or more"),
    ],
)
def test_what_pairs_cannot_train_is_refused(
    questions: str, tiny_base: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    columns = "anchor=question,positive=answer"
    with pytest.raises(SempaError, match=message):
        train(make_config(tiny_base, tmp_path / "m", data=questions, columns=columns, **settings))
    assert not list(tmp_path.iterdir())


def first_batch(base: Path, output: Path, **settings: Any) -> tuple[Any, Any]:
    """Return the trainer of a run with a random adapter, and its loss on the first four triplets."""
    config = make_config(base, output, objective="contrastive", **{**SHORT, "matryoshka_dims": "8,32,16", **settings})
    trainer: Any = build_trainer(load_inputs(config, "cpu"), RunFolder(output))
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    return trainer, trainer.compute_loss(trainer.model, batch)


def test_the_loss_of_several_widths_is_their_mean_as_sentence_transformers_has_it(
    tiny_base: Path, tmp_path: Path
) -> None:
    """On both trainers, with the same gradients as its MatryoshkaLoss and as the formula."""
    ours, own_loss = first_batch(tiny_base, tmp_path / "a", device=None, device_map="auto")
    theirs, st_loss = first_batch(tiny_base, tmp_path / "b")
    assert (type(ours), type(theirs)) == (AlignmentTrainer, ContrastiveTrainer)
    triplets = load_inputs(make_config(tiny_base, tmp_path / "c", **SHORT), "cpu").data.triplets[:4]

    module = ours._module
    embedder = SentenceTransformer(modules=[module], device="cpu")
    plain = MultipleNegativesRankingLoss(embedder, scale=20)
    reference = MatryoshkaLoss(embedder, plain, WIDTHS, [1 / 3] * 3)
    sides = [[getattr(t, role) for t in triplets] for role in ("premise", "entailed", "contradicted")]
    expected = reference([module.preprocess(side) for side in sides], torch.empty(0))

    vectors = [module(module.preprocess(side))["sentence_embedding"] for side in sides]
    losses = []
    for width in WIDTHS:
        short = [functional.normalize(vector[:, :width], dim=1) for vector in vectors]
        losses.append(functional.cross_entropy(20 * short[0] @ torch.cat(short[1:]).T, torch.arange(4)))
    by_hand = torch.stack(losses).mean()
    torch.testing.assert_close(torch.stack([own_loss, st_loss, expected]), by_hand.repeat(3), rtol=0, atol=1e-5)
    assert max(losses) - min(losses) > 1e-2  # the widths differ

    adapter = [parameter for parameter in ours.model.parameters() if parameter.requires_grad]
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(x, adapter)]) for x in (own_loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_widths_are_recorded_and_checked(tiny_base: Path, tmp_path: Path) -> None:
    config = make_config(tiny_base, tmp_path / "m", objective="contrastive", matryoshka_dims="64,16", **SHORT)
    with pytest.raises(SempaError, match=r"matryoshka_dims is '64,16', and the embeddings of .* have 32 components"):
        train(config)
    objective = "contrastive:1,one-word-listwise:1"
    record = train(make_config(tiny_base, tmp_path / "m", objective=objective, matryoshka_dims="32,8", **SHORT)).record
    assert record["config"]["matryoshka_dims"] == "32,8"
    assert "| widths trained | 32,8 |" in (tmp_path / "m" / "README.md").read_text()
    short = SentenceTransformer(str(tmp_path / "m"), device="cpu", truncate_dim=8).encode("A cat sleeps.")
    assert short == pytest.approx(
        sempa_st.load(tmp_path / "m", dtype="float32", device="cpu").encode("A cat sleeps.")[:8], abs=1e-5
    )


@pytest.mark.parametrize("objective", ["dpo", "contrastive"])
def test_frozen_weights_in_4_bits(tmp_path: Path, objective: str) -> None:
    base = save_base(tmp_path / "base", make_llama(hidden=64), make_tokenizer(chat=None))
    config = make_config(base, tmp_path / "m", objective=objective, load_in_4bit=True, **SHORT)
    inputs = load_inputs(config, "cpu")
    linear: Any = inputs.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert linear.weight.dtype == torch.uint8
    assert not linear.support_avx512bf16_for_cpu  # the same numbers whatever the processor
    assert (linear.weight.quant_type, linear.quant_state.nested, linear.compute_dtype) == ("nf4", True, torch.float32)
    whole = load_inputs(make_config(base, tmp_path / "m", objective=objective, **SHORT), "cpu")
    assert inputs.start_digest != whole.start_digest  # other reference results
    exact: Any = whole.model.get_submodule("model.layers.0.self_attn.q_proj")
    inputs_of_layer = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    error = (linear(inputs_of_layer) - exact(inputs_of_layer)).norm() / exact(inputs_of_layer).norm()
    assert 0 < float(error.detach()) < 0.2
    record = train(config).record
    if objective == "dpo":
        assert record["training"][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert all(tensor.any() for tensor in load_file(tmp_path / "m" / "adapter_model.safetensors").values())
    assert sempa_st.load(tmp_path / "m", dtype="float32", device="cpu").encode("A cat").shape == (64,)


def test_layers_that_bitsandbytes_reads_wrongly_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    config = make_config(tiny_base, tmp_path / "m", objective="contrastive", load_in_4bit=True, **SHORT)
    with pytest.raises(SempaError, match=r"q_proj of the model in .* has 32 inputs"):
        load_inputs(config, "cpu")


def test_the_log_in_tensorboard_is_that_of_the_record(tiny_base: Path, tmp_path: Path) -> None:
    config = make_config(tiny_base, tmp_path / "m", objective="contrastive", report_to="tensorboard", **SHORT)
    record = train(config).record
    (folder,) = (tmp_path / "m.logs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([step["loss"] for step in record["training"]], abs=1e-6)
    scores = [event.value for event in events.Scalars("eval/dev_spearman")]
    assert scores == pytest.approx([score["spearman"] for score in record["dev"]["scores"][1:]], abs=1e-4)
    assert "report_to" not in record["config"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.logs"]
