"""Where files live: on a disk, or as objects of a store such as Google Cloud Storage (gs://BUCKET/...).

A local path stays the `pathlib.Path` it always was; a remote one is an `etils.epath.Path`, which has the same methods.
What only a disk can do (memory maps, appending, locks) is done on a copy: of a policy here, of a run in `mirror`.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from revseg_jax.errors import InputError, RunFailure

AnyPath = Path  # or an epath.Path: the methods used on either are the same


def path_of(name: str | os.PathLike) -> AnyPath:
    """The path that a user's words name. Raises InputError for a gs:// path where its client is not installed."""
    if not is_remote(name):
        # Shells leave the ~ of run.dir=~/runs alone; pathlib's own way fails for users that there are not.
        return Path(os.path.expanduser(name))
    import fsspec
    from etils import epath

    if importlib.util.find_spec("gcsfs") is None:  # epath would only fail at the first access, and with a traceback
        raise InputError(f"{name}: paths in Google Cloud Storage need gcsfs: pip install gcsfs")
    # Other machines write into these folders too: what lies there is asked for anew each time.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    return epath.Path(os.fspath(name))


def is_remote(path: str | os.PathLike) -> bool:
    return os.fspath(path).startswith("gs://")


def local_only(name: str | os.PathLike) -> Path:
    """The path, for commands that need a disk. Raises InputError for a remote one."""
    if is_remote(name):
        raise InputError(f"{name}: this works on a local folder; copy it with gcloud storage cp --recursive")
    return path_of(name)


def absolute(path: AnyPath) -> AnyPath:
    """Remote paths are so already; epath would put the working directory before them."""
    return path if is_remote(path) else path.absolute()


def local_copy(folder: AnyPath) -> Path:
    """The folder itself, or for a remote one a copy of its files on this machine's disk, made once and kept.

    It lies in the user's cache, under a name made from the files' names, sizes and times of change: a folder that was
    written anew is copied anew. Raises RunFailure when the disk cannot take it.
    """
    if not is_remote(folder):
        return folder
    files = sorted(path for path in folder.iterdir() if not path.is_dir())
    digest = hashlib.sha256(os.fspath(folder).encode())
    for path in files:
        stat = path.stat()
        digest.update(f"{path.name} {stat.length} {stat.mtime}".encode())
    copy = Path(cache_folder()) / "copies" / digest.hexdigest()[:16]
    if copy.is_dir():
        return copy
    partial = None
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial", dir=copy.parent))
        for path in files:
            with path.open("rb") as source, open(partial / path.name, "wb") as target:
                shutil.copyfileobj(source, target, 16 << 20)
        partial.rename(copy)
    except OSError as error:
        if not copy.is_dir():  # another process may have finished it meanwhile
            raise RunFailure(f"cannot copy {folder} to {copy}: {error.strerror or error}") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return copy


def upload(folder: Path, target: AnyPath, last: str) -> None:
    """Copies a local folder's files to a remote one; the file named `last` makes it complete and comes at the end."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
        with open(path, "rb") as source, (target / path.name).open("wb") as copy:
            shutil.copyfileobj(source, copy, 16 << 20)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A hidden local file to write; it becomes `path` when the block ends well and else is gone. A kill, or a disk that
    fills up, leaves `path` as it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):  # it became `path`, or never was
            partial.unlink()


def write_whole(path: Path, text: str) -> None:
    """Writes a local file, in full or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text)


def take_lock(path: Path, refusal: str) -> IO[str]:
    """Holds a local file, made if it is not there, until what is returned is closed or the process ends, however it
    ends: then the operating system lets go of it. Raises InputError(refusal) when another process holds it."""
    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(refusal) from None
    return file


def cache_folder() -> str:
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "revseg_jax")
