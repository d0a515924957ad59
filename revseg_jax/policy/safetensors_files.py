"""The safetensors format: reading by memory map, so that only the bytes asked for are read, and writing as a stream.

A file is: 8 bytes (length n of the header, little-endian), n bytes of JSON {name: {dtype, shape, data_offsets}}, data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from revseg_jax.errors import RunFailure

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4_900_000_000  # under the 5 GB that file hosts take
DTYPES = {"F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16), "F32": np.dtype(np.float32)}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a file says about one tensor."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file

    def array(self) -> np.ndarray:
        """A view [shape] of the file: bytes are read when its elements are, and leave memory with the view."""
        # A map of its own for each tensor, because the pages of a map count as this process's memory while it lives.
        return np.memmap(self.path, self.dtype, "r", self.start, self.shape)


def open_checkpoint(folder: Path) -> tuple[dict[str, StoredTensor | None], list[str]]:
    """Tensors by name of `model.safetensors`, or else of the files its index names; and a list of what is wrong.

    None stands for a tensor that the index places in a file that is missing or unreadable.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return open_file(single)
    if not index.is_file():
        return {}, [f"there is neither {SINGLE} nor {INDEX}"]
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
        paths = {name: folder / name for name in sorted(set(weight_map.values()))}
    except (ValueError, KeyError, TypeError):
        return {}, [f"{INDEX} is not an index of safetensors files"]
    tensors: dict[str, StoredTensor | None] = {}
    problems: list[str] = []
    for file_name, path in paths.items():
        found, wrong = open_file(path) if path.is_file() else ({}, [f"{file_name} is missing"])
        problems += wrong + [f"{name} is stored twice" for name in found if name in tensors]
        tensors |= found
        if not found:
            tensors |= dict.fromkeys(name for name, home in weight_map.items() if home == file_name)
    return tensors, problems


def open_file(path: Path) -> tuple[dict[str, StoredTensor | None], list[str]]:
    """Tensors of one file by name, None for one of an unknown type, and a list of what is wrong. Those of a truncated
    file must not be read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > size - 8:
            return {}, [f"{path.name} is truncated or not a safetensors file ({size} bytes)"]
        try:
            header = json.loads(file.read(header_size))
            header.pop("__metadata__", None)
            entries = [(name, str(e["dtype"]), *_place(e)) for name, e in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}, [f"{path.name} is not a safetensors file"]
    start = 8 + header_size
    data_size = max((end for *_, end in entries), default=0)
    problems = []
    if start + data_size > size:
        problems.append(f"{path.name} is truncated: {size} bytes of {start + data_size}")
    tensors: dict[str, StoredTensor | None] = {}
    for name, code, shape, begin, end in entries:
        if code not in DTYPES:
            problems.append(f"{name} has type {code}, not one of {', '.join(DTYPES)}")
            tensors[name] = None
            continue
        if end - begin != DTYPES[code].itemsize * math.prod(shape):
            problems.append(f"{name} has {end - begin} bytes for shape {list(shape)}")
        tensors[name] = StoredTensor(path, DTYPES[code], shape, start + begin)
    return tensors, problems


def _place(entry: dict[str, Any]) -> tuple[tuple[int, ...], int, int]:
    """Shape, begin and end of the data. Raises TypeError, KeyError or ValueError when they are none."""
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise ValueError("a size is not a whole number")
    return shape, begin, end


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(array, dtype)
    if dtype == np.float16 and not np.isfinite(stored).all() and np.isfinite(array).all():
        raise RunFailure(f"{name} holds numbers too large for {dtype}: save in bfloat16 or float32")
    return stored


def write_checkpoint(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: np.dtype,
    arrays: Iterable[tuple[str, np.ndarray]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes tensors of one dtype, given in the order of `shapes`, into as few files as `shard_bytes` allows.

    One array is in memory at a time. Several files get an index. Raises RunFailure when a number is too large for the
    dtype.
    """
    sizes = {name: dtype.itemsize * math.prod(shape) for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    stream = iter(arrays)
    for file_name, names in zip(files, shards, strict=True):
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
        end = 0
        for name in names:
            header[name] = {"dtype": CODES[dtype], "shape": shapes[name], "data_offsets": [end, end + sizes[name]]}
            end += sizes[name]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file_name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for expected in names:
                name, array = next(stream)
                assert name == expected and array.shape == tuple(shapes[name])
                file.write(_cast(name, array, dtype).reshape(-1).view(np.uint8))
    if count > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
