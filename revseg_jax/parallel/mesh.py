"""The device mesh and where arrays live on it."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from revseg_jax.config import MeshConfig
from revseg_jax.errors import InputError

BATCH_AXES = ("data", "fsdp")  # prompts are spread over both


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh with axes data, fsdp, tensor; one axis may be -1 and takes the devices that are left.

    Raises InputError when the sizes do not use all devices exactly.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"mesh sizes data={config.data} fsdp={config.fsdp} tensor={config.tensor}: one may be -1")
    known = int(np.prod([size for size in sizes if size != -1]))
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        data, fsdp, tensor = sizes
        raise InputError(f"mesh data={data} fsdp={fsdp} tensor={tensor} does not use the {len(devices)} devices")
    grid = np.array(devices).reshape(sizes)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Prompts along `axis` are spread over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
