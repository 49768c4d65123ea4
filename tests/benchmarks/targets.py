"""Devices to compile for, whether they are there or not.

A TPU needs libtpu (extra ``tpu-aot``), an H200 XLA's CUDA plugin and the CUDA compiler
(extra ``gpu-aot``); neither needs the device itself, nor a driver.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

AXES = ("data", "model")
_H200 = pathlib.Path(__file__).with_name("h200.pbtxt")


@dataclasses.dataclass(frozen=True)
class Target:
    """Some devices of one kind, laid out as a mesh.

    Attributes:
      kind: ``"cpu"``, ``"v5e"`` or ``"h200"``.
      shape: of the mesh ``("data", "model")``.
    """

    kind: str
    shape: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        return f"{self.kind} {self.shape[0]}x{self.shape[1]}"

    def missing(self) -> str | None:
        """Why nothing can be compiled for it here, if so."""
        if self.kind == "v5e":
            return _missing_tpu()
        if self.kind == "h200":
            return _missing_gpu()
        if len(jax.devices("cpu")) < math.prod(self.shape):
            return f"there are only {len(jax.devices('cpu'))} CPU devices"
        return None

    def mesh(self, axis_type: AxisType = AxisType.Auto) -> Mesh:
        """Its devices as a mesh, to place abstract arrays on."""
        count = math.prod(self.shape)
        if self.kind == "v5e":
            os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
            options = {"chips_per_host_bounds": [1, 1, 1]} if count == 1 else {}
            name = f"v5e:{self.shape[0]}x{self.shape[1]}"
            devices = topologies.get_topology_desc(name, "tpu", **options).devices
        elif self.kind == "h200":
            devices = topologies.get_topology_desc(
                "", "cuda", topology=f"1x1x{count}", target_config=_H200.read_text()
            ).devices
        else:
            devices = jax.devices("cpu")[:count]
        devices = np.array(devices).reshape(self.shape)
        return Mesh(devices, AXES, axis_types=(axis_type,) * 2)

    def options(self) -> dict[str, Any]:
        """Options for the compiler."""
        if self.kind != "h200":
            return {}
        return {
            "xla_gpu_cuda_data_dir": str(_nvcc()),
            "xla_gpu_autotune_level": 0,  # it would need the device
        }


def _missing_tpu() -> str | None:
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return 'libtpu is not installed: pip install -e ".[tpu-aot]"'
    if tuple(int(n) for n in version.split(".")[:3]) < (0, 0, 23):
        return f"libtpu {version} crashes without a TPU: 0.0.23 does not"
    return None


def _missing_gpu() -> str | None:
    names = [f"jax_cuda{n}_plugin" for n in (12, 13)]
    if not any(map(importlib.util.find_spec, names)):
        return 'XLA\'s CUDA plugin is not installed: pip install -e ".[gpu-aot]"'
    if _nvcc() is None:
        return 'the CUDA compiler is not installed: pip install -e ".[gpu-aot]"'
    return None


def _nvcc() -> pathlib.Path | None:
    """Where NVIDIA's wheels put ``ptxas`` and ``libdevice``."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec and spec.submodule_search_locations) or ():
        for name in ("cuda_nvcc", "cu13"):
            if pathlib.Path(root, name, "bin", "ptxas").exists():
                return pathlib.Path(root, name)
    return None
