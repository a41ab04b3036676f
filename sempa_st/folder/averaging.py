"""Average several adapters, such as those of training runs with different seeds, into one ("model soup")."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.checks.inspection import files_read
from sempa_st.errors import SempaError
from sempa_st.folder.card import objectives_of
from sempa_st.folder.copying import copy_model, without_results
from sempa_st.folder.formats import RUN_RECORD
from sempa_st.folder.layout import ModelFolder
from sempa_st.folder.resolve import Source, adapter_base, find_model
from sempa_st.folder.write import copy_files
from sempa_st.model.adapter import check_adapter
from sempa_st.model.adapter_kinds import refuse_extras
from sempa_st.model.peft_models import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from sempa_st.utils.files import check_not_inside, check_output_folder, write_json
from sempa_st.utils.portable import portable_name

if TYPE_CHECKING:
    from torch import Tensor

_MAY_DIFFER = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path", "inference_mode", "peft_version",
    "layers_pattern", "init_lora_weights",
)  # fmt: skip
"""Settings in which the adapters may differ."""
_OTHER_UPDATES = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
"""Settings with which an update is not alpha / r times B A."""


def average_models(
    models: Sequence[str], output: str | Path, *, rank: int | None = None, overwrite: bool = False
) -> Path:
    """Write a model whose adapter adds the mean of what several adapters of one base add to its weights.

    Adapter i adds s_i B_i A_i, with s_i = alpha_i / r_i. The mean of n adapters is one product of two factors:

        1/n [s_1 B_1 | ... | s_n B_n]  times  A_1
                                              ...
                                              A_n

    Its rank is the sum of the ranks. With ``rank`` it is replaced by the nearest matrix of that rank, by a truncated
    singular value decomposition.

    Args:
        models: Two or more shipped models, SemPA folders or Hub ids, with the same base, template and activation.
        output: Folder to write, in the format of the first model.
        rank: Rank of the result, from 1 to the sum of the models' ranks; that sum when None.
        overwrite: Replace ``output`` if it exists.

    Raises:
        SempaError: If the adapters cannot be averaged, the rank is out of range, or the output cannot be written.
    """
    check_output_folder(output, overwrite=overwrite)
    sources = [find_model(model) for model in models]
    settings = _settings(sources)
    ranks = [int(each["r"]) for each in settings]
    if rank is not None and not 0 < rank <= sum(ranks):
        raise SempaError(f"--rank is {rank}. Expected 1 to {sum(ranks)}, the sum of the models' ranks.")
    folders = [source.folder.path for source in sources]
    check_not_inside(output, folders)
    base = adapter_base(sources[0].folder)
    for source in sources[1:]:
        other = adapter_base(source.folder)
        if other.folder != base.folder and ModelFolder(other.folder).digest != ModelFolder(base.folder).digest:
            raise SempaError(
                f"{sources[0].name} and {source.name} were trained on different bases, {base.reference} and "
                f"{other.reference}. Expected adapters of one base."
            )
    for path in folders:
        check_adapter(base, path)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "averaged")
        copy_files(folders[0], folder, files_read(folders[0]))
        scales = [each["lora_alpha"] / each["r"] for each in settings]
        _write_mean(folders, scales, folder, rank)
        # The weights contain the scale, so that alpha / r is 1.
        chosen = rank or sum(ranks)
        write_json(folder / ADAPTER_CONFIG, {**settings[0], "r": chosen, "lora_alpha": chosen})
        record = sources[0].folder.record
        if record is not None:
            origins = [_origin(source) for source in sources]
            own = without_results(record)
            write_json(folder / RUN_RECORD, {**own, "averaged": origins, "rank": rank})
        return copy_model(str(folder), output, base=base.reference, overwrite=overwrite)


def _settings(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Return the settings of all adapters; raise :class:`SempaError` if they cannot be averaged."""
    if len(sources) < 2:
        named = ", ".join(source.name for source in sources) or "none"
        raise SempaError(f"These are too few models to average: {named}. Expected two or more.")
    settings = []
    for source in sources:
        adapter = source.folder.adapter_settings
        if source.kind != "sempa" or adapter is None:
            raise SempaError(f"{source.name} holds no adapter to average. Expected a SemPA folder with one.")
        settings.append(adapter)
        odd = [name for name in _OTHER_UPDATES if adapter.get(name)]
        if adapter.get("peft_type") != "LORA" or odd:
            raise SempaError(
                f"The adapter of {source.name} ({', '.join(odd) or adapter.get('peft_type')}) cannot be "
                "averaged. Expected a plain LoRA."
            )
        refuse_extras(source.name, source.folder.path, "be averaged")
        first = settings[0]
        differing = [
            name
            for name in first.keys() | adapter.keys()
            # An option that one version of PEFT does not know yet is off there.
            if name not in _MAY_DIFFER and (first.get(name) or None) != (adapter.get(name) or None)
        ]
        if source.folder.template != sources[0].folder.template:
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
        stacked_down = torch.cat([adapter[down].float() for adapter in adapters])
        scaled_ups = [scale * adapter[up].float() for scale, adapter in zip(scales, adapters, strict=True)]
        factors = (stacked_down, torch.cat(scaled_ups, dim=1) / len(adapters))
        if not all(factor.isfinite().all() for factor in factors):
            raise SempaError(f"The mean of {up} overflows: an adapter's update is beyond the range of float32.")
        mean[down], mean[up] = factors if rank is None else _truncated(*factors, rank)
    dtype = next(iter(adapters[0].values())).dtype
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in mean.items()}
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise SempaError(
            f"The mean overflows {str(dtype).removeprefix('torch.')}, the type of the first adapter, in {bad[0]}. "
            "Name one in float32 or bfloat16 first, or average fewer models."
        )
    save_file(tensors, output / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _truncated(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the matrix of rank ``rank`` that is nearest to ``up @ down``.

    Args:
        down: Shape (total rank, inputs).
        up: Shape (outputs, total rank).
        rank: Rank of the result.

    Returns:
        Two factors of shapes (rank, inputs) and (outputs, rank); beyond what the matrix can have, they are zero.
    """
    import torch
    from torch.nn import functional

    # With QR decompositions of both factors, only a matrix of shape (total rank, total rank) is decomposed.
    right, inner = torch.linalg.qr(down.T)
    left, outer = torch.linalg.qr(up)
    vectors, values, others = torch.linalg.svd(outer @ inner.T)
    kept = min(rank, len(values))
    roots = values[:kept].sqrt()
    factors = roots[:, None] * (others[:kept] @ right.T), left @ vectors[:, :kept] * roots
    return functional.pad(factors[0], (0, 0, 0, rank - kept)), functional.pad(factors[1], (0, rank - kept))


def _origin(source: Source) -> dict[str, Any]:
    record = source.folder.record or {}
    seed = (record.get("config") or {}).get("seed")
    objectives = objectives_of(record) if record else []
    return {
        "model": portable_name(source.name), "seed": seed, "digest": source.folder.digest, "objectives": objectives
    }  # fmt: skip
