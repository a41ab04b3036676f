"""What rows begin with alike is run once: a request with several answers, a prompt with two completions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl import DPOTrainer

from sempa_st.model.patching import completion_tokens_only
from sempa_st.model.peft_models import is_peft_model
from sempa_st.training.dev_score import DevScoreTrainer
from sempa_st.training.forward import shared_states
from sempa_st.training.reference import REFERENCE, cached_tensor

_REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


class PreferenceTrainer(DevScoreTrainer, DPOTrainer):
    """DPO on preference data, judged by the dev score.

    The reference is run once, before training, and kept on disk for the next run on the same base and data.

    Args:
        reference: All that decides the reference's log-probabilities.
        **kwargs: Arguments of TRL's trainer, with ``precompute_ref_log_probs`` set; see also :class:`DevScoreTrainer`.
    """

    def __init__(self, *, reference: dict[str, Any], **kwargs: Any) -> None:
        self._reference = reference
        super().__init__(**kwargs)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        # TRL's own form keeps its results beside a data set that lies on the disk; this one is in memory.
        if name == "eval":
            return dataset  # never looked at
        main = self.accelerator.is_main_process
        kept = cached_tensor(REFERENCE, self._reference, lambda: self._run_reference(dataset, batch_size), write=main)
        for column, values in zip(_REFERENCE_COLUMNS, kept.T.tolist(), strict=True):
            dataset = dataset.add_column(column, values)
        return dataset

    def _run_reference(self, dataset: Any, batch_size: int) -> Tensor:
        """Return the log-probabilities of chosen and rejected, of shape (rows, 2); rows of similar length together."""
        order = torch.tensor(
            [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in dataset]
        ).argsort()
        loader = self.accelerator.prepare(
            DataLoader(dataset.select(order.tolist()), batch_size, collate_fn=self.data_collator)
        )
        hidden = not self.accelerator.is_main_process
        found = [
            torch.stack(self.accelerator.gather_for_metrics(self.compute_ref_log_probs(self.model, batch)), dim=1).cpu()
            for batch in tqdm(loader, desc="reference", unit="batch", dynamic_ncols=True, disable=hidden)
        ]
        return torch.cat(found)[order.argsort()]

    def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's log-probabilities of the reference, at the price of :meth:`compute_loss`."""
        with self._once():
            return super().compute_ref_log_probs(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss; prompts are run once for both completions, and the LM head on completion tokens only."""
        with self._once():
            return super().compute_loss(*args, **kwargs)

    @contextmanager
    def _once(self) -> Iterator[None]:
        model = self.generator()
        causal_lm = model.get_base_model() if is_peft_model(model) else model
        with completion_tokens_only(), pairs_together(causal_lm.base_model):
            yield


@contextmanager
def pairs_together(decoder: Any) -> Iterator[None]:
    """Make a decoder run a batch of pairs by :func:`shared_states`, in all threads: for training, which has one.

    Args:
        decoder: Layers without the LM head, called as TRL's DPO trainer calls them: rows padded on the right, and
            nothing read of the output but the last hidden states. Any other call is left as it is.
    """
    shadowed = decoder.__dict__.get("forward")

    def restore() -> None:
        if shadowed is None:
            del decoder.forward
        else:
            decoder.forward = shadowed

    def run(*args: Any, **kwargs: Any) -> Any:
        restore()
        try:
            asked = {name for name, value in kwargs.items() if value is not None and value is not False}
            if args or asked - {"return_dict"} != {"input_ids", "attention_mask"}:
                return decoder.forward(*args, **kwargs)
            states = shared_states(decoder, kwargs["input_ids"], kwargs["attention_mask"])
            return BaseModelOutputWithPast(last_hidden_state=states)
        finally:
            decoder.forward = run

    decoder.forward = run
    try:
        yield
    finally:
        restore()
