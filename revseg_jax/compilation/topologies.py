"""Descriptions of chips that are not there, good enough for a compiler: TPU slices by libtpu, GPUs by their numbers."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from revseg_jax.compilation.roofline import CHIPS, Pod
from revseg_jax.errors import InputError
from revseg_jax.learner.flops import peak_flops
from revseg_jax.parallel.startup import CUDA_PLUGINS


@dataclass(frozen=True)
class Gpu:
    """What XLA asks a GPU that is there. NVIDIA's data sheets and CUDA's table of compute capabilities.

    Attributes:
      name: as JAX would call the device
      capability: CUDA's compute capability
      cores: streaming multiprocessors
      fpus: float32 units of a core
      shared_memory: bytes of a core, of which a block can have all but 1 KiB
      cache: bytes of L2
      clock: GHz
    """

    name: str
    capability: tuple[int, int]
    cores: int
    fpus: int
    shared_memory: int
    cache: int
    clock: float


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 * 2**10, 40 * 2**20, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 * 2**10, 50 * 2**20, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 228 * 2**10, 50 * 2**20, 1.98),
}


def make_pod(topology: str, slices: int, mesh: Mesh) -> Pod:
    """topology, slices: as `describe` takes them; mesh: of the devices that it gave."""
    kind, devices = topology.partition(":")[0], mesh.devices.flat
    per_slice = mesh.size // slices
    places = (tuple(d.coords) if kind not in GPUS else (n % per_slice,) for n, d in enumerate(devices))
    return Pod(topology, CHIPS[kind], peak_flops(devices[0].device_kind), tuple(places), slices)


def describe(topology: str, slices: int) -> list[jax.Device]:
    """Descriptions of the chips. topology: "v5p:4x4x4", or "h200:8" for the GPUs of a machine; slices: how many of
    these. Raises InputError for one that the compiler does not know."""
    from jax.experimental import topologies

    # A program for another machine is of no use to the cache of this one's.
    jax.config.update("jax_enable_compilation_cache", False)
    kind, _, sizes = topology.partition(":")
    if kind not in CHIPS:
        raise InputError(f"topology {topology}: {kind or 'nothing'} is not one of {', '.join(CHIPS)}")
    gpu = kind in GPUS
    if not re.fullmatch(r"[1-9]\d*" if gpu else r"\d+(x\d+)+", sizes):
        raise InputError(f"topology {topology!r} is not of the form v5p:4x4x4 or h200:8")
    if gpu:
        if not any(map(importlib.util.find_spec, CUDA_PLUGINS)):
            raise InputError("compiling for GPUs needs JAX's CUDA plugin: pip install 'revseg-jax[cuda]'")
        options = {"platform": "cuda", "target_config": _target(kind), "topology": f"{slices}x1x{sizes}"}
    else:
        if importlib.util.find_spec("libtpu") is None:
            raise InputError("compiling for TPUs needs libtpu: pip install 'revseg-jax[tpu]'")
        options = {"platform": "tpu", "topology_name": topology}
        options |= {"num_slices": slices} if slices > 1 else {}
        options |= {"chip_config_name": "megacore"} if kind == "v4" else {}  # both of a chip's cores as one device
    try:
        found = topologies.get_topology_desc(**options)
    except Exception as error:  # the plugins' own kinds
        raise InputError(f"topology {topology}: {str(error).splitlines()[0]}") from None
    return found.devices


def _target(kind: str) -> str:
    """A GpuTargetConfigProto of XLA, as text."""
    gpu, chip = GPUS[kind], CHIPS[kind]
    (major, minor), shared = gpu.capability, gpu.shared_memory
    return f"""
        platform_name: "CUDA"
        device_description_str: "{gpu.name}"
        runtime_version {{ major: 12 minor: 9 }}
        dnn_version_info {{ major: 9 minor: 10 }}
        gpu_device_info {{
            cuda_compute_capability {{ major: {major} minor: {minor} }}
            core_count: {gpu.cores} fpus_per_core: {gpu.fpus} clock_rate_ghz: {gpu.clock}
            shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024}
            shared_memory_per_block: 49152 l2_cache_size: {gpu.cache}
            device_memory_size: {int(chip.hbm)} memory_bandwidth: {int(chip.hbm_rate)}
            threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
            registers_per_core_limit: 65536 registers_per_block_limit: 65536
            block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}
    """
