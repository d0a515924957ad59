"""The device mesh: four named axes, the outer ones over the slower connections."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from revseg_jax.config import MeshConfig
from revseg_jax.errors import InputError

AXES = ("slice", "data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh with the axes `AXES`; one size may be -1 and takes the devices that are left.

    TPU chips are laid out so that neighbours on the mesh are neighbours in the torus, and different slices of a pod
    differ in the axis `slice` only. Raises InputError when the sizes do not use all devices exactly.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, name) for name in AXES]

    def said() -> str:
        return " ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))

    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"mesh sizes {said()}: one may be -1")
    known = int(np.prod([size for size in sizes if size != -1]))
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise InputError(f"mesh {said()} does not use the {len(devices)} devices")
    return Mesh(_arrange(devices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(devices: list[jax.Device], sizes: list[int]) -> np.ndarray:
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})  # chips of one slice need not say so
    if slices != sizes[0]:
        raise InputError(f"mesh.slice={sizes[0]} must be the number of slices, {slices}")
    within = (1, *sizes[1:])
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
        return mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
    except NotImplementedError as error:
        raise InputError(f"mesh sizes {within[1:]} do not fit the slice's torus: {error}") from None
