"""Plain DPO with TRL's trainer; the prompt that chosen and rejected answer share is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from typing import Any

import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl import DPOTrainer

from sempa_st.model.patching import completion_tokens_only, replaced
from sempa_st.model.peft_models import is_peft_model
from sempa_st.model.token_rows import embedding_count, fitting
from sempa_st.training.dev_score import DevScoreTrainer
from sempa_st.training.forward import shared_states
from sempa_st.training.reference import REFERENCE, cached_tensor

_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
_REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


class PreferenceTrainer(DevScoreTrainer, DPOTrainer):
    """DPO on preference data, evaluated by the dev score.

    The reference model runs once, before training. Its log-probabilities are cached on disk for later runs on the same
    base and data.

    Args:
        reference_identity: Everything that determines the reference log-probabilities, the key of the cache.
        **kwargs: Arguments of TRL's trainer, with ``precompute_ref_log_probs`` set, and of :class:`DevScoreTrainer`.
    """

    def __init__(self, *, reference_identity: dict[str, Any], **kwargs: Any) -> None:
        self._reference_identity = reference_identity
        super().__init__(**kwargs)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        # TRL caches its results next to a data set on disk; this one is in memory.
        if name == "eval":
            return dataset  # not used: see DevScoreTrainer
        dataset = self._with_embeddings(dataset)
        main = self.accelerator.is_main_process
        log_probabilities = cached_tensor(
            REFERENCE, self._reference_identity, lambda: self._run_reference(dataset, batch_size), write=main
        )
        for column, values in zip(_REFERENCE_COLUMNS, log_probabilities.T.tolist(), strict=True):
            dataset = dataset.add_column(column, values)
        return dataset

    def _with_embeddings(self, dataset: Any) -> Any:
        """Replace tokens that have no embedding (:func:`sempa_st.model.token_rows.fitting`), which TRL does not."""
        rows = embedding_count(self.generator())
        for column in _TOKENS:
            if (pc.max(pc.list_flatten(dataset.data[column])).as_py() or 0) >= rows:
                fit = fitting(self.processing_class, list(dataset[column]), self.generator())
                dataset = dataset.remove_columns(column).add_column(column, fit)
        return dataset

    def _run_reference(self, dataset: Any, batch_size: int) -> Tensor:
        """Return the log-probabilities of chosen and rejected, of shape (examples, 2); batches are sorted by length."""
        order = torch.tensor(
            [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in dataset]
        ).argsort()
        loader = self.accelerator.prepare(
            DataLoader(dataset.select(order.tolist()), batch_size, collate_fn=self.data_collator)
        )
        hidden = not self.accelerator.is_main_process
        batches = [
            torch.stack(self.accelerator.gather_for_metrics(self.compute_ref_log_probs(self.model, batch)), dim=1).cpu()
            for batch in tqdm(loader, desc="reference", unit="batch", dynamic_ncols=True, disable=hidden)
        ]
        return torch.cat(batches)[order.argsort()]

    def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's reference log-probabilities, with the savings of :meth:`compute_loss`."""
        with self._without_waste():
            return super().compute_ref_log_probs(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss; a prompt runs once for both completions, and the LM head on completion tokens only."""
        with self._without_waste():
            return super().compute_loss(*args, **kwargs)

    @contextmanager
    def _without_waste(self) -> Iterator[None]:
        model = self.generator()
        causal_lm = model.get_base_model() if is_peft_model(model) else model
        with completion_tokens_only(), prompts_shared(causal_lm.base_model):
            yield


def prompts_shared(decoder: Any) -> AbstractContextManager[None]:
    """Make a decoder compute the shared prompts of a batch once, by :func:`shared_states`, within a block.

    This replaces ``decoder.forward`` for all threads, so it is for training alone.

    Args:
        decoder: Model without the LM head, called as TRL's DPO trainer does: with sequences padded on the right, and
            only the last hidden states of the output used. Calls with other arguments are passed on unchanged.
    """
    return replaced(decoder, "forward", partial(_with_shared_prompts, decoder))


def _with_shared_prompts(decoder: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    sharing = False  # the calls of shared_states() are the decoder's own

    @wraps(forward)  # its signature is read
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal sharing
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        if sharing or args or given - {"return_dict"} != {"input_ids", "attention_mask"}:
            return forward(*args, **kwargs)
        sharing = True
        try:
            states = shared_states(decoder, kwargs["input_ids"], kwargs["attention_mask"])
        finally:
            sharing = False
        return BaseModelOutputWithPast(last_hidden_state=states)

    return run
