"""On what a figure was measured: hardware, versions, date and seed."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lorapre


def hardware() -> str:
    """The GPUs, or else the processor and its cores, in one line; never the host's name."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions(*also: str) -> dict[str, str]:
    """Versions of Python, of the packages that decide a result, and of those named."""
    found = {"python": platform.python_version(), "lorapre": lorapre.__version__}
    for package in ("torch", "transformers", "accelerate", "tokenizers", *also):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def provenance(*also: str, seed: int) -> dict[str, Any]:
    """What every report carries; ``also`` names further packages."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(*also),
        "seed": seed,
    }
