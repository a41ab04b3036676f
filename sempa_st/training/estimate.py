"""Estimate the memory of a training run on the meta device: every shape is computed, and no weight is read or stored.

A step on the largest batch is run forward and backward on tensors without content. What autograd saves is counted as it
is saved and released, and with it the gradients that pass through the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from sempa_st.data.nli import Triplet
from sempa_st.data.passages import PASSAGE_TOKENS
from sempa_st.data.preferences import ranked_answers
from sempa_st.forward.packing import can_pack, states_packed, unpadded
from sempa_st.model.adapter import lora_config
from sempa_st.model.base_model import load_config, named_decoder, settings_folder
from sempa_st.model.chat_formats import chat_template
from sempa_st.model.load_options import avoid_broken_sdpa
from sempa_st.model.prompt_eol import PromptEOL, within_positions
from sempa_st.model.templates import embedding_template
from sempa_st.model.token_rows import pad_rows
from sempa_st.model.tokenizer import install_template, load_tokenizer
from sempa_st.training.batches import AnswerInputs, sentence_of
from sempa_st.training.collator import candidate_roles, kl_batches
from sempa_st.training.config import TrainConfig
from sempa_st.training.dropout import disable_dropout
from sempa_st.training.forward import full_logits, last_states
from sempa_st.training.inputs import load_data
from sempa_st.training.losses import reference_kl
from sempa_st.training.objectives import EMBEDDING_OBJECTIVES, SEQUENCE_OBJECTIVES, SIMILARITY_OBJECTIVES
from sempa_st.training.saved_bytes import Emulation, PeakOfSaved, distinct_bytes
from sempa_st.training.start import open_start
from sempa_st.utils.devices import pick_device, pick_dtype
from sempa_st.utils.tables import table

_Head = Callable[[Tensor], Iterator[Tensor]]
_FLOAT32 = 4
_NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4: 4 bits, a scale of 8 bits for 64 of them, and one of 32 bits for 256 of those."""
_TILE_TOKENS, _TILE_VOCABULARY = 4096, 32_768
"""Size of the tiles of logits in which TRL's LM head computes log-probabilities for ``dpo``. Seen in trl 1.16."""
_TILE_RESULTS = 6
"""Results of single operations on a tile that it holds beside it, where Triton does not run."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training run in one process, by what they hold.

    Args:
        weights: Weights of base and adapter, and buffers.
        gradients: Gradients of what is trained.
        optimiser: AdamW's two averages of what is trained.
        activations: Peak of a step: what is saved for the backward pass, logits, and gradients in passing.
        reference: Peak of the reference pass before training, besides the weights.
    """

    weights: int
    gradients: int
    optimiser: int
    activations: int
    reference: int

    @property
    def peak(self) -> int:
        """The most that is held at one time."""
        return self.weights + max(self.gradients + self.optimiser + self.activations, self.reference)

    def table(self) -> str:
        """Return the estimate as text, a line for each part."""
        parts = {item.name: getattr(self, item.name) for item in fields(self)} | {"peak": self.peak}
        return table(["memory of", "GiB"], [[name, size / 2**30] for name, size in parts.items()])


def estimate_memory(config: TrainConfig) -> MemoryEstimate:
    """Estimate the memory of a training run, without its weights.

    It is that of one process; sharded runs share out parts of it. An adapter with ``activation`` template is counted
    like one that is always active: an upper bound.

    Args:
        config: Settings of the run. Of the base, only settings and tokenizer are read.

    Raises:
        SempaError: On invalid settings, data or base.
    """
    if config.from_:
        config, base, *_ = open_start(config)
        folder = base.folder
    else:
        folder = settings_folder(config.base)
    step = _Step(config, folder, pick_device(config.device))
    model = step.model
    tensors = [*model.parameters(), *model.buffers()]
    trained = distinct_bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    activations = step.peak(tensors)
    return MemoryEstimate(
        weights=distinct_bytes(tensors) - (saved_by_4bit(model) if config.load_in_4bit else 0),
        gradients=trained,
        optimiser=2 * trained,
        activations=activations,
        reference=step.reference(activations) if config.has_reference else 0,
    )


class _Step:
    """One forward and backward pass on the largest batch of a run.

    Args:
        config: Settings of the run.
        folder: Folder with the settings and the tokenizer of its base.
        device: Device type to train on, which decides types and kernels.
    """

    def __init__(self, config: TrainConfig, folder: Path, device: str) -> None:
        settings = load_config(folder)
        compute = pick_dtype(config.dtype, device)
        self._config = replace(
            config,
            max_length=within_positions(config.max_length, settings),
            max_seq_length=within_positions(config.max_seq_length, settings),
        )
        with torch.device("meta"):
            base: Any = AutoModelForCausalLM.from_config(
                settings, dtype=torch.float32 if config.tuning == "full" else compute, trust_remote_code=False
            )
        avoid_broken_sdpa(named_decoder(base), device)
        disable_dropout(base)
        self.model: Any = base if config.tuning == "full" else get_peft_model(base, self._adapter_settings(base))
        embedder = load_tokenizer(folder)
        install_template(embedder, embedding_template(config.template))
        self._module = PromptEOL(
            self.model, embedder, template=config.template, max_seq_length=self._config.max_seq_length
        )
        self._tokenizer = load_tokenizer(folder)
        self._tokenizer.chat_template = chat_template(config.chat_format, self._tokenizer)
        data = load_data(config)
        self._vocabulary = int(base.get_output_embeddings().weight.shape[0])
        self._answer_tokens = 0
        self._results = 0 if device == "cuda" else _TILE_RESULTS
        self._compute = compute
        self._triplets = sorted(data.triplets, key=_length, reverse=True)[: config.batch_size]
        self._candidates = candidate_roles(config, data)
        self._by_library = config.library is not None
        # Of this package's own trainer, only a CPU's forward pass is under autocast.
        has_autocast = compute != torch.float32 and (self._by_library or device == "cpu")
        self._emulation = Emulation(compute if has_autocast else None)

    def _adapter_settings(self, base: Any) -> Any:
        config = self._config
        return lora_config(
            base, r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout, layers=config.adapted_layers
        )

    def peak(self, held: Sequence[Tensor]) -> int:
        """Return the peak of what a step holds besides ``held``, in bytes."""
        self.model.train()
        with self._emulation, PeakOfSaved(held) as count:
            passes = list(self._passes())
            in_layers = count.live
            outputs = [logits for states, head in passes for logits in head(states)]
            count.note(self._tile_bytes())
            count.backward(torch.stack([output.float().sum() for output in outputs]).sum())
        if not self._config.gradient_checkpointing:
            return count.peak
        # Kept are the input of each layer, and all of the one layer that is computed again.
        layers = self._num_layers
        inputs = distinct_bytes(states for states, _ in passes)
        return count.peak - in_layers + in_layers // layers + layers * inputs

    def reference(self, peak: int) -> int:
        """Return the peak of the reference pass, which holds the tensors of one layer at a time, and the logits."""
        logits = 0 if self._by_library else self._answer_tokens * self._vocabulary * _FLOAT32
        return max(self._tile_bytes(), 2 * logits) + peak // self._num_layers

    @property
    def _num_layers(self) -> int:
        return int(self.model.config.get_text_config().num_hidden_layers)

    def _passes(self) -> Iterator[tuple[Tensor, _Head]]:
        """Run the decoder on all that a step runs it on; yield the states, and what the LM head makes of them."""
        objectives = self._config.objective_weights.keys()
        if objectives & set(EMBEDDING_OBJECTIVES):
            for sentences in self._sentences():
                padded = pad_rows(self._module.tokenizer, self._module.token_rows(sentences), "left")
                yield last_states(self._module, padded["input_ids"], padded["attention_mask"]).states, _no_head
        if objectives & set(SEQUENCE_OBJECTIVES):
            yield self._answers("listwise" in objectives)
        if self._config.kl:
            yield self._kl()

    def _sentences(self) -> list[list[str]]:
        """Return the sentences of each forward pass: sentence-transformers' trainer runs a column at a time."""
        compares = self._config.objective_weights.keys() & set(SIMILARITY_OBJECTIVES)
        roles = ["premise", *(self._candidates if compares else ())]
        columns = [[sentence_of(triplet, role) for triplet in self._triplets] for role in roles]
        return columns if self._by_library else [[text for column in columns for text in column]]

    def _answers(self, listwise: bool) -> tuple[Tensor, _Head]:
        config = self._config
        examples = ranked_answers(self._triplets, self._tokenizer, paraphrase=config.paraphrase)
        inputs = AnswerInputs(self._tokenizer, examples, 3 if listwise else 2, config.max_length, self._module.decoder)
        batch = inputs(range(len(examples)))
        states = self._states(batch["answer_input_ids"], batch["answer_attention_mask"])
        self._answer_tokens = count = int(batch["answer_mask"].sum())

        def head(states: Tensor) -> Iterator[Tensor]:
            chosen = states.flatten(0, 1).index_select(0, _index(count))
            if self._by_library:
                yield chosen  # TRL's head keeps the states, and makes logits tile by tile
            else:
                yield functional.cross_entropy(full_logits(self._module.causal_lm, chosen), _index(count))

        return states, head

    def _kl(self) -> tuple[Tensor, _Head]:
        config, triplets = self._config, self._triplets
        if config.kl_file:
            ids = torch.zeros(ceil(config.kl_positions / PASSAGE_TOKENS), PASSAGE_TOKENS, dtype=torch.long)
            count = min(config.kl_positions, ids.numel())
        else:
            make = kl_batches(config, self._tokenizer, self._module, None, len(triplets))
            batch = make(range(len(triplets)), triplets)
            ids, count = batch["kl_input_ids"], min(config.kl_positions, int(batch["kl_mask"].sum()))

        def head(states: Tensor) -> Iterator[Tensor]:
            logits = full_logits(self._module.causal_lm, states.flatten(0, 1).index_select(0, _index(count)))
            yield reference_kl(logits, torch.empty_like(logits))

        return self._module.decoder(input_ids=ids.to("meta"), use_cache=False).last_hidden_state, head

    def _states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return states like :func:`sempa_st.training.forward.shared_states`, which reads its mask on the device."""
        decoder, mask = self._module.decoder, attention_mask.bool()
        if not can_pack(decoder, int(mask.sum(dim=1).max())):
            return decoder(input_ids=input_ids.to("meta"), use_cache=False).last_hidden_state
        packed = states_packed(decoder, unpadded(input_ids, attention_mask))
        return packed.states.index_select(0, _index(input_ids.numel())).view(*input_ids.shape, -1)

    def _tile_bytes(self) -> int:
        """Return the bytes of the tiles of logits that TRL's head works on."""
        tokens = min(_TILE_TOKENS, self._answer_tokens) if self._by_library else 0
        results = self._results * min(_TILE_VOCABULARY, self._vocabulary) * _FLOAT32
        return tokens * (_TILE_VOCABULARY * self._compute.itemsize + results)


def saved_by_4bit(model: Any) -> int:
    """Return the bytes that NF4 with double quantisation (arXiv 2305.14314, section 3) saves of a model's weights.

    Args:
        model: Model whose linear layers but the LM head will be quantised.
    """
    head = model.get_output_embeddings()
    saved = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name:
            saved += module.weight.nbytes - round(module.weight.numel() * _NF4_BYTES)
    return saved


def _length(triplet: Triplet) -> int:
    return len(triplet.premise) + len(triplet.entailed) + len(triplet.contradicted)


def _index(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.long, device="meta")


def _no_head(states: Tensor) -> Iterator[Tensor]:
    yield states
