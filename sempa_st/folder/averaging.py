"""The mean of several adapters as one: runs that differ in their seed agree where they are right ("model soup")."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.checks.inspection import files_read, read_settings
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model
from sempa_st.folder.digests import folder_digest
from sempa_st.folder.layout import RUN_RECORD, read_record, template_name
from sempa_st.folder.resolve import Source, adapter_base, find_model
from sempa_st.folder.write import copy_files
from sempa_st.model.adapter import check_adapter
from sempa_st.model.adapter_kinds import check_mean
from sempa_st.model.peft_models import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from sempa_st.utils.files import check_not_inside, check_output_folder, write_json
from sempa_st.utils.portable import portable_name

if TYPE_CHECKING:
    from torch import Tensor

_FREE = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path", "inference_mode", "peft_version",
    "layers_pattern", "init_lora_weights",
)  # fmt: skip
"""Settings in which adapters may differ."""
_SCALINGS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")


def average_models(
    models: Sequence[str], output: str | Path, *, rank: int | None = None, overwrite: bool = False
) -> Path:
    """Write a model whose adapter's update is the mean of the updates of several adapters of one base.

    The update of an adapter is s B A, with s = alpha / r. The mean of n of them is, exactly, 1/n times the s B side by
    side, times the A one above another. It is cut to ``rank`` by its singular values, to the nearest of that rank.

    Args:
        models: Shipped models, SemPA folders or Hub ids, two or more, of one base, template and activation.
        output: Folder to write, in the format of the first model.
        rank: Rank of the result, from 1 to the sum of the models' ranks; that sum when None.
        overwrite: Replace what stands at ``output``.

    Raises:
        SempaError: If the models do not go together, or the rank or the output folder is not fit.
    """
    check_output_folder(output, overwrite=overwrite)
    sources = [find_model(model) for model in models]
    settings = _settings(sources)
    ranks = [int(each["r"]) for each in settings]
    if rank is not None and not 0 < rank <= sum(ranks):
        raise SempaError(f"--rank is {rank}. Expected 1 to {sum(ranks)}, the sum of the models' ranks.")
    check_not_inside(output, [source.folder for source in sources])
    base = adapter_base(sources[0].folder)
    for source in sources:
        check_adapter(base, source.folder)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "averaged")
        copy_files(sources[0].folder, folder, files_read(sources[0].folder))
        scales = [each["lora_alpha"] / each["r"] for each in settings]
        _write_mean([source.folder for source in sources], scales, folder, rank)
        # The scale is part of the weights now.
        chosen = rank or sum(ranks)
        write_json(folder / ADAPTER_CONFIG, {**settings[0], "r": chosen, "lora_alpha": chosen})
        record = read_record(folder)
        if record is not None:
            origins = [_origin(source) for source in sources]
            write_json(folder / RUN_RECORD, {**record, "averaged": origins, "rank": rank})
        return copy_model(str(folder), output, base=base.reference, overwrite=overwrite)


def _settings(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Return the settings of all adapters, or raise :class:`SempaError` unless they go together."""
    if len(sources) < 2:
        named = ", ".join(source.name for source in sources) or "none"
        raise SempaError(f"These are too few models to average: {named}. Expected two or more.")
    settings = []
    for source in sources:
        path = source.folder / ADAPTER_CONFIG
        if source.kind != "sempa" or not path.is_file():
            raise SempaError(f"{source.name} holds no adapter to average. Expected a SemPA folder with one.")
        settings.append(read_settings(source.folder, ADAPTER_CONFIG))
        odd = [name for name in _SCALINGS if settings[-1].get(name)]
        if settings[-1].get("peft_type") != "LORA" or odd:
            raise SempaError(
                f"The adapter of {source.name} ({', '.join(odd) or settings[-1].get('peft_type')}) cannot be "
                "averaged. Expected a plain LoRA."
            )
        check_mean(source.name, source.folder)
        differing = [
            name
            for name in settings[0].keys() | settings[-1].keys()
            # An option that a version of PEFT does not know yet is off.
            if name not in _FREE and (settings[0].get(name) or None) != (settings[-1].get(name) or None)
        ]
        if template_name(source.folder) != template_name(sources[0].folder):
            differing.append("template")
        if differing:
            raise SempaError(
                f"{sources[0].name} and {source.name} differ in {', '.join(sorted(differing))}. Expected adapters "
                "of one kind, which act on the same layers and the same text."
            )
    return settings


def _write_mean(folders: Sequence[Path], scales: Sequence[float], output: Path, rank: int | None) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    adapters = [load_file(folder / ADAPTER_WEIGHTS) for folder in folders]
    for folder, adapter in zip(folders, adapters, strict=True):
        if adapter.keys() != adapters[0].keys():
            raise SempaError(f"The adapters in {folders[0]} and {folder} act on different layers. Expected the same.")
    mean: dict[str, Tensor] = {}
    for down in (name for name in adapters[0] if "lora_A" in name):
        up = down.replace("lora_A", "lora_B")
        above = torch.cat([adapter[down].float() for adapter in adapters])
        beside = torch.cat(
            [scale * adapter[up].float() for scale, adapter in zip(scales, adapters, strict=True)], dim=1
        )
        pair = (above, beside / len(adapters))
        mean[down], mean[up] = pair if rank is None else _nearest(*pair, rank)
    dtype = next(iter(adapters[0].values())).dtype
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in mean.items()}
    save_file(tensors, output / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _nearest(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the two factors, of shapes (rank, inputs) and (outputs, rank), that come nearest to ``up @ down``."""
    import torch

    # Of the small product between orthogonal bases, in place of the large one.
    right, inner = torch.linalg.qr(down.T)
    left, outer = torch.linalg.qr(up)
    vectors, values, others = torch.linalg.svd(outer @ inner.T)
    roots = values[:rank].sqrt()
    return roots[:, None] * (others[:rank] @ right.T), left @ vectors[:, :rank] * roots


def _origin(source: Source) -> dict[str, Any]:
    config = (read_record(source.folder) or {}).get("config") or {}
    return {"model": portable_name(source.name), "seed": config.get("seed"), "digest": folder_digest(source.folder)}
