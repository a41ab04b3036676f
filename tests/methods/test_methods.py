"""Each method against the same done slowly: row by row, layer by layer, head by head, in float32."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import naive
from helpers.families import make_causal_lm
from helpers.tiny import make_gemma, make_llama, make_tokenizer, randomise, save_base, save_random_adapter
from mteb.mocks.mock_tasks import MockSTSTask
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

import sempa_st
from sempa_st.cli.main import build_parser
from sempa_st.data.rows import read_rows
from sempa_st.errors import SempaError
from sempa_st.forward.decoder import attention_output
from sempa_st.forward.packing import last_positions, prepare_packs
from sempa_st.methods import contrastive_prompting
from sempa_st.methods.llm2vec import LLM2Vec
from sempa_st.methods.method import Batch
from sempa_st.methods.module import MethodModule
from sempa_st.methods.registry import METHODS, methods_for, parse_method
from sempa_st.model.base_model import load_causal_lm
from sempa_st.model.templates import EMBEDDING_TEMPLATES, normalize_sentence
from sempa_st.utils.assets import asset_path

pytestmark = [pytest.mark.names_dtype, pytest.mark.usefixtures("prefix_pass")]

Cli = Callable[..., tuple[int, str, str]]
SENTENCES = ["A cat sleeps", 'Is it "red"?', "Two dogs run over the wet grass after a ball.", "Snow"]
MODELS = pytest.mark.parametrize("make", [make_llama, make_gemma])


def module_of(make: Any, method: str, **settings: Any) -> MethodModule:
    return MethodModule(make(), make_tokenizer(), method, **settings)


@torch.no_grad()
def check(module: MethodModule, expected: list[Tensor]) -> None:
    """In one batch, padded, and one at a time."""
    batch = module.preprocess(SENTENCES)
    together = module(dict(batch))["sentence_embedding"]
    alone = torch.cat([module(module.preprocess([text]))["sentence_embedding"] for text in SENTENCES])
    torch.testing.assert_close(together, torch.stack(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    assert float((together[0] - together[2]).norm()) > 1e-2


def ids_of(module: MethodModule, text: str) -> list[int]:
    ids: list[int] = module.tokenizer(text)["input_ids"]
    return ids


@MODELS
@torch.no_grad()
def test_mean_pooling(make: Any) -> None:
    module = module_of(make, "mean")
    rows = [ids_of(module, normalize_sentence(text)) for text in SENTENCES]
    check(module, [naive.hidden_states(module.decoder, ids)[-1][1:].mean(dim=0) for ids in rows])


@MODELS
@torch.no_grad()
def test_last_token(make: Any) -> None:
    module = module_of(make, "last-token")
    rows = [ids_of(module, normalize_sentence(text)) for text in SENTENCES]
    check(module, [naive.hidden_states(module.decoder, ids)[-1][-1] for ids in rows])


@MODELS
@pytest.mark.parametrize(
    ("method", "template", "layer"),
    [
        ("prompteol", "prompteol", -1),
        ("prompteol:layer=-2", "prompteol", -2),
        ("pretended-cot:layer=1", "pretended-cot", 1),
        ("knowledge-enhancement", "knowledge-enhancement", -2),
    ],
)
@torch.no_grad()
def test_templates(make: Any, method: str, template: str, layer: int) -> None:
    module = module_of(make, method)
    rows = [ids_of(module, EMBEDDING_TEMPLATES[template].text(text)) for text in SENTENCES]
    check(module, [naive.hidden_states(module.decoder, ids)[layer][-1] for ids in rows])


@MODELS
@torch.no_grad()
def test_echo(make: Any) -> None:
    module = module_of(make, "echo")
    expected = []
    for text in map(normalize_sentence, SENTENCES):
        before = f"Rewrite the sentence: {text}\nThe rewritten sentence: "
        ids = ids_of(module, before + text)
        # Tokens that hold a character of the second sentence, counted by what the tokens before them decode to.
        starts = [len(module.tokenizer.decode(ids[1 : place + 1])) for place in range(1, len(ids))]
        states = naive.hidden_states(module.decoder, ids)[-1][1:]
        chosen = [state for state, end in zip(states, starts, strict=True) if end > len(before)]
        expected.append(torch.stack(chosen).mean(dim=0))
    check(module, expected)


@MODELS
@pytest.mark.parametrize("template", ["prompteol", "pretended-cot", "knowledge-enhancement"])
@torch.no_grad()
def test_token_prepending(make: Any, template: str) -> None:
    module = module_of(make, f"token-prepending:template={template}:start=1:exit=2:layer=-2")
    expected = []
    for text in SENTENCES:
        before, _, after = EMBEDDING_TEMPLATES[template].text(text).partition(":")
        start = [*ids_of(module, f"{before}:"), *ids_of(module, " ")[1:]]  # the space before the placeholder is a token
        place = len(start)
        ids = [*start, module.tokenizer.eos_token_id, *ids_of(module, after)[1:]]
        assert module.preprocess([text])["input_ids"].tolist() == [ids]

        def prepend(layer: int, states: Tensor, place: int = place) -> Tensor:
            return torch.cat([states[:place], states[-1:], states[place + 1 :]]) if layer == 1 else states

        expected.append(naive.hidden_states(module.decoder, ids, enter=prepend)[-2][-1])
    check(module, expected)


def contrasted(variant: str, a: Tensor, b: Tensor, heads: int) -> Tensor:
    if variant == "scaled":
        return 0.5 * (a - b)
    if variant == "norm":
        return (a - b) * a.norm() / (a - b).norm()
    if variant == "scaled-norm":
        return 0.5 * (a - b) * a.norm() / (a - b).norm()
    return torch.cat([(x - y) * x.norm() / (x - y).norm() for x, y in zip(a.chunk(heads), b.chunk(heads), strict=True)])


@MODELS
@pytest.mark.parametrize("variant", ["scaled", "norm", "scaled-norm", "head-norm"])
@pytest.mark.parametrize("template", ["prompteol", "pretended-cot"])
@torch.no_grad()
def test_contrastive_prompting(make: Any, variant: str, template: str) -> None:
    module = module_of(make, f"contrastive-prompting:template={template}:at=1:variant={variant}:layer=-1")
    # Both prompts end alike: within a short window their difference would be rounding alone.
    module.decoder.config.sliding_window = 64
    expected = []
    for text in SENTENCES:
        mixed: list[Tensor] = []

        def take(layer: int, mixtures: Tensor, mixed: list[Tensor] = mixed) -> Tensor:
            mixed.extend([mixtures[-1]] if layer == 1 else [])
            return mixtures

        def contrast(layer: int, mixtures: Tensor, mixed: list[Tensor] = mixed) -> Tensor:
            if layer != 1:
                return mixtures
            return torch.cat([mixtures[:-1], contrasted(variant, mixtures[-1], mixed[0], 4)[None]])

        about = f'The irrelevant information of this sentence : "{normalize_sentence(text)}" means in one word:"'
        naive.hidden_states(module.decoder, ids_of(module, about), mix=take)
        ids = ids_of(module, EMBEDDING_TEMPLATES[template].text(text))
        expected.append(naive.hidden_states(module.decoder, ids, mix=contrast)[-1][-1])
    check(module, expected)


@torch.no_grad()
def test_a_change_to_a_row_reaches_no_row_that_goes_on_from_it() -> None:
    model = make_llama().base_model
    # No sentence gives such rows: its double quotes become single ones.
    short, long, other = torch.tensor([1, 7, 8, 9]), torch.tensor([1, 7, 8, 9, 10, 11]), torch.tensor([1, 7, 12, 9])
    assert last_positions(prepare_packs(model, [short, long])) is None
    assert last_positions(prepare_packs(model, [short, other, short])) is not None
    projection = attention_output(model.layers[1])
    for ids in ([short, long], [short, other, short]):
        width = max(map(len, ids))
        filled = [
            torch.nn.functional.pad(torch.stack([row, torch.ones_like(row)]), (width - len(row), 0)) for row in ids
        ]
        input_ids, mask = torch.stack(filled).unbind(1)
        last = torch.zeros_like(mask)
        last[:, -1] = 1
        batch = Batch(input_ids, mask, last, torch.zeros_like(mask), torch.zeros_like(mask))
        unchanged = contrastive_prompting._padded(model, 3, batch, projection, lambda mixtures: mixtures)
        found, expected = (
            run(model, 3, batch, projection, lambda mixtures: -mixtures)
            for run in (contrastive_prompting._packed, contrastive_prompting._padded)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert (found - unchanged).norm(dim=1).min() > 1e-2


@MODELS
@torch.no_grad()
def test_llm2vec(make: Any) -> None:
    module = module_of(make, "llm2vec")
    rows = [ids_of(module, normalize_sentence(text)) for text in SENTENCES]
    check(
        module,
        [naive.hidden_states(module.decoder, ids, bidirectional=True)[-1][1:].mean(dim=0) for ids in rows],
    )


def save_decoder_adapter(folder: Path, base: Path, below: Path, seed: int) -> Path:
    """Save an adapter as LLM2Vec's are: of the layers without the head, on top of another one or of the base."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    tuned = get_peft_model(load_causal_lm(base, torch.float32).base_model, config)
    torch.manual_seed(seed)
    randomise(tuned)
    tuned.save_pretrained(str(folder))
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["task_type"] is None
    settings["base_model_name_or_path"] = str(below)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@torch.no_grad()
def test_llm2vec_checkpoints_are_adapters_over_adapters(run_cli: Cli, tiny_base: Path, tmp_path: Path) -> None:
    below = save_decoder_adapter(tmp_path / "mntp", tiny_base, tiny_base, 1)
    above = save_decoder_adapter(tmp_path / "simcse", tiny_base, below, 2)
    decoder = load_causal_lm(tiny_base, torch.float32).base_model
    for folder in (below, above):
        tensors = load_file(folder / "adapter_model.safetensors")
        for name in (name for name in tensors if "lora_A" in name):
            weight = decoder.get_parameter(name.removeprefix("base_model.model.").replace("lora_A.", ""))
            weight += 8 / 4 * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    method = r'llm2vec:before="[INST]\n":after=" [/INST]"'
    model = sempa_st.load(above, method=method, dtype="float32", device="cpu")
    module = model[0]
    expected = []
    for text in map(normalize_sentence, SENTENCES):
        ids = ids_of(module, f"[INST]\n{text} [/INST]")
        before = ids_of(module, "[INST]\n")
        assert ids[: len(before)] == before
        expected.append(naive.hidden_states(decoder, ids, bidirectional=True)[-1][len(before) :].mean(dim=0))
    check(module, expected)
    named = sempa_st.load(above, method=method, base=str(below), dtype="float32", device="cpu")
    assert (named.encode(SENTENCES) == model.encode(SENTENCES)).all()
    alone = sempa_st.load(above, method=method, base=str(tiny_base), dtype="float32", device="cpu")
    assert float(abs(alone.encode(SENTENCES) - model.encode(SENTENCES)).max()) > 1e-2
    whole = save_random_adapter(tmp_path / "whole", tiny_base, load_causal_lm(tiny_base, torch.float32))
    tuned = PeftModel.from_pretrained(load_causal_lm(tiny_base, torch.float32), whole).get_base_model()
    states = [
        tuned.base_model(torch.tensor([ids_of(module, normalize_sentence(text))]))[0][0, -1] for text in SENTENCES
    ]
    check(sempa_st.load(whole, method="last-token", dtype="float32", device="cpu")[0], states)
    for settings, message in (
        ({"peft_type": "IA3"}, "is of type IA3. Expected LORA"),
        ({"alora_invocation_tokens": [3]}, "acts from certain tokens on"),
        ({"base_model_name_or_path": "/gone"}, r"The base of the adapter in .*/gone.* pass --base"),
    ):
        other = shutil.copytree(whole, tmp_path / "other", dirs_exist_ok=True)
        (other / "adapter_config.json").write_text(
            json.dumps({**json.loads((whole / "adapter_config.json").read_text()), **settings})
        )
        with pytest.raises(SempaError, match=message):
            sempa_st.load(other, method="last-token", dtype="float32")
    with pytest.raises(SempaError, match=r"bare adapter .* by a --method"):
        sempa_st.load(above, dtype="float32")
    with pytest.raises(SempaError, match="names itself as its base"):
        sempa_st.load(below, method=method, base=str(below), dtype="float32")
    code, _, err = run_cli("copy", above, tmp_path / "copy")
    assert (code, "bare adapter" in err) == (2, True)


@pytest.mark.parametrize("method", methods_for(encoders=False))
def test_every_method_is_a_model_that_mteb_takes(method: str, tmp_path: Path) -> None:
    model = SentenceTransformer(modules=[module_of(make_llama, method)], device="cpu")
    model.model_card_data.model_name = f"local/{method}"
    result = mteb.evaluate(model, MockSTSTask(), cache=mteb.ResultCache(tmp_path), co2_tracker=False)
    assert -1 <= result.task_results[0].get_score() <= 1


@pytest.mark.parametrize("method", methods_for(encoders=False))
def test_a_long_sentence_is_cut_and_an_empty_one_is_read(method: str) -> None:
    module = module_of(make_gemma, method, max_seq_length=150)
    long, longer = "A cat sleeps on the mat. " * 40, "A cat sleeps on the mat. " * 41
    batch = module.preprocess([long, "", longer])
    assert batch["input_ids"].shape[1] <= 150 + ("token-prepending" in method)
    assert (batch["read"].sum(dim=1) > 0).all()
    found = module(batch)["sentence_embedding"]
    assert found.isfinite().all()
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-5)
    text = module.tokenizer.decode(batch["input_ids"][0])
    if "means" in module.tokenizer.decode(module.preprocess(["A"])["input_ids"][0]):
        assert text.endswith('" means in one word:"')


def test_a_colon_inside_quotes_is_text() -> None:
    method = parse_method("""llm2vec:before="USER: ":after=' A:':layer=-2""")
    assert method == LLM2Vec(layer=-2, before="USER: ", after=" A:")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("sbert", "Unknown method 'sbert'. Expected one of: mean, last-token, prompteol"),
        ("echo:depth=3", "unknown key 'depth'. Known keys: layer"),
        ("echo:layer=x", "'x'. Expected a value of type int"),
        ("llm2vec:before=[INST] x", "value that cannot be read: .* Put text into double quotes"),
        ("llm2vec:before='x", "value that cannot be read"),
        ("echo:layer", "Expected SETTING=VALUE, with one of: layer"),
        ("prompteol:template=cot", "Unknown embedding template 'cot'"),
        ("contrastive-prompting:variant=odd", "Unknown variant 'odd'"),
        ("contrastive-prompting:strength=0", "strength of contrastive-prompting is 0.0"),
        ("token-prepending:start=2:exit=2", "Expected 1 <= start < exit"),
    ],
)
def test_settings_that_make_no_sense(method: str, message: str) -> None:
    with pytest.raises(SempaError, match=message):
        parse_method(method)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("mean:layer=4", "no layer 4 in LlamaModel of 3 layers"),
        ("token-prepending:exit=4", "does not fit 3 layers"),
        ("contrastive-prompting:at=2:layer=2", "at layer 2, but 2 layers run. Expected 0 to 1"),
    ],
)
def test_settings_that_do_not_fit_the_model(method: str, message: str) -> None:
    with pytest.raises(SempaError, match=message):
        module_of(make_llama, method)


def test_a_base_is_loaded_with_a_method(tiny_base: Path) -> None:
    model = sempa_st.load(tiny_base, method="prompteol:layer=-2", dtype="float32", device="cpu")
    module = module_of(make_llama, "prompteol:layer=-2")
    expected = SentenceTransformer(modules=[module], device="cpu").encode(SENTENCES, convert_to_tensor=True)
    torch.testing.assert_close(model.encode(SENTENCES, convert_to_tensor=True), expected, rtol=0, atol=1e-5)
    other = sempa_st.load(tiny_base, method="mean", dtype="float32", device="cpu")
    assert other.model_card_data.model_name != model.model_card_data.model_name


def test_prompteol_as_a_method_is_the_module_of_its_own(tiny_base: Path, adapter_folder: Path) -> None:
    for folder in (tiny_base, adapter_folder):
        one = sempa_st.load(folder, dtype="float32", device="cpu").encode(SENTENCES, convert_to_tensor=True)
        two = sempa_st.load(folder, method="prompteol", dtype="float32", device="cpu")
        vectors = two.encode(SENTENCES, convert_to_tensor=True, normalize_embeddings=True)  # a method's are not
        torch.testing.assert_close(vectors, one, rtol=0, atol=1e-5)


def test_a_method_is_saved_and_loaded(tiny_base: Path, tmp_path: Path) -> None:
    model = sempa_st.load(tiny_base, method="echo:layer=-2", dtype="float32", device="cpu")
    expected = model.encode(SENTENCES, convert_to_tensor=True)
    model.save_pretrained(str(tmp_path / "echo"))
    again = SentenceTransformer(str(tmp_path / "echo"), device="cpu", trust_remote_code=True)
    torch.testing.assert_close(again.encode(SENTENCES, convert_to_tensor=True), expected, rtol=0, atol=1e-5)


def test_the_command_evaluates_a_method(run_cli: Cli, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "sts").mkdir(parents=True)
    rows = read_rows(asset_path("sts_sample.jsonl"))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "sts" / "stsb.dev.parquet")
    common = ["--tasks", "STSBenchmark", "--split", "dev", "--data-dir", tmp_path / "data", "--device", "cpu"]
    common += ["--dtype", "float32"]
    code, _, err = run_cli(
        "evaluate", tiny_base, "--method", "prompteol", "--layer", -2, *common, "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert result["method"] == "prompteol:layer=-2"
    vectors = [
        sempa_st.load(tiny_base, method="prompteol:layer=-2", dtype="float32", device="cpu").encode(
            [row[side] for row in rows], convert_to_tensor=True
        )
        for side in ("sentence1", "sentence2")
    ]
    expected = spearmanr(torch.nn.functional.cosine_similarity(*vectors), [row["score"] for row in rows]).statistic
    assert result["results"][0]["spearman"] == pytest.approx(100 * float(expected), abs=1e-3)
    (tmp_path / "in.txt").write_text(rows[0]["sentence1"])
    encode = ["encode", tiny_base, tmp_path / "in.txt", "--method", "prompteol", "--layer", -2, "--device", "cpu"]
    encode += ["--dtype", "float32"]
    assert run_cli(*encode, "--output", tmp_path / "v.npy")[0] == 0
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "v.npy"))[0], vectors[0][0], rtol=0, atol=1e-5)
    code, _, err = run_cli("evaluate", tiny_base, "--method", "promptbert", *common, "--output", tmp_path / "no")
    assert (code, "a decoder. Expected one of: mean, last-token" in err) == (2, True)
    code, _, err = run_cli("evaluate", tiny_base, "--layer", -2, *common, "--output", tmp_path / "no")
    assert (code, "--layer is for a --method" in err) == (2, True)
    assert not (tmp_path / "no").exists()


def test_the_help_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    """It does so by hand: the registry imports torch, and help should be there at once."""
    with pytest.raises(SystemExit):
        build_parser().parse_args(["evaluate", "--help"])
    shown = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    shown = shown[shown.rindex("embed by another method") : shown.rindex("--layer LAYER")]
    assert set(re.findall(r"[a-z0-9-]+(?=[,;]| |$)", shown)) >= set(METHODS)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = make_tokenizer(bos=False)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=610, initializer_range=0.2, **small)
    return save_base(folder, BertModel(config, add_pooling_layer=False).eval(), tokenizer)


@pytest.mark.parametrize("method", ["bert-avg", "bert-avg:layer=-2", "promptbert", "promptbert:denoise=true"])
@torch.no_grad()
def test_encoders(encoder_folder: Path, method: str) -> None:
    model = sempa_st.load(encoder_folder, method=method, dtype="float32", device="cpu")
    bert, tokenizer = model[0].model, model[0].tokenizer
    expected = []
    for text in map(normalize_sentence, SENTENCES):
        if method.startswith("bert-avg"):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            states = bert(ids, output_hidden_states=True).hidden_states
            expected.append(states[-2 if "layer" in method else -1][0].mean(dim=0))
            continue
        before, after = 'This sentence of "', '" means '
        parts = [tokenizer(part)["input_ids"] for part in (f"{before}{text}{after}<mask>.", f"{before}{text}", before)]
        ids = torch.tensor([parts[0]])
        place = parts[0].index(tokenizer.mask_token_id)
        state = bert(ids).last_hidden_state[0, place]
        if "denoise" in method:
            kept = torch.tensor([*range(len(parts[2])), *range(len(parts[1]), ids.shape[1])])
            assert parts[0][: len(parts[1])] == parts[1]  # no token lies across a seam
            bare = bert(ids[:, kept], position_ids=kept[None]).last_hidden_state[0]
            state = state - bare[kept.tolist().index(place)]
        expected.append(state)
    check(model[0], expected)
    assert model.encode([""]).shape == (1, 32)


def test_a_method_for_the_other_kind_of_model_is_refused(encoder_folder: Path, tiny_base: Path) -> None:
    with pytest.raises(SempaError, match=r"'promptbert' does not apply to .*, a decoder. Expected one of: mean, last"):
        sempa_st.load(tiny_base, method="promptbert", dtype="float32")
    with pytest.raises(SempaError, match=r"'mean' does not apply to .*, an encoder. Expected one of: bert-avg, prompt"):
        sempa_st.load(encoder_folder, method="mean", dtype="float32")
    with pytest.raises(
        SempaError, match=r"\(BertModel\) is an encoder and not a decoder\. .* a method: bert-avg, prompt"
    ):
        sempa_st.load(encoder_folder, dtype="float32")


def test_an_encoder_method_is_saved_and_loaded(encoder_folder: Path, tmp_path: Path) -> None:
    model = sempa_st.load(encoder_folder, method="promptbert", dtype="float32", device="cpu")
    expected = model.encode(SENTENCES, convert_to_tensor=True)
    model.save_pretrained(str(tmp_path / "bert"))
    again = SentenceTransformer(str(tmp_path / "bert"), device="cpu", trust_remote_code=True)
    torch.testing.assert_close(again.encode(SENTENCES, convert_to_tensor=True), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["lfm2", "mamba"])
def test_llm2vec_is_for_layers_of_attention(family: str) -> None:
    with pytest.raises(SempaError, match="they are not attention alone"):
        MethodModule(make_causal_lm(family).base_model, make_tokenizer(), "llm2vec")


@torch.no_grad()
def test_positions_that_begin_after_the_padding_token_are_kept_within(tmp_path: Path) -> None:
    """As those of RoBERTa, whose table has two rows more than tokens that it takes."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=610, max_position_embeddings=42, pad_token_id=1, **small)
    tokenizer = make_tokenizer(bos=False)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    folder = save_base(tmp_path / "roberta", RobertaModel(config, add_pooling_layer=False).eval(), tokenizer)
    model = sempa_st.load(folder, method="bert-avg", dtype="float32", device="cpu")
    assert model.preprocess(["word " * 200])["input_ids"].shape[1] == 40
    assert torch.isfinite(model.encode(["word " * 200], convert_to_tensor=True)).all()
