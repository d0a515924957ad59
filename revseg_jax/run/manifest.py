"""What a run was made of and on: the content of run.json."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from revseg_jax.config import Config
from revseg_jax.parallel.mesh import make_mesh
from revseg_jax.run.digests import digest

PACKAGES = (
    "revseg-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "array_record",
    "tensorflow-datasets",
    "numpy",
    "pillow",
    "scipy",
    "transformers",
    "tokenizers",
    "torch",
    "sam2",
)
EDGE_BYTES = 65536
TRACKER = ("tracker", "tracker_device", "tracker_versions")
# What may change the bits.
CONDITIONS = ("versions", "platform", "device_kinds", "processes", "mesh", "flags", *TRACKER[1:])


def manifest(
    config: Config, fingerprints: list[str], policy: Path, tracker: dict[str, Any] | None = None
) -> dict[str, Any]:
    """JSON-ready. fingerprints: of the folders of `data.train`; policy: the folder of the policy that the run starts
    from and, with a KL, is held near to; tracker: `revseg_jax.tracker.client.description`, of a run that asks one."""
    devices = jax.devices()
    return {
        "command": sys.argv,
        "seed": config.run.seed,
        # Every draw has a name: the seed, and what it is for.
        "seeds": {
            "data": f"{config.run.seed} > epoch (a mixture: + folder) > shuffle",
            "rollouts": f"{config.run.seed} > step > prompt > sample > token",
        },
        "config": dataclasses.asdict(config),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "platform": platform.platform(),
        "devices": [str(device) for device in devices],
        "device_kinds": sorted({device.device_kind for device in devices}),
        "processes": jax.process_count(),
        "mesh": dict(make_mesh(config.mesh).shape),
        "flags": {name: os.environ[name] for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if name in os.environ},
        "data_fingerprints": fingerprints,
        "policy_fingerprint": policy_fingerprint(policy),
        "git": _git_revision(),
        **(tracker or {}),
    }


def policy_fingerprint(folder: Path) -> str:
    """Of a checkpoint folder's weights and configs: names, sizes and both ends of the files, so that it is quick."""
    parts = []
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json"):
            with open(path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                for begin in (0, max(size - EDGE_BYTES, 0)):
                    file.seek(begin)
                    parts += [path.name, size, file.read(EDGE_BYTES)]
    return digest(parts)


def with_known_tracker(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The manifest `now`; when nobody asks a tracker in it, with the tracker of the start before: a later start that
    asks one is compared with it."""
    known = {} if "tracker" in now else {name: before[name] for name in TRACKER if name in before}
    return now | known


def other_inputs(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, which of the things that a run is made of, beside its config, differ between two manifests."""
    found = []
    for name, words in (
        ("data_fingerprints", "other clips in data.train (its files or filter.json)"),
        ("policy_fingerprint", "other files in policy.path"),
    ):
        if before.get(name, now[name]) != now[name]:
            found.append(words)
    trackers = [content["tracker"] for content in (before, now) if "tracker" in content]
    if len({tracker["model"] for tracker in trackers}) > 1:
        found.append(f"another tracker ({' and '.join(tracker['checkpoint'] for tracker in trackers)})")
    return found


def changed_conditions(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, what is otherwise than at another start of the same run and may change its bits."""
    differences = []
    for name in CONDITIONS:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            pairs = [(key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())]
            differences += [f"{name} {key} {b} instead of {a}" for key, a, b in pairs if a != b]
        elif None not in (old, new) and old != new:
            differences.append(f"{name} {new} instead of {old}")
    return differences


def version(package: str) -> str | None:
    """Of an installed package; None where it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> dict[str, Any] | None:
    """Revision of the checkout the package runs from, and whether it was clean; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "clean": not git("status", "--porcelain")}
    except (OSError, subprocess.CalledProcessError):
        return None
