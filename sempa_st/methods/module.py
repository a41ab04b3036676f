"""A method as a module of sentence-transformers: ``SentenceTransformer(modules=[MethodModule(...)])``."""

from __future__ import annotations

from collections.abc import Sequence
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
from sempa_st.methods.method import MASK, Method, Rendered, Rows
from sempa_st.methods.registry import parse_method
from sempa_st.model.peft_models import ADAPTER_CONFIG, is_peft_model, load_adapter
from sempa_st.model.prompt_eol import DEFAULT_MAX_SEQ_LENGTH, embedding_width, position_limit, save_model
from sempa_st.model.token_rows import fitting, sentence_in, tokenize
from sempa_st.model.tokenizer import load_tokenizer, save_tokenizer


class MethodModule(InputModule):
    """Embed sentences with a model by one of the methods.

    Args:
        model: Causal language model, or a PEFT model around one; an encoder, for a method for encoders.
        tokenizer: Its tokenizer, a fast one.
        method: Method with its settings, as :func:`parse_method` takes it.
        max_seq_length: Longest text in tokens; a longer *sentence* is cut, never what stands around it.

    Raises:
        SempaError: If the method is unknown, or cannot be applied to this model.
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
                f"{type(tokenizer).__name__} is written in Python and does not tell which characters a token stands "
                f"for, which {method} needs. Use a fast tokenizer."
            )
        if isinstance(self._method, PromptBERT) and tokenizer.mask_token is None:
            raise SempaError(f"{type(model).__name__} has no mask token, which {method} reads. Use one that has.")

    @property
    def decoder(self) -> Any:
        """The model without its head, adapter included."""
        whole = self.model.get_base_model() if is_peft_model(self.model) else self.model
        return whole.base_model

    @property
    def packs_batches(self) -> bool:
        """Whether a batch is best made of sentences that begin alike: the method runs them in packs."""
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
            The tensors of :class:`Rows`, those of a method's further texts with a number before their names.

        Raises:
            ValueError: If an input is no sentence.
        """
        texts = [self._fitting(f"{prompt or ''}{sentence_in(text)}") for text in inputs]
        features: dict[str, Tensor] = {}
        for number, rows in enumerate(zip(*texts, strict=True)):
            features |= {_key(name, number): tensor for name, tensor in self._tensors(rows).items()}
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``sentence_embedding`` of shape (batch, hidden) to ``features``, in float32.

        Raises:
            ValueError: If token embeddings are asked for.
        """
        if kwargs.get("token_embeddings"):
            raise ValueError(f"The method {self.method!r} gives one vector a sentence, and no token embeddings.")
        features["sentence_embedding"] = self._method.vectors(self.decoder, *rows_in(features)).float()
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
        adapted = Path(folder, ADAPTER_CONFIG).is_file()
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path if adapted else folder
        # Whoever trusts this folder has said nothing of the base that it names.
        trust = {"trust_remote_code": bool(kwargs.get("trust_remote_code")) and not adapted}
        arguments = {**trust, **(kwargs.get("config_kwargs") or {}), **(kwargs.get("model_kwargs") or {})}
        settings = cls.load_config(model_name_or_path, **here)
        kind = AutoModel if parse_method(settings["method"]).for_encoders else AutoModelForCausalLM
        model: Any = kind.from_pretrained(base, use_safetensors=True, **arguments)
        if adapted:
            model = load_adapter(model, folder)
        return cls(model.eval(), load_tokenizer(folder), **settings)

    def _fitting(self, sentence: str) -> list[dict[str, list[int]]]:
        """Return the rows of a sentence's texts, the sentence cut at its end where one of them is too long."""
        while True:
            rows = [self._row(text) for text in self._method.render(sentence)]
            # A placeholder is no part of the text, and has a position all the same.
            longest = max(len(row["input_ids"]) for row in rows)
            text = max(len(row["input_ids"]) - sum(row["placeholder"]) for row in rows)
            excess = max(text - self.max_seq_length, longest - (position_limit(self.decoder.config) or longest))
            if excess <= 0 or not sentence:
                return rows
            ((_, spans),) = tokenize(self.tokenizer, [sentence], add_special_tokens=False)
            kept = max(0, len(spans) - max(1, excess // 2))  # a text may hold the sentence twice
            sentence = sentence[: spans[kept][0]]

    def _tensors(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        tensors = {}
        for name in Rows._fields:
            filler = self.tokenizer.pad_token_id if name == "input_ids" else 0
            padding = [[filler] * (width - len(row[name])) for row in rows]
            pairs = zip(rows, padding, strict=True)
            # Positions of an encoder count from the left edge.
            sides = ((row[name], pad) if self._method.for_encoders else (pad, row[name]) for row, pad in pairs)
            tensors[name] = torch.tensor([first + second for first, second in sides])
        return tensors

    def _row(self, text: Rendered) -> dict[str, list[int]]:
        whole = text.text.replace(MASK, self.tokenizer.mask_token or MASK)
        ((ids, spans),) = tokenize(self.tokenizer, [whole], add_special_tokens=True)
        (ids,) = fitting(self.tokenizer, [ids], self.decoder)
        if not ids:  # an empty text where the tokenizer adds no BOS
            ids, spans = [self.tokenizer.eos_token_id], [(0, 0)]
        last = [int(place == len(ids) - 1) for place in range(len(ids))]
        read = last if text.read is None else _marked(spans, text.read)
        hidden = _marked(spans, text.hidden or (0, 0))
        placeholder = [0] * len(ids)
        if text.placeholder is not None:
            place = next(place for place, (_, end) in enumerate(spans) if end > text.placeholder)
            for row, value in ((ids, self.tokenizer.eos_token_id), (read, 0), (hidden, 0), (placeholder, 1)):
                row.insert(place, value)
        if not any(read):
            read[-1] = 1  # the empty sentence has no token of its own
        return dict(zip(Rows._fields, (ids, [1] * len(ids), read, placeholder, hidden), strict=True))


def _marked(spans: Sequence[tuple[int, int]], characters: tuple[int, int]) -> list[int]:
    """Return 1 for each token that holds one of the characters, else 0."""
    start, end = characters
    return [int(first < min(end, last) and last > start) for first, last in spans]


def rows_in(features: dict[str, Any]) -> list[Rows]:
    """Return what :meth:`MethodModule.preprocess` put into ``features``, text by text."""
    rows: list[Rows] = []
    while _key("input_ids", len(rows)) in features:
        rows.append(Rows(**{name: features[_key(name, len(rows))] for name in Rows._fields}))
    return rows


def _key(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name
