"""Check that texts can be encoded and that vectors are finite; errors name the offending ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sempa_st.errors import SempaError, list_first
from sempa_st.utils.files import lone_surrogates


def check_texts(texts: Sequence[Any]) -> None:
    """Raise :class:`SempaError` if a text contains a lone surrogate; the message names the first by index, from 0."""
    bad = [(index, text) for index, text in enumerate(texts) if isinstance(text, str) and lone_surrogates(text)]
    if bad:
        raise SempaError(
            f"{len(bad)} of {len(texts)} text(s) contain a lone surrogate, which no tokenizer can "
            f"encode: {_shown(bad, 'text')}. Fix or remove them."
        )


OVERFLOW_ADVICE = (
    "Many models overflow in float16: choose dtype float32 or bfloat16. With those dtypes, the model has diverged or "
    "its files are damaged."
)


_NOT_FINITE = "contain infinite or NaN values"
_ZERO = "are zero, as of a norm beyond the range of the type"


class NotFiniteError(SempaError):
    """Error for vectors with infinite or NaN values, or that were divided by an infinite norm.

    Args:
        bad: Index and content of each text with such a vector.
        total: Number of vectors that were checked.
        word: Noun for the index in the message, such as ``text`` or ``row``.
        fault: What the vectors do, in the plural.
    """

    def __init__(
        self, bad: Sequence[tuple[int, Any]], total: int, word: str = "text", fault: str = _NOT_FINITE
    ) -> None:
        super().__init__(f"{len(bad)} of {total} vector(s) {fault}: of {_shown(bad, word)}. {OVERFLOW_ADVICE}")
        self.bad = list(bad)
        self.texts = [text for _, text in bad]
        self.total = total
        self.fault = fault

    @property
    def spreads(self) -> bool:
        """Whether the fault of one text may spread to others of its pack: NaN does."""
        return self.fault == _NOT_FINITE

    def naming(self, bad: Sequence[tuple[int, Any]], total: int, word: str = "text") -> NotFiniteError:
        """Return an error for the same fault that names other texts, or names them in another way."""
        return NotFiniteError(bad, total, word, self.fault)


def check_finite(vectors: Any, texts: Sequence[Any], *, nonzero: bool = False) -> None:
    """Raise :class:`NotFiniteError` if a vector contains infinite or NaN values; the message names the first.

    Args:
        vectors: Array or tensor of shape (texts, width).
        texts: Texts that the vectors embed.
        nonzero: Raise it also for a vector of zeros.
    """
    import torch

    tensor = torch.as_tensor(vectors)
    if not tensor.is_floating_point():
        return

    def check(faulty: torch.Tensor, fault: str) -> None:
        if bad := faulty.nonzero().flatten().tolist():
            raise NotFiniteError([(index, texts[index]) for index in bad], len(tensor), fault=fault)

    # Cheap tests: the sum is finite for all usual vectors (in float32, since MPS has no float64), and a vector of zeros
    # begins with one. Asking once for both, a GPU is waited for once.
    suspicious = ~tensor.sum(dtype=torch.float32).isfinite()
    if nonzero:
        suspicious |= (tensor[..., 0] == 0).any()
    if suspicious:
        check((~tensor.isfinite()).any(dim=-1), _NOT_FINITE)
        if nonzero:
            check(~tensor.any(dim=-1), _ZERO)


def _shown(bad: Sequence[tuple[int, Any]], word: str) -> str:
    return list_first([f"{word} {index} ({text!a:.60})" for index, text in bad], 3)
