"""A method as a module of sentence-transformers: ``SentenceTransformer(modules=[MethodModule(...)])``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerBase

from sempa_st.errors import SempaError
from sempa_st.forward.packing import can_pack
from sempa_st.methods.encoders import PromptBERT
from sempa_st.methods.method import MASK, PLACEHOLDER, Batch, Method, Rendered
from sempa_st.methods.registry import parse_method
from sempa_st.model.peft_models import ADAPTER_CONFIG, is_peft_model, load_adapter
from sempa_st.model.prompt_eol import DEFAULT_MAX_SEQ_LENGTH, embedding_width, position_limit, save_model
from sempa_st.model.token_rows import fitting, sentence_in, tokenize
from sempa_st.model.tokenizer import load_tokenizer, save_tokenizer


class MethodModule(InputModule):
    """Embed sentences by one of the methods.

    Args:
        model: Causal language model, or a PEFT model around one; an encoder if the method is for encoders.
        tokenizer: Its tokenizer, a fast one.
        method: Name and settings of the method, as :func:`parse_method` reads them.
        max_seq_length: Longest text in tokens; a longer *sentence* is cut, never the text around it.

    Raises:
        SempaError: If the method is unknown, or does not apply to this model or tokenizer.
    """

    config_file_name = "sempa_method.json"
    forward_kwargs: set[str] = {"token_embeddings"}  # noqa: RUF012 (a list of names that nothing changes)
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        method: str,
        *,
        max_seq_length: int = DEFAULT_MAX_SEQ_LENGTH,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.method = method
        self.max_seq_length = max_seq_length
        self._method: Method = parse_method(method)
        self._method.check(self.decoder)
        if not tokenizer.is_fast:
            raise SempaError(
                f"{type(tokenizer).__name__} is a slow tokenizer and gives no character offsets, which {method} needs. "
                "Use a fast tokenizer."
            )
        if isinstance(self._method, PromptBERT) and tokenizer.mask_token is None:
            raise SempaError(
                f"{type(model).__name__} has no mask token, which {method} needs. Use a masked language model."
            )

    @property
    def decoder(self) -> Any:
        """The model without its head, adapter included."""
        whole = self.model.get_base_model() if is_peft_model(self.model) else self.model
        return whole.base_model

    @property
    def never_zero(self) -> bool:
        """Whether no text has a vector of zeros; less that of its template, an empty one has."""
        return not isinstance(self._method, PromptBERT)

    @property
    def packs_batches(self) -> bool:
        """Whether a batch should hold sentences that begin alike: the method packs them."""
        return self._method.packs and can_pack(self.decoder, 1)

    def get_embedding_dimension(self) -> int:
        """Return the width of the embedding."""
        return embedding_width(self.decoder.config)

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Render, tokenise, cut and pad sentences.

        Args:
            inputs: Sentences, each a string or ``{"text": string}``.
            prompt: Instruction put right before each sentence.
            **kwargs: Ignored; sentence-transformers passes its task here.

        Returns:
            The tensors of :class:`Batch`; those of a method's other texts have a number after their names.

        Raises:
            ValueError: If an input is not a sentence.
        """
        texts = [self._fitting(f"{prompt or ''}{sentence_in(text)}") for text in inputs]
        features: dict[str, Tensor] = {}
        for number, sequences in enumerate(zip(*texts, strict=True)):
            features |= {_key(name, number): tensor for name, tensor in self._tensors(sequences).items()}
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``sentence_embedding`` of shape (batch, hidden) to ``features``, in float32.

        Raises:
            ValueError: If the caller wants token embeddings.
        """
        if kwargs.get("token_embeddings"):
            raise ValueError(f"The method {self.method!r} gives one vector a sentence, and no token embeddings.")
        features["sentence_embedding"] = self._method.vectors(self.decoder, *batches_in(features)).float()
        return features

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings."""
        return {"method": self.method, "max_seq_length": self.max_seq_length}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Save the model, the tokenizer and the settings."""
        save_model(self.model, output_path)
        save_tokenizer(self.tokenizer, output_path)
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> MethodModule:  # type: ignore[override]
        """Load what :meth:`save` wrote; arguments as for any module."""
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        here = {name: kwargs[name] for name in names if name in kwargs}
        folder = cls.load_dir_path(model_name_or_path, **here)
        assert folder is not None
        has_adapter = Path(folder, ADAPTER_CONFIG).is_file()
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path if has_adapter else folder
        # Trust in this folder says nothing about the base that it names.
        trust = {"trust_remote_code": bool(kwargs.get("trust_remote_code")) and not has_adapter}
        arguments = {**trust, **(kwargs.get("config_kwargs") or {}), **(kwargs.get("model_kwargs") or {})}
        settings = cls.load_config(model_name_or_path, **here)
        kind = AutoModel if parse_method(settings["method"]).for_encoders else AutoModelForCausalLM
        model: Any = kind.from_pretrained(base, use_safetensors=True, **arguments)
        if has_adapter:
            model = load_adapter(model, folder)
        return cls(model.eval(), load_tokenizer(folder), **settings)

    @cached_property
    def _placing_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer with the placeholder as an added token, as the authors of Token Prepending tokenise."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.add_tokens([PLACEHOLDER])
        return tokenizer

    @cached_property
    def _position_limit(self) -> int | None:
        """Most tokens that have a position; those of RoBERTa and its kin begin after the padding token's id."""
        limit = position_limit(self.decoder.config)
        tables = [part for name, part in self.decoder.named_modules() if name.endswith("position_embeddings")]
        first = next((table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None), -1)
        return limit and limit - first - 1

    def _fitting(self, sentence: str) -> list[dict[str, list[int]]]:
        """Return the sequences of a sentence's texts; the sentence is cut at its end if one of them is too long."""
        while True:
            sequences = [self._sequence(text) for text in self._method.render(sentence)]
            # A placeholder is not part of the text, but takes a position.
            longest = max(len(sequence["input_ids"]) for sequence in sequences)
            text = max(len(sequence["input_ids"]) - sum(sequence["placeholder"]) for sequence in sequences)
            excess = max(text - self.max_seq_length, longest - (self._position_limit or longest))
            if excess <= 0 or not sentence:
                return sequences
            ((_, spans),) = tokenize(self.tokenizer, [sentence], add_special_tokens=False)
            kept = max(0, len(spans) - max(1, excess // 2))  # a text may hold the sentence twice
            sentence = sentence[: spans[kept][0]]

    def _tensors(self, sequences: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        width = max(len(sequence["input_ids"]) for sequence in sequences)
        tensors = {}
        for name in Batch._fields:
            filler = self.tokenizer.pad_token_id if name == "input_ids" else 0
            values = [sequence[name] for sequence in sequences]
            padding = [[filler] * (width - len(own)) for own in values]
            # On the right for an encoder, whose positions count from the left edge.
            left, right = (values, padding) if self._method.for_encoders else (padding, values)
            tensors[name] = torch.tensor([first + second for first, second in zip(left, right, strict=True)])
        return tensors

    def _sequence(self, text: Rendered) -> dict[str, list[int]]:
        whole = text.text.replace(MASK, self.tokenizer.mask_token or MASK)
        tokenizer = self._placing_tokenizer if text.has_placeholder else self.tokenizer
        ((ids, spans),) = tokenize(tokenizer, [whole], add_special_tokens=True)
        placeholder = [0] * len(ids)
        if text.has_placeholder:
            token: Any = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
            placeholder[ids.index(token)] = 1
            ids = [self.tokenizer.eos_token_id if one == token else one for one in ids]
        (ids,) = fitting(self.tokenizer, [ids], self.decoder)
        if not ids:  # an empty text where the tokenizer adds no BOS
            ids, spans, placeholder = [self.tokenizer.eos_token_id], [(0, 0)], [0]
        last = [0] * (len(ids) - 1) + [1]
        read = last if text.read is None else _marked(spans, text.read)
        hidden = _marked(spans, text.hidden or (0, 0))
        if not any(read):
            read[-1] = 1  # an empty sentence has no tokens
        return dict(zip(Batch._fields, (ids, [1] * len(ids), read, placeholder, hidden), strict=True))


def _marked(spans: Sequence[tuple[int, int]], characters: tuple[int, int]) -> list[int]:
    """Return 1 for each token that covers one of the characters, else 0."""
    start, end = characters
    return [int(first < min(end, last) and last > start) for first, last in spans]


def batches_in(features: dict[str, Any]) -> list[Batch]:
    """Return the batches that :meth:`MethodModule.preprocess` put into ``features``, one per text of the method."""
    batches: list[Batch] = []
    while _key("input_ids", len(batches)) in features:
        batches.append(Batch(**{name: features[_key(name, len(batches))] for name in Batch._fields}))
    return batches


def _key(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name
