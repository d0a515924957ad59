"""Several processes as one JAX program: joined when the environment says that there are several, and only then."""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from revseg_jax.errors import InputError, RunFailure

CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")  # JAX's packages for GPUs, either of which will do
EXPLICIT = ("REVSEG_COORDINATOR", "REVSEG_PROCESS_COUNT", "REVSEG_PROCESS_ID")
# What jax.distributed reads in a Slurm job step; a batch script alone lacks the node list, and is one process.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
HEARTBEAT_SECONDS = 20  # a process that is silent for so long counts as gone
METADATA_SECONDS = 5.0  # the metadata server is on the same host


@dataclass(frozen=True)
class Processes:
    """Attributes:
    where: what the environment was found to be, in words
    count, index: of the processes of this program; index is this one's
    coordinator: host:port of process 0; None leaves finding it to jax.distributed
    """

    where: str
    count: int = 1
    index: int = 0
    coordinator: str | None = None

    def __str__(self) -> str:
        return (
            f"process {self.index} of {self.count} ({self.where})" if self.count > 1 else f"one process ({self.where})"
        )


def start_processes() -> str:
    """Joins the other processes when there are any; returns what was found, in one line.

    To be called before anything asks JAX for devices. Raises InputError for settings that cannot be, RunFailure when
    the others do not come.
    """
    found = find_processes(os.environ, tpu_attached())
    if found.count > 1:
        import jax

        # The CPU has no collectives of its own between processes.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            if found.coordinator is None:
                jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
            else:
                explicit = found.coordinator, found.count, found.index
                jax.distributed.initialize(*explicit, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        except RuntimeError as error:
            raise RunFailure(f"{found} did not come together: {str(error).splitlines()[0]}") from None
    return str(found)


def find_processes(environment: Mapping[str, str], tpu: bool) -> Processes:
    """Of which processes this one is, by explicit addresses, Slurm or a TPU pod; asks a metadata server only for the
    latter. tpu: whether TPU chips are attached. Raises InputError."""
    if any(environment.get(name) for name in EXPLICIT):
        return _explicit(environment)
    if all(environment.get(name) for name in SLURM) and int(environment["SLURM_NTASKS"]) > 1:
        where = f"Slurm job {environment['SLURM_JOB_ID']}"
        return Processes(where, int(environment["SLURM_NTASKS"]), int(environment["SLURM_PROCID"]))
    if tpu:
        return _tpu_pod(environment)
    return Processes("neither TPU pod nor Slurm nor REVSEG_COORDINATOR")


def tpu_attached() -> bool:
    """Whether this machine has TPU chips that JAX may use."""
    allowed = os.environ.get("JAX_PLATFORMS", "")
    return tpu_chips() and (not allowed or "tpu" in allowed) and importlib.util.find_spec("libtpu") is not None


def gpu_driver() -> bool:
    """Whether CUDA's driver, without which no GPU can be used, is on this machine."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def tpu_chips() -> bool:
    """Whether this machine has TPU chips. A passed-through GPU has the same kind of file, but Google's vendor number
    0x1ae0 is a TPU's (or a network card's, which is on every machine in their cloud)."""
    if glob.glob("/dev/accel[0-9]*"):
        return True
    return bool(glob.glob("/dev/vfio/[0-9]*")) and any(
        Path(path).read_text().strip() == "0x1ae0" for path in glob.glob("/sys/bus/pci/devices/*/vendor")
    )


def _explicit(environment: Mapping[str, str]) -> Processes:
    missing = [name for name in EXPLICIT if not environment.get(name)]
    if missing:
        raise InputError(f"{', '.join(EXPLICIT)} go together: {' and '.join(missing)} is not set")
    address, count, index = (environment[name] for name in EXPLICIT)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"REVSEG_COORDINATOR={address} is not of the form host:port")
    if not count.isdigit() or not index.isdigit() or int(index) >= int(count):
        raise InputError(f"REVSEG_PROCESS_ID={index} must be a number below REVSEG_PROCESS_COUNT={count}")
    return Processes(f"coordinator {address}", int(count), int(index), address)


def _tpu_pod(environment: Mapping[str, str]) -> Processes:
    """On GKE the environment names the workers; on a TPU VM its metadata server does."""
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    worker = environment.get("TPU_WORKER_ID", "0")
    slices, slice_index = environment.get("MEGASCALE_NUM_SLICES"), environment.get("MEGASCALE_SLICE_ID")
    if hosts is None:
        hosts, worker = (_metadata(environment, name) for name in ("worker-network-endpoints", "agent-worker-number"))
        described = _metadata(environment, "tpu-env") or ""  # lines of KEY: 'value'
        pairs = (line.partition(":") for line in described.splitlines())
        values = {key.strip(): value.strip().strip("'") for key, _, value in pairs}
        slices = slices or values.get("MEGASCALE_NUM_SLICES")
        slice_index = slice_index or values.get("MEGASCALE_SLICE_ID")
    per_slice = len(hosts.split(",")) if hosts else 1
    count = per_slice * int(slices or 1)
    index = int(worker or 0) + per_slice * int(slice_index or 0)
    slices = f"{slices} slices of {per_slice} hosts" if slices and int(slices) > 1 else f"{per_slice} hosts"
    return Processes(f"TPU pod, {slices}" if count > 1 else "one TPU host", count, index)


def _metadata(environment: Mapping[str, str], name: str) -> str | None:
    """An attribute of this virtual machine, or None where there is no metadata server or no such attribute."""
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")  # the name jax.distributed reads too
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is never behind the web's proxy
    try:
        with direct.open(request, timeout=METADATA_SECONDS) as reply:
            return reply.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return None
