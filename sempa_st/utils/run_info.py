"""What is needed to repeat a run: versions, hardware, command and data fingerprints."""

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
    """Return the SHA-256 (hex) of rows in order, each as canonical JSON."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the installed versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Return the machine's kind, processor count and accelerators (no host name)."""
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
    """Return the common head of every run record: time (UTC), command, versions and hardware.

    Of files and folders in the command only the last part is kept: the rest is the author's own machine.
    """
    program = Path(sys.argv[0]).name.replace("__main__.py", "sempa") or "python"
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": portable_command([program, *sys.argv[1:]]),
        "versions": versions(),
        "hardware": hardware(),
    }
