"""The PromptEOL module for sentence-transformers: a decoder, a template, and last-token pooling.

This file and the others in :data:`SOURCES` need nothing else of sempa_st. A model folder of format ``custom`` carries
copies of them, which ``SentenceTransformer(folder, trust_remote_code=True)`` runs where sempa_st is not installed. The
template itself is data: a named chat template of the folder's tokenizer.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .patching import patch_alora
from .peft_models import ADAPTER_CONFIG, ADAPTER_WEIGHTS, alora_on_last, invocation_tokens, is_peft_model, load_adapter
from .token_rows import common_prefix, fitting, pad_rows, sentence_in, tokenize

DEFAULT_MAX_SEQ_LENGTH = 512
SOURCES = ("prompt_eol.py", "patching.py", "peft_models.py", "token_rows.py")
"""Source files in a folder of format ``custom``."""


class ForwardRows(Protocol):
    """A forward strategy: computes the last tokens' hidden states of a batch. An object that can be pickled."""

    def __call__(self, module: PromptEOL, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return what :func:`embed_rows` returns, of shape (batch, hidden)."""

    def packs_batches(self, module: PromptEOL) -> bool:
        """Whether it is faster on a batch of sentences with a common prefix."""


class PromptEOL(InputModule):
    """Embed a sentence by last-token pooling of a decoder under a one-word template (PromptEOL).

    Args:
        model: Causal language model, or a PEFT model around one; it stays a generator (``module.model.generate``).
        tokenizer: Its tokenizer, with the template among its named chat templates. Either padding side works.
        template: Name of that chat template.
        max_seq_length: Longest input in tokens, template included; a longer *sentence* is cut, never the template. A
            model with fewer positions lowers it to their number.
        forward_rows: Forward strategy for the same hidden states of the last tokens; None runs the padded batch.

    Raises:
        ValueError: If the tokenizer has no chat template of that name.
    """

    config_file_name = "sentence_bert_config.json"
    never_zero = True  # while other models give zeros for a text without known words
    forward_kwargs: set[str] = {"token_embeddings"}  # noqa: RUF012 (a list of names that nothing changes)
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = "prompteol",
        max_seq_length: int = DEFAULT_MAX_SEQ_LENGTH,
        forward_rows: ForwardRows | None = None,
    ) -> None:
        super().__init__()
        patch_alora(model)
        named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
        if template not in named:
            raise ValueError(f"The tokenizer has no chat template named {template!r}, only {sorted(named)}.")
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self._suffix: list[int] | None = None
        self.max_seq_length = max_seq_length
        self.forward_rows = forward_rows

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The layers with the LM head, adapter included but not PEFT's wrapper."""
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    @property
    def decoder(self) -> PreTrainedModel:
        """The layers without the LM head, adapter included."""
        whole = self.causal_lm
        found = (whole.base_model, *whole.children())  # Llama 4's class has another name for it
        return next(part for part in found if isinstance(part, PreTrainedModel) and part is not whole)

    @property
    def num_suffix_tokens(self) -> int:
        """Length of the template's suffix if an activated adapter acts on it alone; else 0."""
        invocation = invocation_tokens(self.model)
        is_prefix = invocation and self._token_ids(["0"], None)[0][: len(invocation)] == invocation
        return 0 if is_prefix else len(invocation)

    @property
    def max_seq_length(self) -> int:
        """Longest input in tokens, template included."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        value = within_positions(value, self.decoder.config)
        shortest = len(self._token_ids([""], None)[0]) + 1
        if value < shortest:
            raise ValueError(
                f"max_seq_length {value} leaves no room for a sentence. Expected at least {shortest}: the template "
                "and one token."
            )
        self._max_seq_length = value

    @property
    def packs_batches(self) -> bool:
        """Whether a batch should hold sentences with a common prefix."""
        return self.forward_rows is not None and self.forward_rows.packs_batches(self)

    def get_embedding_dimension(self) -> int:
        """Return the width of the embedding."""
        return embedding_width(self.decoder.config)

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Render, tokenise, cut and pad sentences.

        Args:
            inputs: Sentences, each a string or ``{"text": string}``. The text of a special token becomes that token, as
                in any call of the tokenizer.
            prompt: Instruction put right before each sentence, inside the template's quotes.
            **kwargs: Ignored; sentence-transformers passes its task here.

        Returns:
            ``input_ids`` and ``attention_mask``, each of shape (batch, seq_len), padded on the right: from token
            embeddings sentence-transformers removes padding on that side only.

        Raises:
            ValueError: If an input is not a sentence.
        """
        return pad_rows(self.tokenizer, self.token_rows([sentence_in(text) for text in inputs], prompt), "right")

    def token_rows(self, sentences: Sequence[str], prompt: str | None = None) -> list[list[int]]:
        """Return the token ids of sentences under the template, cut to ``max_seq_length``."""
        return [self._cut(ids) for ids in self._token_ids(sentences, prompt)]

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``sentence_embedding`` of shape (batch, hidden) to ``features``, in float32.

        Without ``forward_rows``, or if the caller passes ``token_embeddings=True``, add ``token_embeddings`` of shape
        (batch, seq_len, hidden) too.
        """
        ids, mask = features["input_ids"], features["attention_mask"]
        if self.forward_rows is None or kwargs.get("token_embeddings"):
            features["token_embeddings"] = token_states(self, ids, mask)
            embedding = _pool_last(features["token_embeddings"], mask)
        else:
            embedding = self.forward_rows(self, ids, mask)
        # A norm or mean in 16 bits is wrong in the third decimal.
        features["sentence_embedding"] = embedding.float()
        return features

    def _token_ids(self, sentences: Sequence[str], prompt: str | None) -> list[list[int]]:
        system = [{"role": "system", "content": prompt}] if prompt else []
        conversations = [[*system, {"role": "user", "content": sentence}] for sentence in sentences]
        texts: Any = self.tokenizer.apply_chat_template(conversations, chat_template=self.template, tokenize=False)
        sequences = [ids for ids, _ in tokenize(self.tokenizer, texts, add_special_tokens=False)]
        return fitting(self.tokenizer, sequences, self.decoder)

    def _cut(self, ids: list[int]) -> list[int]:
        # At exactly the limit sentence-transformers cannot tell a cut sequence from a whole one, and replaces its end.
        if len(ids) < self.max_seq_length:
            return ids
        if self._suffix is None:
            # The common end of two different sentences: tokens may merge where sentence and template meet.
            reversed_ids = [own[::-1] for own in self._token_ids(["0", "1 2 3 4"], None)]
            self._suffix = reversed_ids[0][: common_prefix(reversed_ids)][::-1]
        return ids[: self.max_seq_length - len(self._suffix)] + self._suffix

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, which a plain ``Transformer`` module reads too."""
        return transformer_config(self.template, self.max_seq_length)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Save the model (of a PEFT model only the adapter), the tokenizer, the settings and the source files."""
        save_model(self.model, output_path)
        self.tokenizer.save_pretrained(output_path)
        self.save_config(output_path)
        copy_sources(output_path)

    @classmethod
    def load(  # type: ignore[override]
        cls, model_name_or_path: str, subfolder: str = "", cache_folder: str | None = None, **kwargs: Any
    ) -> PromptEOL:
        """Load a folder or Hub repository of format ``native`` or ``custom``; arguments as for any module.

        Raises:
            ValueError: If the backend is not torch, the folder names no template, or the adapter does not fit.
        """
        if (backend := kwargs.get("backend", "torch")) != "torch":
            raise ValueError(f"PromptEOL runs on the torch backend only, got {backend!r}.")
        hub = {name: value for name, value in kwargs.items() if name in ("token", "revision", "local_files_only")}
        here: dict[str, Any] = {"subfolder": subfolder, "cache_folder": cache_folder, **hub}
        config = cls.load_config(model_name_or_path, **here)
        template = config.get("processing_kwargs", {}).get("chat_template", {}).get("chat_template")
        if template is None:
            raise ValueError(f"{model_name_or_path} names no embedding template in {cls.config_file_name}.")
        trusted = bool(kwargs.get("trust_remote_code"))  # at None, transformers would ask on standard input
        files = {"subfolder": subfolder, "cache_dir": cache_folder, "trust_remote_code": trusted, **hub}
        of_tokenizer = files | (kwargs.get("processor_kwargs") or {})
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **of_tokenizer)
        adapter = cls.load_file_path(model_name_or_path, ADAPTER_WEIGHTS, **here)
        base_model = model_name_or_path
        if adapter is not None:
            config_path = cls.load_file_path(model_name_or_path, ADAPTER_CONFIG, **here)
            if config_path is None:
                raise ValueError(f"{model_name_or_path} holds {ADAPTER_WEIGHTS} but no {ADAPTER_CONFIG}.")
            from peft import PeftConfig

            base_model = PeftConfig.from_pretrained(str(Path(config_path).parent)).base_model_name_or_path
            files = {"cache_dir": cache_folder, **hub, "revision": None, "trust_remote_code": False}
        own = (kwargs.get("config_kwargs") or {}) | (kwargs.get("model_kwargs") or {})
        model = AutoModelForCausalLM.from_pretrained(base_model, **{"use_safetensors": True, **files, **own})
        if adapter is not None:
            model = load_adapter(model, Path(adapter).parent)
        length = config.get("max_seq_length") or DEFAULT_MAX_SEQ_LENGTH
        return cls(model.eval(), tokenizer, template=template, max_seq_length=length)


def copy_sources(folder: str | Path) -> None:
    """Copy this file and those that it needs into a model folder."""
    for name in SOURCES:
        source, target = Path(__file__).with_name(name), Path(folder, name)
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)


def embed_rows(module: PromptEOL, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the last tokens' hidden states, of shape (batch, hidden)."""
    return _pool_last(token_states(module, input_ids, attention_mask), attention_mask)


def token_states(module: PromptEOL, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the last hidden states of all tokens, of shape (batch, seq_len, hidden)."""
    # Positions count real tokens only, so that padding on the left does not shift learned position embeddings.
    accepts_position_ids = "position_ids" in inspect.signature(module.decoder.forward).parameters
    positions = {"position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)} if accepts_position_ids else {}
    suffix, width = module.num_suffix_tokens, attention_mask.shape[1]
    padding = width - 1 - _last_positions(attention_mask)  # on the right
    # Per sequence, the number of tokens at the row's end on which the aLoRA acts, right padding included.
    with alora_on_last(module.model, (padding + suffix).tolist() if suffix else [width] * len(padding)):
        output = module.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions)
    return output.last_hidden_state


def _pool_last(states: Tensor, attention_mask: Tensor) -> Tensor:
    return states[torch.arange(len(states), device=states.device), _last_positions(attention_mask)]


def _last_positions(attention_mask: Tensor) -> Tensor:
    return (attention_mask * torch.arange(attention_mask.shape[1], device=attention_mask.device)).argmax(dim=1)


def position_limit(config: Any) -> int | None:
    """Return the size of a decoder's table of position embeddings; None if it has none (rotary, ALiBi)."""
    text_config = config.get_text_config()
    rotates = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_theta", None)
    return None if rotates else getattr(text_config, "max_position_embeddings", None)


def within_positions(tokens: int, config: Any) -> int:
    """Return a number of tokens, lowered to :func:`position_limit`."""
    return min(tokens, position_limit(config) or tokens)


def embedding_width(config: Any) -> int:
    """Return the width of a decoder's last hidden state, which OPT-350M projects down after the layers."""
    text_config = config.get_text_config()
    return int(getattr(text_config, "word_embed_proj_dim", None) or text_config.hidden_size)


def transformer_config(template: str, max_seq_length: int) -> dict[str, Any]:
    """Return the settings that make a plain sentence-transformers ``Transformer`` apply the chat template."""
    read = {"method": "forward", "method_output_name": "last_hidden_state"}
    return {
        "transformer_task": "feature-extraction",
        # Without both entries it applies no template to text.
        "modality_config": {"text": read, "message": {**read, "format": "flat"}},
        "module_output_name": "token_embeddings",
        "processing_kwargs": {"chat_template": {"chat_template": template}},
        "max_seq_length": max_seq_length,
    }


def save_model(model: Any, folder: str | Path) -> None:
    """Save a causal language model with its LM head, or only the adapter of a PEFT model."""
    # A frozen embedding belongs to the base. With "auto", PEFT asks the Hub whether it was resized.
    only_adapter = {"save_embedding_layers": False} if is_peft_model(model) else {}
    model.save_pretrained(folder, **only_adapter)
