"""Where and when something was measured, and how much fits there."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import jax

_NAMES = ("movement-jax", "jax", "jaxlib", "flax", "optax", "numpy", "libtpu", "torch")


def describe() -> dict[str, Any]:
    """Date, versions and machine."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {
            "cores": os.cpu_count(),
            "processor": _processor(),
            "memory_gib": round(available(total=True) / 2**30, 1),
            "load": os.getloadavg()[0],
            "backend": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
        },
    }


def available(total: bool = False) -> int:
    """Bytes of memory that are free on the device, or in total on the host."""
    if not total and jax.default_backend() != "cpu":
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("bytes_limit", 2**33) - stats.get("bytes_in_use", 0)
    word = "MemTotal:" if total else "MemAvailable:"
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(word))


def _versions() -> dict[str, str]:
    found = {}
    for name in _NAMES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return names[0] if names else platform.processor()
