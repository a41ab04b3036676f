"""Completions and chat by transformers' own handlers, on a model that takes turns with the embeddings.

The handlers of ``transformers.cli.serving`` look their model up in a model manager and run it through a generation
state. Here both are stand-ins for one model that is loaded already.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from fastapi import HTTPException
from fastapi.responses import StreamingResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality

from sempa_st.model.chat_formats import chat_template
from sempa_st.model.prompt_eol import within_positions
from sempa_st.serve.device import DeviceTurns
from sempa_st.serve.metrics import Metrics
from sempa_st.serve.protocol import RequestError
from sempa_st.serve.sampling import Sampling, read_sampling
from sempa_st.serve.stops import StopQueue, first_stop
from sempa_st.serve.teams import on_own_thread
from sempa_st.serve.threads import off_loop
from sempa_st.serve.turn_taking import TurnTakingModel
from sempa_st.utils.files import lone_surrogates

_RETRY_AFTER = 5
_LIMITS = ("max_completion_tokens", "max_tokens")
_ERROR = 'data: {"error": "'
"""How the handlers begin an event that is an error, whose message they do not quote."""
_CURRENT: ContextVar[Sampling] = ContextVar("sempa_st_sampling")
"""The sampling of the request that the handlers work on."""


class _OneModel(ModelManager):
    """The model manager of a server that has one model, which is loaded."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.force_model = name
        self._loaded = model, tokenizer

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        return self._loaded

    @staticmethod
    def get_model_modality(model: Any, processor: Any = None) -> Modality:
        return Modality.LLM


class _Threads(GenerateManager):
    """A generation manager that runs several generations at a time, each on a thread, in turns on the device."""

    def __init__(self, running: int) -> None:
        self._pool = ThreadPoolExecutor(running, thread_name_prefix="sempa-generation")
        self._places = threading.Semaphore(2 * running)

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> Any:
        sampling = _CURRENT.get()
        sampling.apply(gen_config)
        queue, streamer = super().generate_streaming(
            model.drawing(sampling), processor, inputs, gen_config, request_id, response_parser
        )
        return (StopQueue(queue, sampling.stops) if sampling.stops else queue), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        sampling = _CURRENT.get()
        sampling.apply(gen_config)
        text, length, ids = await super().generate_non_streaming(
            model.drawing(sampling), processor, inputs, gen_config, request_id
        )
        return text[: first_stop(text, sampling.stops)], length, ids

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        if not self._places.acquire(blocking=False):
            raise RequestError(
                429, "As many generations run and wait as may. Try again later.", retry_after=_RETRY_AFTER
            )
        future = self._pool.submit(on_own_thread, fn, *args, **kwargs)
        future.add_done_callback(lambda _: self._places.release())
        return future

    def async_submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        return asyncio.wrap_future(self.submit(fn, *args, **kwargs))

    def stop(self) -> None:
        self._pool.shutdown(wait=True)


class _OneState(GenerationState):
    """The generation state of a server that has one model."""

    def __init__(self, threads: _Threads) -> None:
        super().__init__()
        self._threads = threads

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self._threads


class Generation:
    """Answer requests for completions and chat.

    Args:
        name: Name of the model in requests.
        model: Causal language model.
        tokenizer: Its tokenizer, or a copy that nothing embeds with: its chat template is replaced.
        turns: Turns on its device.
        metrics: Where to count tokens.
        chat_format: As in :class:`sempa_st.serve.config.ServeConfig`.
        running: Generations at a time; as many more may wait.
        max_tokens: Most tokens of an answer.
        max_context: Most tokens of prompt and answer together.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        turns: DeviceTurns,
        metrics: Metrics,
        *,
        chat_format: str,
        running: int,
        max_tokens: int,
        max_context: int,
    ) -> None:
        tokenizer.chat_template = chat_template(chat_format, tokenizer)
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._max_tokens = max_tokens
        self._max_context = within_positions(max_context, model.config)
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._threads = _Threads(running)
        manager = _OneModel(name, TurnTakingModel(model, tokenizer, turns, metrics), tokenizer)
        state = _OneState(self._threads)
        self._completion = CompletionHandler(manager, state)
        self._chat = ChatCompletionHandler(manager, state)

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return self._tokenizer.chat_template is not None

    async def complete(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request to ``/v1/completions``.

        Raises:
            RequestError: If the request cannot be met.
        """
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if not isinstance(prompt, str) or not prompt:
            raise RequestError(400, f"prompt is {prompt!r:.80}. Expected one text.", param="prompt")
        if lone_surrogates(prompt):
            raise RequestError(400, "prompt contains a lone surrogate, which no tokenizer can encode.", param="prompt")
        ids = await off_loop(len(prompt), lambda: self._tokenizer(prompt)["input_ids"])
        return await self._answer(self._completion, body | {"prompt": prompt}, ids, request_id)

    async def chat(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request to ``/v1/chat/completions``.

        Raises:
            RequestError: If the request cannot be met.
        """
        if not self.chats:
            raise RequestError(
                400, "This model has no chat template. Use /v1/completions, or start the server with --chat-format."
            )
        try:
            ids = await off_loop(len(str(body)), self._chat_ids, body)
        except Exception as error:  # a template is a program, and messages may be anything
            reason = f"{type(error).__name__}: {error}"
            raise RequestError(
                400, f"messages cannot be read ({reason:.200}). Expected a list of role and content.", param="messages"
            ) from error
        return await self._answer(self._chat, body, ids, request_id)

    def _chat_ids(self, body: dict[str, Any]) -> list[int]:
        messages = self._chat.get_processor_inputs_from_messages(body["messages"], Modality.LLM)
        ids: Any = self._tokenizer.apply_chat_template(
            messages, tools=body.get("tools"), add_generation_prompt=True, return_dict=False
        )
        return list(ids)

    async def _answer(self, handler: Any, body: dict[str, Any], ids: list[int], request_id: str) -> Any:
        sampling, body = read_sampling(body)
        if max(ids, default=0) >= self._vocabulary:
            raise RequestError(400, f"The prompt has the token {max(ids)}, which this model has no embedding for.")
        field = next((name for name in _LIMITS if name in body), _LIMITS[-1])
        room = self._max_context - len(ids)
        asked = body.get(field)
        wanted = min(self._max_tokens, room) if asked is None else asked
        if not ids or room < 1 or type(wanted) is not int or not 1 <= wanted <= min(self._max_tokens, room):
            raise RequestError(
                400,
                f"The prompt has {len(ids)} tokens, and {field} is {asked!r:.20}. Expected 1 to {self._max_tokens} "
                f"tokens to write, and {self._max_context} with the prompt.",
                param=field,
            )
        self._metrics.tokens.labels("prompt").inc(len(ids))
        token = _CURRENT.set(sampling)
        try:
            answer = await handler.handle_request(body | {field: wanted}, request_id)
        except HTTPException as error:
            raise RequestError(error.status_code, str(error.detail)) from error
        except asyncio.CancelledError:  # the client is gone
            sampling.cancelled.set()
            raise
        finally:
            _CURRENT.reset(token)
        if isinstance(answer, StreamingResponse):
            answer.body_iterator = _ended(answer.body_iterator)
        return answer

    def close(self) -> None:
        """Wait for the generations that run."""
        self._threads.stop()


async def _ended(events: Any) -> AsyncIterator[str]:
    """Yield the events of a stream, errors as valid JSON, and the event that ends it for some clients."""
    async with aclosing(events):
        async for event in events:
            if event.startswith(_ERROR):
                message = event.removeprefix(_ERROR).rstrip().removesuffix('"}')
                event = f"data: {json.dumps({'error': {'message': message, 'type': 'server_error'}})}\n\n"
            yield event
    yield "data: [DONE]\n\n"
