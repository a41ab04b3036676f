"""The template matrix: DPO under each paraphrase template, read under each embedding template, over several seeds."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.data.preferences import PARAPHRASE_TEMPLATES
from sempa_st.data.sts import COLUMNS, GradedPairs
from sempa_st.errors import SempaError
from sempa_st.model.base_model import load_config, resolve_base
from sempa_st.training.config import TrainConfig
from sempa_st.utils.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATES = ("prompteol", "pretended-cot")
"""The two embedding templates of the paper."""
BEST_DPO = {"learning_rate": 2e-5, "batch_size": 16, "gradient_accumulation": 1}
"""The best settings of ``dpo`` on the embedded base, together with an adapter on the upper third of the layers."""


@dataclass(frozen=True)
class TemplateCell:
    """Dev scores of the runs with one paraphrase template and one embedding template.

    Args:
        paraphrase: Name of the paraphrase template.
        template: Name of the embedding template.
        scores: Spearman correlation times 100 of each finished run.
        base: Score of the base under the embedding template.
    """

    paraphrase: str
    template: str
    scores: Sequence[float]
    base: float

    @property
    def mean(self) -> float:
        """Mean of the scores."""
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the scores (n - 1); None for a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def text(self) -> str:
        """Mean, standard deviation and difference to the base, for the picture."""
        deviation = "" if self.deviation is None else f" ± {self.deviation:.2f}"
        return f"{self.mean:.2f}{deviation}\n({self.mean - self.base:+.2f})"


def template_configs(
    base: str, data: str, folder: Path, pairs: GradedPairs, *, triplets: int, seeds: Iterable[int], **settings: Any
) -> list[TrainConfig]:
    """Return the settings of every run of the matrix, and write the dev pairs to a file in ``folder``.

    Args:
        base: Base model.
        data: NLI data, as for ``sempa train``.
        folder: Folder of the matrix.
        pairs: Pairs to score on; they choose nothing, since each run has one checkpoint, at its end.
        triplets: Triplets of each run.
        seeds: Seed of each run of a cell; it draws the triplets too.
        **settings: Other settings of a training run.
    """
    dev = folder / "dev.jsonl"
    rows = zip(pairs.first, pairs.second, pairs.scores, strict=True)
    write_text(
        dev, "".join(json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
    )
    depth = load_config(resolve_base(base).folder).get_text_config().num_hidden_layers
    common: dict[str, Any] = {
        "base": base,
        "data": data,
        "output": str(folder / "runs"),
        "objective": "dpo",
        "lora_layers": f"{2 * depth // 3}-{depth - 1}",
        "max_triplets": triplets,
        "checkpoint_samples": triplets,
        "dev": str(dev),
        **BEST_DPO,
        **settings,
    }
    return [
        TrainConfig(**common, paraphrase=paraphrase, template=template, seed=seed)
        for seed in seeds
        for paraphrase in PARAPHRASE_TEMPLATES
        for template in TEMPLATES
    ]


def run_matrix(configs: Sequence[TrainConfig], folder: Path, **options: Any) -> dict[str, Any]:
    """Train every run that is not finished, as one sweep in ``folder / "runs"``.

    Args:
        configs: Of :func:`template_configs`.
        folder: Folder of the matrix.
        **options: Other arguments of :func:`sempa_st.training.sweep.run_sweep`.

    Returns:
        The results of the sweep.

    Raises:
        SempaError: If a package is missing, the data or base cannot be used, or no run succeeds.
    """
    import optuna

    from sempa_st.training.sweep import run_sweep

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    varied = ("paraphrase", "template", "seed")
    return run_sweep(configs, varied, folder / "runs", retry_failed=True, **options)


def template_cells(results: Mapping[str, Any]) -> list[TemplateCell]:
    """Return the cells of the matrix that have a finished run, in the order of the templates.

    Args:
        results: Results of a sweep over ``paraphrase``, ``template`` and ``seed``.

    Raises:
        SempaError: If no run has finished.
    """
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    bases: dict[str, float] = {}
    for row in results["runs"]:
        if row["state"] == "finished":
            settings = row["settings"]
            scores[settings["paraphrase"], settings["template"]].append(row["dev_score"])
            bases[settings["template"]] = row["base_score"]
    if not scores:
        raise SempaError("No run of the template matrix has finished. Look at the errors above, and run it again.")
    return [
        TemplateCell(paraphrase, template, scores[paraphrase, template], bases[template])
        for paraphrase in PARAPHRASE_TEMPLATES
        for template in TEMPLATES
        if (paraphrase, template) in scores
    ]


def draw_matrix(axes: Axes, cells: Sequence[TemplateCell]) -> None:
    """Draw the matrix as a heat map with the numbers in it; the colour is the mean score."""
    import numpy as np

    rows, columns = list(PARAPHRASE_TEMPLATES), list(TEMPLATES)
    means = np.full((len(rows), len(columns)), np.nan)
    for cell in cells:
        means[rows.index(cell.paraphrase), columns.index(cell.template)] = cell.mean
    image = axes.imshow(means, cmap="cividis", aspect="auto")
    middle = (np.nanmin(means) + np.nanmax(means)) / 2
    for cell in cells:
        place = (columns.index(cell.template), rows.index(cell.paraphrase))
        axes.text(*place, cell.text, ha="center", va="center", color="black" if cell.mean >= middle else "white")
    bases = {cell.template: cell.base for cell in cells}
    labels = [f"{name}\nbase {bases[name]:.2f}" if name in bases else name for name in columns]
    axes.set_xticks(range(len(columns)), labels)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("embedding template")
    axes.set_ylabel("paraphrase template")
    axes.figure.colorbar(image, ax=axes, label="dev, Spearman x 100")
