"""`revseg doctor`: what this machine has and what is missing, one line each, with the remedy."""

from __future__ import annotations

import glob
import importlib.util
import platform
from collections.abc import Iterator
from dataclasses import dataclass

from revseg_jax.config import Config
from revseg_jax.data.prepared import read_prepared
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.parallel.startup import CUDA_PLUGINS, tpu_chips
from revseg_jax.paths import is_remote, path_of
from revseg_jax.policy.checkpoint import REQUIRED, resolve_folder
from revseg_jax.run.manifest import version

VERSIONS = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "transformers",
    "torch",
)
PATIENCE_SECONDS = 5.0  # how long a sidecar is waited for


@dataclass(frozen=True)
class Finding:
    """Attributes:
    name: what was looked at
    words: what was found
    remedy: what to do about it; empty when nothing is missing
    needed: whether the project works here only with it
    """

    name: str
    words: str
    remedy: str = ""
    needed: bool = True

    def __str__(self) -> str:
        mark = "ok" if not self.remedy else "MISSING" if self.needed else "optional"
        return f"{mark:8} {self.name}: {self.words}" + (f"; {self.remedy}" if self.remedy else "")


def main(config: Config) -> None:
    """Prints the findings; raises RunFailure when something needed is missing. The config says which sidecars, policy
    and data are asked for; its defaults need none."""
    missing = 0
    for finding in examine(config):
        print(finding, flush=True)
        missing += bool(finding.remedy) and finding.needed
    if missing:
        raise RunFailure(f"{missing} of these things are missing")


def examine(config: Config) -> Iterator[Finding]:
    yield Finding("python", platform.python_version())
    yield from packages()
    yield from devices(has_gpu=bool(glob.glob("/dev/nvidia[0-9]*")), has_tpu=tpu_chips())
    yield from stores(config)
    yield policy(config.policy.path)
    for folder in (*config.data.train, *config.data.test):
        yield data(folder)
    yield from sidecars(config)


def packages() -> Iterator[Finding]:
    found = {name: version(name) for name in VERSIONS}
    absent = [name for name, number in found.items() if number is None]
    words = ", ".join(f"{name} {number}" for name, number in found.items() if number is not None)
    yield Finding("packages", words, f"install {', '.join(absent)}: pip install revseg-jax" if absent else "")
    for name, what, needed, remedy in (
        ("sam2", "the sidecar's model", True, "SAM2_BUILD_CUDA=0 pip install sam2==1.1.0"),
        ("prometheus_client", "a sidecar's --metrics-port", False, "pip install 'revseg-jax[sidecar]'"),
    ):
        number = version(name)
        yield Finding(name, number or f"not installed ({what} needs it)", "" if number else remedy, needed)


def devices(has_gpu: bool, has_tpu: bool) -> Iterator[Finding]:
    """What JAX computes on, and whether it is the best that this machine has."""
    for there, chip, extra, modules in (
        (has_tpu, "TPU", "tpu", ("libtpu",)),
        (has_gpu, "NVIDIA GPU", "cuda", CUDA_PLUGINS),
    ):
        if there and not any(importlib.util.find_spec(name) for name in modules):
            remedy = f"pip install 'revseg-jax[{extra}]' (that is jax[{'cuda13' if extra == 'cuda' else extra}])"
            yield Finding(f"jax for {chip}", f"this machine has a {chip}, but JAX cannot use it", remedy)
    if has_gpu and version("nvidia-cudnn-cu12") and version("nvidia-cudnn-cu13"):  # torch brings the latter
        words = "nvidia-cudnn-cu12 and nvidia-cudnn-cu13 are both installed, and each overwrites files of the other"
        remedy = "pip uninstall jax-cuda12-plugin jax-cuda12-pjrt nvidia-cudnn-cu12, then pip install --force-reinstall"
        yield Finding("cudnn", words, f"{remedy} --no-deps nvidia-cudnn-cu13, and 'jax[cuda13]'")
    import jax

    try:
        found = jax.local_devices()
    except RuntimeError as error:
        yield Finding("devices", str(error).splitlines()[0], "check the driver, and JAX_PLATFORMS in the environment")
        return
    idle = (has_gpu or has_tpu) and found[0].platform == "cpu"
    words = f"{len(found)} x {found[0].device_kind} ({found[0].platform})"
    yield Finding("devices", words, "JAX computes on the CPU: unset JAX_PLATFORMS, or see above" if idle else "")


def stores(config: Config) -> Iterator[Finding]:
    names = (config.run.dir, config.policy.path, *config.data.train, *config.data.test)
    if remote := [name for name in names if is_remote(name)]:
        number = version("gcsfs")
        yield Finding("gcsfs", number or f"not installed ({remote[0]} needs it)", "" if number else "pip install gcsfs")


def policy(path: str) -> Finding:
    try:
        folder = path_of(path) if is_remote(path) else resolve_folder(path)
        absent = [name for name in REQUIRED if not (folder / name).is_file()]
    except (InputError, OSError) as error:
        return Finding("policy", path, f"cannot be read: {error}")
    return Finding("policy", path, f"it lacks {', '.join(absent)}: set policy.path" if absent else "")


def data(folder: str) -> Finding:
    try:
        summary = read_prepared(folder)["summary"]
    except (InputError, OSError) as error:
        return Finding("data", folder, str(error))
    counts = ", ".join(f"{split}: {counted['expressions']} expressions" for split, counted in summary.items())
    return Finding("data", f"{folder} ({counts})")


def sidecars(config: Config) -> Iterator[Finding]:
    """Each is asked for its model, which must be one for all; its certificate and the token are tried too."""
    from revseg_jax.tracker.client import TrackerClient
    from revseg_jax.tracker.process import credentials

    asked = config.tracker
    for name, file in (("checkpoint", asked.checkpoint), ("config", asked.config)):
        stock = name == "config" and not file.endswith((".yaml", ".yml"))
        if not asked.endpoints and file != "embedded" and not stock:
            yield Finding(
                f"tracker {name}", file, "" if path_of(file).is_file() else f"no such file: see tracker.{name}"
            )
    first = ""  # the model of the first that answers
    for endpoint in config.tracker.endpoints:
        try:
            token, tls = credentials(config.tracker)
            with TrackerClient([endpoint], PATIENCE_SECONDS, PATIENCE_SECONDS, token=token, tls=tls) as client:
                info = client.info()
            first = first or info.model
            fault = "" if info.model == first else "runs another model than the first: all must run the same"
            yield Finding("sidecar", f"{endpoint} serves {info.checkpoint} ({info.model[:12]})", fault)
        except (InputError, RunFailure) as error:
            yield Finding("sidecar", endpoint, str(error))
