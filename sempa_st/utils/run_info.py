"""Information for repeating a run: versions, hardware, command and data fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from sempa_st.utils.portable import portable_command

_PACKAGES = (
    "sempa-st",
    "torch",
    "transformers",
    "sentence-transformers",
    "peft",
    "trl",
    "mteb",
    "lm-eval",
    "datasets",
    "numpy",
)


def fingerprint(rows: Iterable[Any]) -> str:
    """Return the SHA-256 (hex) of the rows in order, each serialised as canonical JSON."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the installed versions of Python and of the packages that affect results."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def hardware() -> dict[str, Any]:
    """Return the machine type, operating system, processor and GPUs (no host name)."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": str(torch.cpu.get_capabilities().get("cpu_name", platform.processor())),
        "cpu_count": os.cpu_count(),
        "gpus": gpus,
    }


def run_info() -> dict[str, Any]:
    """Return the common fields of all run records: time (UTC), command with portable names, versions and hardware."""
    program = Path(sys.argv[0]).name.replace("__main__.py", "sempa") or "python"
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": portable_command([program, *sys.argv[1:]]),
        "versions": versions(),
        "hardware": hardware(),
    }
