"""Write checkpoints as model folders: the best one of a run, and with ``--keep-checkpoints`` each of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sempa_st.folder.card import write_card
from sempa_st.folder.formats import RUN_RECORD
from sempa_st.folder.layout import ModelFolder
from sempa_st.folder.write import copy_files, set_base_reference, set_invocation, write_embedding_files
from sempa_st.model.tokenizer import prefix_tokens
from sempa_st.training.config import TrainConfig
from sempa_st.training.inputs import RunInputs
from sempa_st.training.record import run_record
from sempa_st.utils.claims import claim_output
from sempa_st.utils.files import atomic_folder, write_json


@dataclass(frozen=True)
class ModelWriter:
    """Write the checkpoints of a run as model folders.

    Args:
        config: Settings as they were asked for; those of ``inputs`` are fitted to the base.
        inputs: Inputs of the run.
        started: Value of ``time.monotonic()`` at its start, in seconds.
        base_score: Dev score before training, times 100.
    """

    config: TrainConfig
    inputs: RunInputs
    started: float
    base_score: float

    def record(self, state: TrainerState, step: int | None = None) -> dict[str, Any]:
        """Return the run record so far.

        Args:
            state: The trainer's state.
            step: Optimiser step of the model that the record is for; the best one when None.
        """
        return run_record(
            self.config,
            self.inputs,
            state,
            step=state.best_global_step if step is None else step,
            base_score=self.base_score,
            seconds=time.monotonic() - self.started,
        )

    def write(
        self, checkpoint: Path, output: Path, record: dict[str, Any], *, overwrite: bool, run: Path | None = None
    ) -> None:
        """Write the model folder ``output``, which appears complete.

        Args:
            checkpoint: Checkpoint of the trainer.
            output: Folder to write.
            record: Run record of the model.
            overwrite: Replace the folder if it exists.
            run: Folder of the run, which claims the output before it appears.
        """
        inputs, config = self.inputs, self.inputs.config
        with atomic_folder(output, overwrite=overwrite) as folder:
            source = ModelFolder(checkpoint)
            copy_files(source.path, folder, source.model_files)
            if source.is_adapter:
                set_base_reference(folder, inputs.base.reference)
            if config.activation == "sentence":
                set_invocation(folder, prefix_tokens(inputs.scorer.tokenizer, config.template))
            write_embedding_files(
                folder,
                inputs.scorer.tokenizer,
                template=config.template,
                max_seq_length=config.max_seq_length,
                config=inputs.model.config,
                format=config.folder_format,
            )
            write_json(folder / RUN_RECORD, record)
            write_card(folder, output.resolve().name, inputs.base, record)
            if run:
                claim_output(folder, run)


class KeptModels(TrainerCallback):
    """Write each checkpoint as a model folder, named after the number of triplets seen: ``samples-19968``.

    It comes before :class:`sempa_st.training.checkpoints.Checkpoints`, so that a checkpoint to resume from has its
    model.

    Args:
        writer: Writes model folders.
        folder: Folder to write them to.
    """

    def __init__(self, writer: ModelWriter, folder: Path) -> None:
        self._writer = writer
        self._folder = folder

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the model of the checkpoint that was just saved; its dev score is the last one."""
        if state.is_world_process_zero:
            record = self._writer.record(state, state.global_step)
            checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            output = self._folder / f"samples-{record['dev']['scores'][-1]['samples']}"
            self._writer.write(checkpoint, output, record, overwrite=True)
