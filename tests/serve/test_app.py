"""The server, through the clients that people use."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import torch
from helpers.server import Running, load_float32, running_server
from helpers.tiny import make_tokenizer, sample_sentences
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

pytestmark = pytest.mark.names_dtype


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running_server(load_float32(folder), max_queue=200, max_inputs=100, max_body=100_000, max_context=200) as it:
        yield it


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    """Embeddings of the first sample sentences by the model itself."""
    return load_float32(folder).encode(sample_sentences()[:60])


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def curl(*arguments: str) -> tuple[int, Any]:
    """Return status and body of a request by curl."""
    done = subprocess.run(
        ["curl", "-s", "--noproxy", "*", "-w", "\n%{http_code}", *arguments], capture_output=True, text=True, check=True
    )
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body) if body.startswith("{") else body


def post(url: str, body: Any, *arguments: str) -> tuple[int, Any]:
    data = body if isinstance(body, str) else json.dumps(body)
    return curl("-H", "Content-Type: application/json", "--data-binary", data, *arguments, url)


def cosines(found: Any, wanted: np.ndarray) -> np.ndarray:
    found = np.asarray(found)
    return (found * wanted).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(wanted, axis=-1)


@pytest.mark.parametrize("encoding_format", ["float", "base64", None])
def test_vectors_are_those_of_encode(client: openai.OpenAI, expected: np.ndarray, encoding_format: Any) -> None:
    given = {} if encoding_format is None else {"encoding_format": encoding_format}
    answer = client.embeddings.create(model="tiny", input=sample_sentences()[:60], **given)
    vectors: Any = [item.embedding for item in answer.data]
    if encoding_format == "base64":
        vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
    assert cosines(vectors, expected).min() > 0.99999
    assert [item.index for item in answer.data] == list(range(60))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 60


def test_a_text_alone_and_its_tokens_are_the_same(client: openai.OpenAI, folder: Path, expected: np.ndarray) -> None:
    sentence = sample_sentences()[0]
    ids = AutoTokenizer.from_pretrained(folder)(sentence, add_special_tokens=False)["input_ids"]
    for given in (sentence, [sentence], ids, [ids]):
        answer = client.embeddings.create(model="tiny", input=given, encoding_format="float")
        assert cosines(answer.data[0].embedding, expected[0]) > 0.99999


def test_fewer_dimensions_are_renormalised(client: openai.OpenAI, expected: np.ndarray) -> None:
    answer = client.embeddings.create(model="tiny", input=sample_sentences()[0], dimensions=8, encoding_format="float")
    vector = np.array(answer.data[0].embedding)
    assert vector.shape == (8,) and np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    assert cosines(vector, expected[0, :8]) > 0.99999


def test_many_clients_at_once_get_their_own_vectors(server: Running, expected: np.ndarray) -> None:
    sentences = sample_sentences()[:60]

    async def all_at_once() -> list[list[float]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.embeddings.create(model="tiny", input=s, encoding_format="float") for s in sentences)
            )
        return [answer.data[0].embedding for answer in answers]

    before = server.service.metrics.batch._sum.get(), sum(b.get() for b in server.service.metrics.batch._buckets)
    vectors = asyncio.run(all_at_once())
    after = server.service.metrics.batch._sum.get(), sum(b.get() for b in server.service.metrics.batch._buckets)
    assert cosines(vectors, expected).min() > 0.99999
    assert after[0] - before[0] == 60
    assert after[1] - before[1] < 40  # gathered into batches


def greedy(base: Path, text: str, tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    ids = tokenizer(text, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["A man is", 'This sentence : "A man sleeps." means in one word:"'])
def test_completions_are_the_bases_token_for_token(
    client: openai.OpenAI, tiny_base: Path, prompt: str, stream: bool
) -> None:
    answer: Any = client.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0, stream=stream)
    text = "".join(chunk.choices[0].text or "" for chunk in answer) if stream else answer.choices[0].text
    assert text == greedy(tiny_base, prompt, 24)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_is_the_bases_token_for_token(client: openai.OpenAI, tiny_base: Path, stream: bool) -> None:
    messages: Any = [{"role": "user", "content": "What does the man do?"}]
    prompt = AutoTokenizer.from_pretrained(tiny_base).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    answer: Any = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=16, temperature=0, stream=stream
    )
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
        assert answer.usage.completion_tokens == 16
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, trust_remote_code=False)
    out = model.generate(**ids, max_new_tokens=16, do_sample=False)
    assert text == tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_embedding_beside_generation_changes_neither(
    server: Running, client: openai.OpenAI, tiny_base: Path, expected: np.ndarray
) -> None:
    def write(_: int) -> str:
        return str(
            client.completions.create(model="tiny", prompt="A man is", max_tokens=60, temperature=0).choices[0].text
        )

    def embed(index: int) -> list[float]:
        text = sample_sentences()[index]
        return client.embeddings.create(model="tiny", input=text, encoding_format="float").data[0].embedding

    with ThreadPoolExecutor(16) as pool:
        writing = [pool.submit(write, number) for number in range(4)]
        vectors = list(pool.map(embed, range(60)))
        texts = {future.result() for future in writing}
    assert texts == {greedy(tiny_base, "A man is", 60)}
    assert cosines(vectors, expected).min() > 0.99999


ASKED = [{"role": "user", "content": "a"}]
MALFORMED = [
    ("/v1/embeddings", "{", 400, "no JSON"),
    ("/v1/embeddings", {"model": "tiny"}, 422, "input"),
    ("/v1/embeddings", {"model": "tiny", "input": None}, 422, "input is NoneType"),
    ("/v1/embeddings", {"model": "tiny", "input": [[1, 2.5]]}, 422, "token id 2.5"),
    ("/v1/embeddings", {"model": "tiny", "input": {"a": 1}}, 422, "input"),
    ("/v1/embeddings", {"model": "tiny", "input": [1.5]}, 422, "input"),
    ("/v1/embeddings", {"model": "tiny", "input": [True]}, 422, "input"),
    ("/v1/embeddings", {"model": "tiny", "input": []}, 400, "input is empty"),
    ("/v1/embeddings", {"model": "tiny", "input": ["a", ""]}, 400, "input 1 is empty"),
    ("/v1/embeddings", {"model": "tiny", "input": [[10**9]]}, 400, "token id 1000000000"),
    ("/v1/embeddings", {"model": "tiny", "input": [[-1]]}, 400, "token id -1"),
    ("/v1/embeddings", '{"model": "tiny", "input": "a\\ud800"}', 400, "lone surrogate at character 1"),
    ("/v1/embeddings", {"model": "tiny", "input": ["a"] * 101}, 400, "101 texts"),
    ("/v1/embeddings", {"model": "tiny", "input": "a", "dimensions": 33}, 400, "Expected 32 at most"),
    ("/v1/embeddings", {"model": "tiny", "input": "a", "dimensions": 0}, 422, "dimensions"),
    ("/v1/embeddings", {"model": "tiny", "input": "a", "encoding_format": "hex"}, 422, "encoding_format"),
    ("/v1/embeddings", {"model": "other", "input": "a"}, 404, "'other' does not exist"),
    ("/v1/completions", {"model": "other", "prompt": "a"}, 404, "'other' does not exist"),
    ("/v1/completions", {"model": "tiny"}, 400, "prompt is None"),
    ("/v1/completions", {"model": "tiny", "prompt": ["a", "b"]}, 400, "Expected one text"),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 10**9}, 400, "max_tokens is 1000000000"),
    ("/v1/completions", {"model": "tiny", "prompt": "a b " * 200}, 400, "200 with the prompt"),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "temperature": "x"}, 400, "temperature is 'x'"),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "temperature": 3}, 400, "from 0 to 2"),
    ("/v1/completions", '{"model": "tiny", "prompt": "a\\ud800"}', 400, "prompt contains a lone surrogate"),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "frequency_penalty": -1}, 400, "frequency_penalty is -1"),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "seed": 1.5}, 400, "seed is 1.5"),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "stop": [""]}, 400, "stop is ['']"),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "stop": ["a"] * 5}, 400, "4 texts at most"),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "stop": {"a": 1}}, 400, "stop is {'a': 1}"),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "n": 3}, 400, "n is not supported"),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "n": True}, 400, "n is not supported"),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "echo": True}, 400, "echo is not supported"),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "suffix": "z"}, 400, "suffix is not supported"),
    (
        "/v1/chat/completions",
        {"model": "tiny", "messages": ASKED, "logprobs": True},
        400,
        "logprobs is not supported",
    ),
    ("/aligned-tokens", {"input": ["a"], "k": 101}, 422, "k is invalid"),
    ("/aligned-tokens", {"input": ["a"] * 17}, 400, "17 texts"),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "generation_config": "{}"}, 400, "generation_config"),
    ("/v1/chat/completions", {"model": "tiny", "messages": "hello"}, 400, "messages cannot be read"),
    ("/v1/chat/completions", {"model": "tiny"}, 400, "messages cannot be read"),
    ("/v1/nothing", {"model": "tiny"}, 404, "Not Found"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), MALFORMED)
def test_errors_are_those_of_openais_api(server: Running, path: str, body: Any, status: int, message: str) -> None:
    found, answer = post(server.url + path, body)
    assert found == status, answer
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert message in answer["error"]["message"]


def test_the_official_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.embeddings.create(model="other", input="a")
    with pytest.raises(openai.BadRequestError, match="input is empty"):
        client.embeddings.create(model="tiny", input=[])
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_body_that_is_too_large_is_refused(server: Running, tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"model": "tiny", "input": "a" * 10_000_000}))
    url = f"{server.url}/v1/embeddings"
    for headers in ([], ["-H", "Transfer-Encoding: chunked"]):
        status, answer = curl("-H", "Content-Type: application/json", *headers, "--data-binary", f"@{body}", url)
        assert status == 413 and "larger than 100000 bytes" in answer["error"]["message"]
    assert post(url, {"model": "tiny", "input": "a"})[0] == 200


def test_a_flood_past_the_queue_is_refused_and_the_rest_answered(folder: Path, expected: np.ndarray) -> None:
    with running_server(load_float32(folder), max_queue=40, max_inputs=40) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)

        def embed(index: int) -> Any:
            try:
                texts = sample_sentences()[index : index + 1]
                return client.embeddings.create(model="tiny", input=texts, encoding_format="float").data[0].embedding
            except openai.RateLimitError as error:
                return error

        with ThreadPoolExecutor(60) as pool:
            with held(server):  # nothing is embedded meanwhile
                futures = [pool.submit(embed, index) for index in range(60)]
                assert eventually(lambda: sum(future.done() for future in futures) == 20)
            answers = [future.result(60) for future in futures]
        refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
        assert len(refused) == 20 and all(error.response.headers["Retry-After"] == "1" for error in refused)
        assert all("may. Try again later" in str(error) for error in refused)
        answered = [(a, expected[i]) for i, a in enumerate(answers) if not isinstance(a, Exception)]
        assert all(cosines(vector, wanted) > 0.99999 for vector, wanted in answered)
        assert server.service.embedder.waiting == 0


@contextmanager
def held(server: Running) -> Iterator[None]:
    """Let nothing run within the block."""
    turns = server.service.turns
    with ExitStack() as places:
        for _ in range(turns.places):
            places.enter_context(turns.turn("embedding"))
        yield


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_generation(folder: Path, stream: bool) -> None:
    with running_server(load_float32(folder), max_generations=1, max_tokens=4000, max_context=4000) as server:
        written = server.service.metrics.tokens.labels("completion")._value.get
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
        ask: dict[str, Any] = {"model": "tiny", "prompt": "A", "max_tokens": 3900, "temperature": 0}
        if stream:
            events = client.completions.create(**ask, stream=True)
            next(iter(events))
            events.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.3).completions.create(**ask)
        # Its place is free again, long before all of it was written.
        assert client.completions.create(**ask | {"max_tokens": 2}).usage.completion_tokens == 2
        assert written() < 3900


def test_texts_of_a_client_that_left_are_not_embedded(folder: Path) -> None:
    with running_server(load_float32(folder)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=0.3)
        with held(server), pytest.raises(openai.APITimeoutError):
            client.embeddings.create(model="tiny", input=sample_sentences()[:60] * 3)
        patient = client.with_options(timeout=60)
        assert patient.embeddings.create(model="tiny", input="A").data
        assert eventually(lambda: server.service.embedder.waiting == 0)
        assert server.service.metrics.batch._sum.get() < 100  # one batch may have been gathered


def test_a_request_that_takes_too_long_is_given_up(folder: Path) -> None:
    with running_server(load_float32(folder), timeout=0.3) as server:
        with held(server):
            status, answer = post(f"{server.url}/v1/embeddings", {"model": "tiny", "input": "A"})
        assert status == 503 and "waited 0.3 s" in answer["error"]["message"]
        assert eventually(lambda: server.service.embedder.waiting == 0)


def test_too_many_generations_are_refused(folder: Path) -> None:
    with running_server(load_float32(folder), max_generations=1) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)

        def ask() -> Any:
            return client.completions.create(model="tiny", prompt="A", max_tokens=3)

        with ThreadPoolExecutor(3) as pool:
            with held(server):
                futures = [pool.submit(ask) for _ in range(3)]
                assert eventually(lambda: any(future.done() for future in futures))
                time.sleep(0.2)
                (refused,) = [future for future in futures if future.done()]
            assert isinstance(refused.exception(), openai.RateLimitError)
        assert sum(future.exception() is None for future in futures) == 2


def test_one_text_that_fails_fails_alone(folder: Path, expected: np.ndarray) -> None:
    model = load_float32(folder)
    encode = model.encode

    def sometimes(texts: list[str], **kwargs: Any) -> Any:
        if "broken" in texts:
            raise ValueError("It is broken.")
        return encode(texts, **kwargs)

    model.encode = sometimes  # type: ignore[method-assign]
    sentences = [*sample_sentences()[:5], "broken"]
    with running_server(model) as server, ThreadPoolExecutor(6) as pool:
        with held(server):
            asked = [
                pool.submit(post, f"{server.url}/v1/embeddings", {"model": "tiny", "input": sentence})
                for sentence in sentences
            ]
            assert eventually(lambda: server.service.embedder.waiting == 6)
        answers = [future.result(30) for future in asked]
    assert [status for status, _ in answers] == [200] * 5 + [500]
    assert answers[-1][1]["error"]["message"] == "ValueError: It is broken."
    assert cosines([answer["data"][0]["embedding"] for _, answer in answers[:5]], expected[:5]).min() > 0.99999


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_ends_before_a_stop_sequence(
    server: Running, client: openai.OpenAI, tiny_base: Path, stream: bool
) -> None:
    whole = greedy(tiny_base, "A man is", 60)
    for start, length in ((7, 1), (9, 5), (20, 11)):
        stop = whole[start : start + length]
        answer: Any = client.completions.create(
            model="tiny", prompt="A man is", max_tokens=60, temperature=0, stop=[stop, "never there"], stream=stream
        )
        text = "".join(chunk.choices[0].text or "" for chunk in answer) if stream else answer.choices[0].text
        assert text == whole[: whole.index(stop)]


def test_draws_follow_temperature_and_seed(client: openai.OpenAI) -> None:
    def draw(seed: int | None, temperature: float = 1.5) -> str:
        answer = client.completions.create(
            model="tiny", prompt="A man", max_tokens=20, temperature=temperature, seed=seed
        )
        return str(answer.choices[0].text)

    assert len({draw(None) for _ in range(4)}) > 1
    assert len({draw(seed) for seed in range(4)}) > 1
    assert len({draw(None, temperature=cold) for cold in (0.0, 0.0, 1e-40, 1e-5)}) == 1
    alone = draw(7)
    with ThreadPoolExecutor(4) as pool:  # together with others, whose draws are their own
        together = list(pool.map(draw, [7, None, 7, 3, None, 7]))
    assert {together[0], together[2], together[5]} == {alone}


def test_a_stream_ends_in_done(server: Running) -> None:
    body = {"model": "tiny", "prompt": "A", "max_tokens": 2, "stream": True}
    _, text = post(f"{server.url}/v1/completions", body)
    assert text.rstrip().endswith("data: [DONE]")


def test_a_prompt_with_a_token_that_has_no_embedding_is_refused(server: Running) -> None:
    generation = server.service.generation
    assert generation is not None
    vocabulary, generation._vocabulary = generation._vocabulary, 5
    try:
        status, answer = post(f"{server.url}/v1/completions", {"model": "tiny", "prompt": "A man"})
    finally:
        generation._vocabulary = vocabulary
    assert status == 400 and "has no embedding for" in answer["error"]["message"]


def test_tools_count_as_part_of_the_prompt(server: Running) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "x " * 400, "parameters": {}}}
    tokenizer = server.service.generation._tokenizer  # type: ignore[union-attr]
    template = tokenizer.chat_template
    tokenizer.chat_template = "{% if tools %}{{ tools }}{% endif %}" + template
    try:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        assert post(f"{server.url}/v1/chat/completions", body)[0] == 200
        status, answer = post(f"{server.url}/v1/chat/completions", body | {"tools": [tool]})
    finally:
        tokenizer.chat_template = template
    assert status == 400 and "200 with the prompt" in answer["error"]["message"]


def test_a_malformed_body_of_many_elements_costs_little(folder: Path) -> None:
    with running_server(load_float32(folder), max_inputs=10**6) as server:
        body = json.dumps({"model": "tiny", "input": ["a"] + [1.5] * 200_000})
        started = time.perf_counter()
        answer = httpx2.post(
            f"{server.url}/v1/embeddings", content=body, headers={"Content-Type": "application/json"}, trust_env=False
        )
        assert answer.status_code == 422 and len(answer.content) < 500
        assert time.perf_counter() - started < 20  # it was 8 s on an idle processor, and 680 MiB


def test_any_sentence_transformer_is_served(tmp_path: Path) -> None:
    """One whose tokenizer truncates, on the thread that embeds, while requests are counted on another."""
    model = plain_transformer(tmp_path / "bert")
    texts = [sentence * (1 + 20 * (number % 3)) for number, sentence in enumerate(sample_sentences()[:60])]
    wanted = model.encode(texts)
    with running_server(model) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with ThreadPoolExecutor(16) as pool:
            found = list(
                pool.map(
                    lambda text: client.embeddings.create(model="tiny", input=text, encoding_format="float"), texts
                )
            )
        assert cosines([answer.data[0].embedding for answer in found], wanted).min() > 0.99999
        status, answer = post(f"{server.url}/v1/completions", {"model": "tiny", "prompt": "A"})
        assert status == 400 and "does not generate" in answer["error"]["message"]


def plain_transformer(folder: Path) -> SentenceTransformer:
    """Return a tiny BERT with mean pooling that truncates at 32 tokens."""
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformer = Transformer(str(folder), max_seq_length=32)
    return SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu")


def test_a_key_is_asked_for(folder: Path) -> None:
    with running_server(load_float32(folder), api_key="secret") as server:
        body = {"model": "tiny", "input": "a"}
        for headers in ([], ["-H", "Authorization: Bearer wrong"], ["-H", "Authorization: secret"]):
            status, answer = post(f"{server.url}/v1/embeddings", body, *headers)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
            assert curl(*headers, f"{server.url}/metrics")[0] == 401
        assert openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret").embeddings.create(**body).data
        assert curl(f"{server.url}/health")[0] == 200
        assert curl(f"{server.url}/")[0] == 200


def test_another_host_name_is_refused(server: Running) -> None:
    status, answer = curl("-H", "Host: evil.example", f"{server.url}/v1/models")
    assert status == 403 and "'evil.example' is not this machine" in answer["error"]["message"]
    for host in ("localhost:8000", "127.0.0.1", "[::1]:9"):
        assert curl("-H", f"Host: {host}", f"{server.url}/health")[0] == 200


def test_a_form_of_another_page_is_not_read(server: Running) -> None:
    body = json.dumps({"model": "tiny", "input": "a"})
    status, _ = curl("-H", "Content-Type: text/plain", "--data-binary", body, f"{server.url}/v1/embeddings")
    assert status == 422


def test_the_metrics_count(server: Running) -> None:
    post(f"{server.url}/v1/embeddings", {"model": "tiny", "input": "a"})
    post(f"{server.url}/v1/embeddings", {"model": "other", "input": "a"})
    _, text = curl(f"{server.url}/metrics")
    for line in (
        'sempa_requests_total{route="/v1/embeddings",status="200"}',
        'sempa_requests_total{route="/v1/embeddings",status="404"}',
        'sempa_request_seconds_bucket{le="0.01",route="/v1/embeddings"}',
        'sempa_tokens_total{kind="prompt"}',
        "sempa_embedding_batch_texts_bucket",
        "sempa_queue_texts 0.0",
    ):
        assert line in text


def test_aligned_tokens_are_those_of_the_library(server: Running, folder: Path) -> None:
    from sempa_st.analysis.tokens import aligned_tokens

    sentence = sample_sentences()[0]
    status, answer = post(f"{server.url}/aligned-tokens", {"input": [sentence], "k": 5})
    (wanted,) = aligned_tokens(load_float32(folder), [sentence], k=5)
    assert status == 200 and [token["text"] for token in answer["data"][0]] == [token.text for token in wanted]


@pytest.fixture(scope="module")
def damaged(folder: Path) -> Iterator[Running]:
    """A server of a model whose weights have become NaN."""
    model = load_float32(folder)
    model[0].causal_lm.get_output_embeddings().weight.data[7] = float("nan")
    next(weight for name, weight in model.named_parameters() if name.endswith("norm.weight")).data.fill_(float("nan"))
    with running_server(model) as it:
        yield it


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/embeddings", {"model": "tiny", "input": ["a", "b"]}),
        ("/v1/completions", {"model": "tiny", "prompt": "A cat", "max_tokens": 3}),
        ("/v1/completions", {"model": "tiny", "prompt": "A cat", "max_tokens": 3, "temperature": 1.0}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "A cat"}]}),
        ("/aligned-tokens", {"input": ["a"]}),
    ],
)
def test_a_model_of_no_numbers_is_an_error_of_the_server(damaged: Running, route: str, body: Any) -> None:
    status, answer = post(f"{damaged.url}{route}", body)
    assert status == 500 and "infinite or NaN" in answer["error"]["message"]


def test_a_stream_of_no_numbers_ends_with_an_error(damaged: Running) -> None:
    body = {"model": "tiny", "prompt": "A cat", "max_tokens": 3, "stream": True}
    _, text = post(f"{damaged.url}/v1/completions", body)
    assert "The model's logits are infinite or NaN" in text and '"text":"' not in text.replace('"text":""', "")


def test_the_page_asks_nothing_of_other_hosts(server: Running) -> None:
    _, page = curl(f"{server.url}/")
    assert "http://" not in page and "https://" not in page and "//" not in page.replace("</", "")
