"""Completions and chat by transformers' own handlers, on a model that takes turns with the embeddings.

The handlers of ``transformers.cli.serving`` look their model up in a model manager and run it through a generation
state. Here both are stand-ins for one model that is loaded already.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from fastapi import HTTPException
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality

from sempa_st.errors import first_line
from sempa_st.model.chat_formats import chat_template
from sempa_st.serve.device import GENERATION, DeviceTurns
from sempa_st.serve.metrics import Metrics
from sempa_st.serve.protocol import RequestError

_RETRY_AFTER = 5
_REFUSED = {
    "generation_config": "it would replace the server's limits",
    "chat_template_kwargs": "the server's template is fixed",
    "logprobs": "log-probabilities are not computed",
    "n": "one answer is given to each request",
}
"""Fields of the handlers' requests that this server does not take, unless they ask for nothing."""
_LIMITS = ("max_completion_tokens", "max_tokens")


class TurnTakingModel:
    """A causal language model whose ``generate`` holds the device for one token at a time.

    Everything else is the model's own.
    """

    def __init__(self, model: Any, turns: DeviceTurns, metrics: Metrics) -> None:
        self._model = model
        self._turns = turns
        self._metrics = metrics

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **kwargs: Any) -> Any:
        """Generate as the model does."""
        step = _NextTurn(self._turns, self._metrics)
        self._turns.acquire(GENERATION)
        try:
            with torch.inference_mode():
                return self._model.generate(**kwargs, stopping_criteria=StoppingCriteriaList([step]))
        finally:
            self._turns.release()


class _NextTurn(StoppingCriteria):
    """Never stops; called after each token, it lets others have the device."""

    def __init__(self, turns: DeviceTurns, metrics: Metrics) -> None:
        self._turns = turns
        self._tokens = metrics.tokens.labels("completion")

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._tokens.inc(len(input_ids))
        self._turns.release()
        self._turns.acquire(GENERATION)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


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

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        if not self._places.acquire(blocking=False):
            raise RequestError(
                429, "As many generations run and wait as may. Try again later.", retry_after=_RETRY_AFTER
            )
        future = self._pool.submit(fn, *args, **kwargs)
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
        tokenizer: Its tokenizer, for text without the embedding template.
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
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = chat_template(chat_format, tokenizer)
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._max_tokens, self._max_context = max_tokens, max_context
        self._threads = _Threads(running)
        manager = _OneModel(name, TurnTakingModel(model, turns, metrics), tokenizer)
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
        ids = self._tokenizer(prompt)["input_ids"]
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
            messages = self._chat.get_processor_inputs_from_messages(body["messages"], Modality.LLM)
            ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template is a program, and messages may be anything
            reason = f"{type(error).__name__}: {error}"
            raise RequestError(
                400, f"messages cannot be read ({reason:.200}). Expected a list of role and content.", param="messages"
            ) from error
        return await self._answer(self._chat, body, ids, request_id)

    async def _answer(self, handler: Any, body: dict[str, Any], ids: list[int], request_id: str) -> Any:
        for name, reason in _REFUSED.items():
            if body.get(name) not in (None, False, 1, {}):
                raise RequestError(400, f"{name} is not supported: {reason}. Leave it out.", param=name)
        field = next((name for name in _LIMITS if body.get(name) is not None), _LIMITS[-1])
        room = self._max_context - len(ids)
        asked = body.get(field)
        wanted = min(self._max_tokens, room) if asked is None else asked
        if room < 1 or type(wanted) is not int or not 1 <= wanted <= min(self._max_tokens, room):
            raise RequestError(
                400,
                f"The prompt has {len(ids)} tokens, and {field} is {asked!r:.20}. Expected 1 to {self._max_tokens} "
                f"tokens to write, and {self._max_context} with the prompt.",
                param=field,
            )
        self._metrics.tokens.labels("prompt").inc(len(ids))
        try:
            return await handler.handle_request(body | {field: wanted}, request_id)
        except HTTPException as error:
            raise RequestError(error.status_code, str(error.detail)) from error
        except (TypeError, ValueError) as error:  # of GenerationConfig, on a value that it does not take
            raise RequestError(400, f"The request cannot be met: {first_line(error)}") from error

    def close(self) -> None:
        """Wait for the generations that run."""
        self._threads.stop()
