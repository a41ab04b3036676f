"""One training run from its settings to a finished model folder."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from sempa_st.data.nli import NliData, load_nli
from sempa_st.data.passages import read_passages
from sempa_st.data.sts import data_dir_or_default, dev_pairs
from sempa_st.errors import SempaError
from sempa_st.folder.card import write_card
from sempa_st.folder.formats import RUN_RECORD
from sempa_st.folder.layout import ModelFolder
from sempa_st.folder.write import copy_files, set_base_reference, set_invocation, write_embedding_files
from sempa_st.model.base_model import load_causal_lm, load_config, resolve_base
from sempa_st.model.patching import attention_implementation, avoid_broken_sdpa
from sempa_st.model.prompt_eol import PromptEOL, within_positions
from sempa_st.model.templates import embedding_template
from sempa_st.model.tokenizer import check_saved_tokenizer, install_template, load_tokenizer, prefix_tokens
from sempa_st.training.answers import drop_too_long
from sempa_st.training.build import RunInputs, build_trainer
from sempa_st.training.config import SEQUENCE_OBJECTIVES, TrainConfig
from sempa_st.training.dev_score import DevScorer
from sempa_st.training.record import run_record
from sempa_st.training.reference import cached_tensor, warn_uncached
from sempa_st.training.run_folder import RunFolder
from sempa_st.utils.devices import pick_device, pick_dtype
from sempa_st.utils.files import atomic_folder, check_not_inside, check_output_folder, write_json


@dataclass(frozen=True)
class TrainResult:
    """What a training run left.

    Args:
        folder: The finished model folder.
        record: The run record, as written to the folder.
        is_main_process: Whether this process is the one to report it, where there are several.
    """

    folder: Path
    record: dict[str, Any]
    is_main_process: bool = True

    @property
    def score(self) -> float:
        """Dev score of the model that was kept: Spearman correlation, times 100."""
        scores = {score["step"]: score["spearman"] for score in self.record["dev"]["scores"]}
        return float(scores[self.record["best_step"]])


def train(config: TrainConfig) -> TrainResult:
    """Train an adapter by the objective of ``config`` and write the model folder at ``config.output``.

    What can be refused is refused before anything is written; the folder appears whole, at the end.

    Raises:
        SempaError: On bad settings, data, base or output folder.
    """
    started = time.monotonic()
    device = _pick_device(config)
    state = PartialState(cpu=device == "cpu")
    warn_uncached.cache_clear()
    work = RunFolder(config.output)
    _on_main_process(work.check_free)
    parts = load_inputs(config, device)
    _on_main_process(lambda: work.open(parts.identity, resume=config.resume, overwrite=config.overwrite))
    try:
        with _broken_off(work):
            trainer = build_trainer(parts, work)
            # The adapter starts at zero: this is the base's score.
            base_score = _base_score(parts, trainer.generator())
            trainer.train(resume_from_checkpoint=work.last_checkpoint() if config.resume else None)
            record = run_record(
                config,
                parts.base,
                parts.data,
                trainer.state,
                base_score=base_score,
                dev_pairs=parts.scorer.pairs,
                seconds=time.monotonic() - started,
                kl_text_sha256=parts.passages.sha256 if parts.passages else None,
            )
            _on_main_process(lambda: _finish(parts, work, trainer.state.best_model_checkpoint, record))
    finally:
        work.close()
    return TrainResult(Path(config.output), record, state.is_main_process)


def _base_score(parts: RunInputs, model: Any) -> float:
    """Return the dev score of an untrained model, kept on disk for the next run on the same base."""
    config = parts.config
    identity = {
        "base": ModelFolder(parts.base.folder).digest,
        "dev": parts.scorer.fingerprint(),
        "template": config.template,
        "max_seq_length": config.max_seq_length,
        "dtype": str(parts.model.dtype),
        "attention": attention_implementation(parts.model.config),
        "device": parts.device,
    }

    def compute() -> torch.Tensor:
        return torch.tensor(parts.scorer(model), dtype=torch.float64)

    return float(cached_tensor("spearman", identity, compute, write=PartialState().is_main_process))


def _pick_device(config: TrainConfig) -> str:
    device = pick_device(config.device)
    if ":" in device:
        raise SempaError(f"Training takes a kind of device, got {device!r}. Choose one with CUDA_VISIBLE_DEVICES.")
    if device == "cuda" and torch.cuda.device_count() > 1 and PartialState().num_processes == 1:
        count = torch.cuda.device_count()
        raise SempaError(
            f"{count} GPUs are visible to one process. To use them all: accelerate launch --num_processes {count} "
            "-m sempa_st train ...; to use one, set CUDA_VISIBLE_DEVICES."
        )
    return device


def load_inputs(config: TrainConfig, device: str) -> RunInputs:
    """Load what a run needs, and refuse what it could not use.

    Args:
        config: Settings of the run; lengths are cut to the positions that the base has.
        device: Where it will run, such as ``cpu``.

    Raises:
        SempaError: On settings, data, a base or an output folder that cannot be used.
    """
    check_output_folder(config.output, overwrite=config.overwrite)
    data = _draw(load_nli(config.data, skip_bad_rows=config.skip_bad_rows), config)
    pairs = dev_pairs(config.dev, data_dir_or_default(config.data_dir))
    base = resolve_base(config.base)
    files = [name for name in (config.data, config.dev, config.kl_text) if name]
    check_not_inside(config.output, [base.folder, *(Path(name) for name in files)])
    architecture = load_config(base.folder)
    config = replace(
        config,
        max_length=within_positions(config.max_length, architecture),
        max_seq_length=within_positions(config.max_seq_length, architecture),
    )
    embedder = load_tokenizer(base.folder)
    install_template(embedder, embedding_template(config.template))
    check_saved_tokenizer(embedder, config.template)
    # A tokenizer of its own for the training text, which the embedding template has no place in.
    tokenizer = load_tokenizer(base.folder)
    if config.objective_weights.keys() & set(SEQUENCE_OBJECTIVES):
        data = drop_too_long(data, tokenizer, paraphrase=config.paraphrase, max_length=config.max_length)
    # Weights that are trained themselves are kept in float32, whatever the arithmetic.
    dtype = torch.float32 if config.tuning == "full" else pick_dtype(config.dtype, device)
    model = load_causal_lm(base.folder, dtype)
    avoid_broken_sdpa(model, device)
    try:
        PromptEOL(model, embedder, template=config.template, max_seq_length=config.max_seq_length)
    except ValueError as error:
        raise SempaError(str(error)) from error
    scorer = DevScorer(
        pairs,
        embedder,
        template=config.template,
        max_seq_length=config.max_seq_length,
        batch_size=config.dev_batch_size,
    )
    passages = read_passages(config.kl_text, tokenizer) if config.kl_text else None
    return RunInputs(config, device, base, data, tokenizer, model, scorer, passages)


def _draw(data: NliData, config: TrainConfig) -> NliData:
    wanted = config.max_triplets
    if wanted is None or wanted >= len(data.triplets):
        return data
    return replace(data, triplets=random.Random(config.seed).sample(list(data.triplets), wanted))


def _on_main_process(action: Callable[[], None]) -> None:
    """Run ``action`` on the main process while the others wait; if it refuses, all of them do."""
    state = PartialState()
    refusal: list[str | None] = [None]
    if state.is_main_process:
        try:
            action()
        except (SempaError, OSError) as error:
            if state.num_processes == 1:
                raise
            refusal = [str(error)]
    if state.num_processes > 1:
        broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise SempaError(refusal[0])


@contextmanager
def _broken_off(work: RunFolder) -> Iterator[None]:
    """When a run breaks off, say how to go on, or remove its folder if it has no checkpoint to go on from."""
    try:
        yield
    except BaseException:
        if PartialState().is_main_process and (line := work.broken_off()):
            print(line, file=sys.stderr)
        raise


def _finish(parts: RunInputs, work: RunFolder, best: str | None, record: dict[str, Any]) -> None:
    """Write the model folder from the best checkpoint, and only then remove the run's own folder."""
    if best is None:
        raise SempaError(f"The run has no whole checkpoint with a dev score in {work.path}. Train anew.")
    config = parts.config
    with atomic_folder(config.output, overwrite=config.overwrite) as folder:
        checkpoint = ModelFolder(Path(best))
        copy_files(checkpoint.path, folder, checkpoint.model_files)
        if checkpoint.is_adapter:
            set_base_reference(folder, parts.base.reference)
        if config.activation == "sentence":
            set_invocation(folder, prefix_tokens(parts.scorer.tokenizer, config.template))
        write_embedding_files(
            folder,
            parts.scorer.tokenizer,
            template=config.template,
            max_seq_length=config.max_seq_length,
            config=parts.model.config,
            format=config.folder_format,
        )
        write_json(folder / RUN_RECORD, record)
        write_card(folder, Path(config.output).resolve().name, parts.base, record)
    work.remove()
