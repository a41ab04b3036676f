"""The layer curve: how well the last token's hidden state embeds at each layer of the decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sempa_st.analysis.ranks import Values, checked_gold, spearman
from sempa_st.data.sts import GradedPairs
from sempa_st.errors import SempaError
from sempa_st.forward.batching import group_by_length
from sempa_st.forward.decoder import layers_of
from sempa_st.forward.embed import can_pack_rows
from sempa_st.forward.packing import states_packed, unpadded
from sempa_st.forward.sentence_transformers import reads_prompt_eol
from sempa_st.model.patching import edited
from sempa_st.model.peft_models import alora_on_last, is_peft_model
from sempa_st.model.prompt_eol import PromptEOL, embedding_width, token_states
from sempa_st.model.token_rows import pad_rows

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_BATCH_BYTES = 1 << 27
"""Size of the hidden states of one batch, all layers together."""


@dataclass(frozen=True)
class LayerCurve:
    """Spearman correlations, times 100, of the embeddings read at each layer.

    Args:
        name: Name of the model.
        scores: One score a layer, from the first layer's output to the last layer's with the final norm.
    """

    name: str
    scores: list[float]

    @property
    def best(self) -> int:
        """The layer with the highest score, counted from 1; the last one of equals."""
        return len(self.scores) - int(np.nanargmax(self.scores[::-1]))


Keep = Callable[[Sequence[str], NDArray[np.float32]], None]
"""Takes sentences and their embeddings, of shape (sentences, hidden)."""


def layer_curve(
    name: str,
    model: SentenceTransformer,
    pairs: GradedPairs,
    *,
    report: Callable[[int], None] | None = None,
    keep: Keep | None = None,
) -> LayerCurve:
    """Score the embedding read at each layer on graded pairs.

    Args:
        name: Name of the curve.
        model: What :func:`sempa_st.load` returns for a SemPA folder or a base without a method.
        pairs: Graded pairs.
        report: Called after each batch with its number of pairs.
        keep: Called for each batch with sentences and the embeddings that the model gives for them.

    Raises:
        SempaError: If the model is no PromptEOL module, the pairs cannot be ranked, or a vector is not finite.
    """
    gold = checked_gold(pairs)
    cosines = layer_cosines(model, pairs, report=report, keep=keep)
    odd = np.argwhere(~np.isfinite(cosines))
    if odd.size:
        layer, pair = odd[0]
        raise SempaError(f"{name}: the cosine of pair {pair + 1} at layer {layer + 1} is {cosines[layer, pair]}.")
    return LayerCurve(name, [spearman(row, gold) for row in cosines])


@torch.no_grad()
def layer_cosines(
    model: SentenceTransformer,
    pairs: GradedPairs,
    *,
    report: Callable[[int], None] | None = None,
    keep: Keep | None = None,
) -> Values:
    """Return the cosine of each pair at each layer, of shape (layers, pairs), from one forward pass a sentence.

    Row l - 1 is the last token's output of layer l. The last row has the final norm, since it is the embedding that
    the model gives. The others are without it, as in transformers' ``hidden_states`` and in ``--method
    prompteol:layer=l``: the final norm is trained on the last layer's output alone. Only cosines are kept; the hidden
    states of a batch take about 128 MiB.

    Args:
        model: As for :func:`layer_curve`.
        pairs: Graded pairs; the scores are not used.
        report: As for :func:`layer_curve`.
        keep: As for :func:`layer_curve`.

    Raises:
        SempaError: If the model is no PromptEOL module.
    """
    module = prompt_eol_of(model)
    depth = len(layers_of(module.decoder))
    prompt = model.prompts.get(model.default_prompt_name or "")
    sides = [module.token_rows(sentences, prompt) for sentences in (pairs.first, pairs.second)]
    lengths = [2 * max(map(len, rows)) for rows in zip(*sides, strict=True)]
    width = embedding_width(module.decoder.config) * module.decoder.dtype.itemsize
    cosines = np.empty((depth, len(pairs)))
    for batch in group_by_length(lengths, max_tokens=max(1, _BATCH_BYTES // (width * (depth + 1)))):
        rows = pad_rows(module.tokenizer, [side[index] for side in sides for index in batch], "right")
        states = _last_token_states(module, rows["input_ids"], rows["attention_mask"])[..., : model.truncate_dim]
        if keep:
            keep([side[index] for side in (pairs.first, pairs.second) for index in batch], states[-1].cpu().numpy())
        first, second = states.double().chunk(2, dim=1)
        cosines[:, batch] = torch.cosine_similarity(first, second, dim=-1).cpu().numpy()
        if report:
            report(len(batch))
    return cosines


def prompt_eol_of(model: SentenceTransformer) -> PromptEOL:
    """Return the first module of a model; raises :class:`SempaError` unless :func:`reads_prompt_eol`."""
    if not reads_prompt_eol(model):
        raise SempaError(
            "The layers of a model are read under its embedding template, which this one does not have. Expected a "
            "SemPA folder, or a base without --method."
        )
    module = model[0]
    assert isinstance(module, PromptEOL)
    return module


def without_adapter(model: SentenceTransformer) -> AbstractContextManager[Any] | None:
    """Return a context in which a model is its base, or None if it has no adapter that can be switched off."""
    decoder = prompt_eol_of(model).model
    return decoder.disable_adapter() if is_peft_model(decoder) else None


def _last_token_states(module: PromptEOL, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the last token's hidden state at each layer, of shape (layers, batch, hidden), in float32.

    Where the decoder allows it, what the rows begin with alike runs once, and no padding runs.
    """
    decoder = module.decoder
    with _all_hidden_states(decoder) as found:
        if can_pack_rows(module, int(attention_mask.sum(dim=1).max())):
            with alora_on_last(module.model, None):
                packed = states_packed(decoder, unpadded(input_ids, attention_mask))
            last = torch.stack([indices[-1] for indices in packed.indices])
            states = packed.states[last]
        else:
            whole = token_states(module, input_ids.to(decoder.device), attention_mask.to(decoder.device))
            width = whole.shape[1]
            last = torch.arange(len(whole)) * width + attention_mask.sum(dim=1) - 1
            states = whole.flatten(0, 1)[last]
    # A prefix that all rows share may run in a call of its own, before the one with the last tokens.
    prefix = sum(hidden[0].shape[:2].numel() for hidden in found[:-1])
    # Some decoders list their last layer without the final norm.
    inner = [layer.flatten(0, 1)[last - prefix] for layer in found[-1][1:-1]]
    return torch.stack([*inner, states]).float()


@contextmanager
def _all_hidden_states(decoder: Any) -> Iterator[list[tuple[Tensor, ...]]]:
    """Let a decoder return its hidden states; those of each call are in the list that is yielded."""
    found: list[tuple[Tensor, ...]] = []

    def ask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "output_hidden_states": True}

    def keep(output: Any) -> Any:
        found.append(output.hidden_states)
        return output

    with edited(decoder, before=ask, after=keep):
        yield found
