"""A run whose folder is remote: its small files are written on this machine's disk and carried over before checkpoints.

Checkpoints go to the remote folder directly. A run goes on from a checkpoint and forgets what was logged after it, so
carrying the files over before each checkpoint loses nothing, however the machine ends.

A store has no locks that end with their holder. Instead the trainer that came last owns the run: it writes its name
into the folder, and one that finds another's name there stops at its next checkpoint, before it has written anything.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import jax

from revseg_jax.errors import RunFailure
from revseg_jax.paths import AnyPath, cache_folder, is_remote, path_of

DIRECT = ("checkpoints", "damaged")  # what Orbax writes
OWNER = "owner"


class Mirror:
    """Attributes:
    folder: the run's own, local or remote
    local: where its files are written; the same folder for a local one, with which nothing else here does anything
    """

    def __init__(self, name: str):
        self.folder = path_of(name)
        self.local = self.folder
        if is_remote(name):
            self.local = Path(cache_folder()) / "runs" / sha256(name.encode()).hexdigest()[:16]
        self._name = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4()}"
        self._there: dict[str, tuple[int, int]] = {}  # files that the remote folder has: size and time of change here

    def pull(self) -> None:
        """Makes the local files those of the remote folder, and process 0 the run's owner."""
        if not is_remote(self.folder):
            return
        for path in list(_files(self.local)):
            if path.name != "lock":
                path.unlink()
        for path in _files(self.folder):
            relative = str(path.relative_to(self.folder))
            target = self.local / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            self._there[relative] = _version(target)
        if jax.process_index() == 0:
            (self.folder / OWNER).write_text(self._name)

    def push(self) -> None:
        """Carries over what changed since the last time. Raises RunFailure when another trainer owns the run by now."""
        if not is_remote(self.folder) or jax.process_index() != 0:
            return
        owner = (self.folder / OWNER).read_text()
        if owner != self._name:
            host, process, _ = owner.split()
            raise RunFailure(f"process {process} on {host} has taken over {self.folder}: this one stops")
        here = {str(path.relative_to(self.local)): _version(path) for path in _files(self.local)}
        for name in here.keys() - {"lock"}:
            if here[name] != self._there.get(name):
                (self.folder / name).write_bytes((self.local / name).read_bytes())
        for name in self._there.keys() - here.keys():
            (self.folder / name).unlink(missing_ok=True)
        self._there = here


def _files(folder: AnyPath) -> Iterator[AnyPath]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir():
            if path.name not in DIRECT:
                yield from _files(path)
        elif path.name != OWNER:
            yield path


def _version(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
