from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny import make_config, make_llama, make_tokenizer, sample_sentences

from sempa_st.data.nli import load_nli
from sempa_st.data.passages import Passages, read_passages
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.model.tokenizer import install_template
from sempa_st.training.collator import make_batch_makers

pytestmark = pytest.mark.names_dtype


def make_module() -> PromptEOL:
    embedder = make_tokenizer()
    install_template(embedder, EMBEDDING_TEMPLATES["prompteol"])
    return PromptEOL(make_llama(), embedder)


@pytest.mark.parametrize(("positions", "wanted"), [(96, 1), (129, 2), (600, 5)])
def test_plain_batches_are_passages_or_premises(tiny_base: Path, tmp_path: Path, positions: int, wanted: int) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sample_sentences()[:120]), encoding="utf-8")
    config = make_config(tiny_base, tmp_path / "model", objective="contrastive", kl=1.0, kl_positions=positions)
    tokenizer, data, module = make_tokenizer(), load_nli("sample"), make_module()

    def plain_ids(indices: list[int], passages: Passages | None) -> torch.Tensor:
        makers = make_batch_makers(config, data, tokenizer, module, "base", passages)
        made = [maker(indices, [data.triplets[index] for index in indices]) for maker in makers]
        return next(batch["kl_input_ids"] for batch in made if "kl_mask" in batch)

    passages = read_passages(str(text), tokenizer)
    count = len(passages.token_ids)
    assert plain_ids([0, 3, 5], passages).tolist() == [passages.token_ids[number % count] for number in range(wanted)]
    firsts = {tuple(plain_ids([index], passages)[0].tolist()) for index in range(len(data.triplets))}
    assert firsts == {tuple(row) for row in passages.token_ids}
    premises = plain_ids([7, 3, 5], None)
    assert len(premises) == 3 and tokenizer.decode(premises[1], skip_special_tokens=True) == data.triplets[3].premise


@pytest.mark.parametrize("positions", [1, 20, 45, 10_000])
def test_sentences_under_the_template_hold_the_positions_that_the_kl_term_samples(
    tiny_base: Path, tmp_path: Path, positions: int
) -> None:
    settings = {"objective": "contrastive", "kl": 1.0, "kl_text": "template", "kl_positions": positions}
    config = make_config(tiny_base, tmp_path / "model", **settings)
    data, module = load_nli("sample"), make_module()
    triplets = data.triplets[:3]
    batch = make_batch_makers(config, data, make_tokenizer(), module, "base")[-1](range(3), triplets)
    ids, mask = batch["kl_input_ids"], batch["kl_mask"]
    sentences = [text for t in triplets for text in (t.premise, t.entailed, t.contradicted)]
    # The position before a token predicts it: each sampled one predicts a token of the sentence, and one predicts the
    # first token after it.
    predicted = [row[1:][own[:-1]].tolist() for row, own in zip(ids, mask, strict=True)]
    assert all(sentence in module.tokenizer.decode(row) for sentence, row in zip(sentences, predicted, strict=False))
    alone = [len(row) - len(module.token_rows(["A"])[0]) + 1 for row in module.token_rows(sentences[: len(ids)])]
    assert all(abs(len(row) - 1 - count) <= 1 for row, count in zip(predicted, alone, strict=True))
    assert int(mask.sum()) >= positions or len(ids) == len(sentences)
    assert int(mask[:-1].sum()) < positions
