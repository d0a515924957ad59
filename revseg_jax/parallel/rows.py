"""Rows of prompts: each process holds some on the host, all processes together hold an array on the devices."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from revseg_jax.config import Config
from revseg_jax.errors import InputError
from revseg_jax.parallel.processes import gather
from revseg_jax.parallel.sharding import Placement

Thing = TypeVar("Thing")


def process_share(placement: Placement) -> tuple[int, int]:
    """(index, count): into how many equal shares the processes split the prompts, and which of them is this one's.

    Processes that only differ in axes that prompts are not spread over have the same share. Raises InputError for a
    mesh on which the shares are not equal or overlap in part.
    """
    parts = placement.parts("prompts")
    held: dict[int, set[int]] = {}
    sharding = placement.sharding((parts,), "prompts")
    for device, (rows,) in sharding.devices_indices_map((parts,)).items():
        held.setdefault(device.process_index, set()).update(range(parts)[rows])
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != parts:
        sizes = " ".join(f"{name}={size}" for name, size in placement.mesh.shape.items())
        raise InputError(f"mesh {sizes}: the {len(held)} processes cannot share the prompts evenly")
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def gather_shares(placement: Placement, thing: Thing) -> list[Thing]:
    """What the processes gave, once for each share, in the order of the rows; of processes with the same share the
    first one's counts. All processes must call it; anything that pickles."""
    if jax.process_count() == 1:
        return [thing]
    found: dict[int, Thing] = {}
    for share, other in gather((process_share(placement)[0], thing)):
        found.setdefault(share, other)
    return [found[share] for share in sorted(found)]


def same_in_share(placement: Placement, thing: Thing) -> Thing:
    """The first process's of those that have this one's share: what came from outside, as rewards do, must not differ
    between copies of one row. All processes must call it; anything that pickles."""
    share, count = process_share(placement)
    return thing if count == jax.process_count() else gather_shares(placement, thing)[share]


def mean_over_shares(placement: Placement, metrics: dict[str, float]) -> dict[str, float]:
    """Of metrics over equally many prompts each; those that end in "_count" add up, of those that end in "_longest" the
    largest counts, one that is missing is 0."""
    parts = gather_shares(placement, metrics)

    def joined(name: str) -> float:
        values = [part.get(name, 0.0) for part in parts]
        if name.endswith("_longest"):
            return max(values)
        return sum(values) / (1 if name.endswith("_count") else len(values))

    return {name: joined(name) for name in dict.fromkeys(name for part in parts for name in part)}


def check_spread(placement: Placement, config: Config) -> None:
    """Raises InputError for numbers of prompts that the mesh cannot spread evenly."""
    prompts, parts = config.rollout.prompts_per_step, placement.parts("prompts")
    counts = {
        "rollout.prompts_per_step": prompts,
        "rollout.prompts_per_batch": config.rollout.prompts_per_batch or prompts,
        "learner.prompts_per_microbatch": config.learner.prompts_per_microbatch
        or prompts // config.learner.minibatches,
    }
    for name, count in counts.items():
        if count % parts:
            raise InputError(
                f"{name}={count} must be a multiple of the {parts} parts that the mesh spreads prompts over"
            )


def place_rows(placement: Placement, tree: Any) -> Any:
    """Host arrays [own rows, ...] of every process as one array [rows, ...], spread over the devices.

    Arrays that are on the devices already stay as they are.
    """

    def put(array: np.ndarray | jax.Array) -> jax.Array:
        if isinstance(array, jax.Array) and not isinstance(array.sharding, SingleDeviceSharding):
            return array
        share = process_share(placement)[1] if jax.process_count() > 1 else 1
        shape = (array.shape[0] * share, *array.shape[1:])
        return jax.make_array_from_process_local_data(placement.sharding(shape, "prompts"), np.asarray(array), shape)

    return jax.tree.map(put, tree)


def own_rows(array: jax.Array | np.ndarray) -> np.ndarray:
    """The rows of this process's devices, in order."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
