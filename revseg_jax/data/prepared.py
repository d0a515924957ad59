"""Prepared folders: array_record files written by a TFDS builder, and a `prepared.json` that says what is in them.

A folder appears under its final name only when it is complete, so one with a `prepared.json` can be trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from revseg_jax.data.records import hash_record
from revseg_jax.errors import InputError, RunFailure

MARKER = "prepared.json"
FORMAT = 1


class Summary:
    """Collects, while records pass through on their way to the file, what `prepared.json` says about them."""

    def __init__(self) -> None:
        self.splits: dict[str, list[int]] = {}  # number of expressions of each video, in the order of the file
        self._digest = hashlib.sha256()

    def watch(self, split: str, records: Iterable[dict]) -> Iterator[tuple[int, dict]]:
        """(key, record) pairs as TFDS wants them."""
        counts = self.splits.setdefault(split, [])
        self._digest.update(f"split {split};".encode())
        for key, record in enumerate(records):
            counts.append(len(record["expression_ids"]))
            hash_record(self._digest, record)
            yield key, record

    @property
    def fingerprint(self) -> str:
        return self._digest.hexdigest()


def read_prepared(folder: str | Path) -> dict[str, Any]:
    """The content of `prepared.json`: settings, fingerprint and splits. Raises InputError in one line."""
    path = Path(folder) / MARKER
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{folder} is not a prepared dataset ({MARKER} is missing): write it with `revseg prepare`"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is of another format than {FORMAT}: prepare the dataset again")
    return content


def write_prepared(folder: str | Path, make_builder, settings: dict[str, Any]) -> str:
    """Writes a dataset and returns its fingerprint, the sha256 of the content of its records.

    `make_builder(data_dir, summary)` gives a TFDS builder whose generators go through `summary.watch`. `settings` is
    everything that decides the content: a complete folder with equal settings is reused as it is. Raises InputError
    when the folder holds anything else, RunFailure when it cannot be written; then nothing is left behind.
    """
    import tensorflow_datasets as tfds

    folder = Path(folder)
    settings = json.loads(json.dumps(settings))  # tuples become lists, as they will when read back
    if folder.exists():
        return _reuse(folder, settings)
    work = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        summary = Summary()
        builder = make_builder(str(work), summary)
        tfds.disable_progress_bar()  # its bars count shards and splits; ours count clips
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(file_format="array_record")
        content = {
            "format": FORMAT,
            "settings": settings,
            "fingerprint": summary.fingerprint,
            "expressions": summary.splits,
        }
        (Path(builder.data_dir) / MARKER).write_text(json.dumps(content) + "\n")
        try:
            os.rename(builder.data_dir, folder)
        except OSError:
            if folder.exists():  # another process was faster
                return _reuse(folder, settings)
            raise
        return summary.fingerprint
    except (OSError, RuntimeError) as error:  # array_record reports a full disk as RuntimeError
        raise RunFailure(f"cannot write the dataset {folder}: {str(error).splitlines()[0]}") from None
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _reuse(folder: Path, settings: dict[str, Any]) -> str:
    prepared = read_prepared(folder)
    if prepared["settings"] != settings:
        raise InputError(f"{folder} holds a dataset with other settings: delete it or choose another folder")
    return prepared["fingerprint"]
