"""From what a program moves and multiplies to seconds, by the makers' numbers for each chip.

What the model assumes, and where it is too kind:
- A matrix product runs at the peak rate and everything else at full memory bandwidth: an instruction takes the longer
  of the two, and instructions run one after the other. Real products of these sizes reach 70 to 90 % of the peak.
- Arithmetic that is not a matrix product costs nothing beyond the memory it touches; latencies cost nothing.
- Inside a fusion only operands and results touch the chip's memory.
- A collective runs over the axes of the torus along which its group's chips lie, at the links' sustained rate, twice
  that where they go all around an axis that closes to a ring, and a part of that where groups lie within each other and
  share the links; all collectives run behind the arithmetic when they take less time
  than it (`seconds`), or not at all (`seconds_without_overlap`). The truth lies between the two.
- A Pallas attention kernel computes whole blocks of its mask, at the peak rate, and cuDNN's what its mask shows.
- Between the GPUs of a machine there is a switch: each has its whole rate to any other. A collective of several
  machines runs between them and then, not meanwhile, within each.
- A loop whose length depends on the data (decoding) runs to its limit; a conditional takes its dearer branch (every
  rollout of a group chooses another keyframe).
Nothing of this was measured on a TPU or a GPU.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from revseg_jax.compilation.work import Work


@dataclass(frozen=True)
class Chip:
    """One chip and its links. Google's pages of the TPU versions, sustained rates of links as in "How to Scale Your
    Model" (2025), chapter 2; NVIDIA's data sheets, the memory that nvidia-smi shows, the network of a DGX.

    Attributes:
      hbm: bytes
      hbm_rate: bytes/s
      link_rate: bytes/s of one link in one direction
      network_rate: bytes/s of one chip to other slices
      ring: an axis of the torus closes to a ring, which doubles its rate, when its size is a multiple of this; with
        three axes all of them must be, as optical switches close whole cubes only
    """

    hbm: float
    hbm_rate: float
    link_rate: float
    network_rate: float
    ring: float


CHIPS = {
    "v4": Chip(32 * 2**30, 1228e9, 4.5e10, 6.25e9, 4),
    "v5e": Chip(16 * 2**30, 819e9, 4.5e10, 3.125e9, 16),
    "v5p": Chip(95 * 2**30, 2765e9, 9e10, 6.25e9, 4),
    "v6e": Chip(32 * 2**30, 1640e9, 9e10, 12.5e9, 16),
    "a100": Chip(81920 * 2**20, 2039e9, 3e11, 25e9, math.inf),
    "h100": Chip(81559 * 2**20, 3350e9, 4.5e11, 50e9, math.inf),
    "h200": Chip(143771 * 2**20, 4800e9, 4.5e11, 50e9, math.inf),
}


@dataclass(frozen=True)
class Pod:
    """Attributes:
    name: such as "v5p:4x4x4" or "h200:8"
    chip: its numbers
    peak: bfloat16 FLOP/s of a chip
    coordinates: of each partition's chip in the torus of its slice, slice by slice; of a machine's GPUs their numbers
    slices: how many
    """

    name: str
    chip: Chip
    peak: float
    coordinates: tuple[tuple[int, ...], ...]
    slices: int

    @property
    def chips(self) -> int:
        return len(self.coordinates)

    def collective_seconds(self, kind: str, size: float, group: tuple[int, ...], slices: int = 0) -> float:
        """size: bytes of the whole array on one chip, before a reduction or after a gathering. slices: between which it
        runs, when that is all that is known; 0: the group says."""
        group = group or tuple(range(self.chips))
        machines = [chip // (self.chips // self.slices) for chip in group]  # or slices
        apart = len(set(machines))
        if apart > 1 and not slices:
            # As NCCL does: chips of the same place in all machines exchange their parts, then those of a machine what
            # came. What an all-to-all sends has one receiver, and is no part of what a whole machine wants.
            near = tuple(chip for chip, machine in zip(group, machines, strict=True) if machine == machines[0])
            own = kind.endswith("all-to-all")
            between = self.collective_seconds(kind, size if own else size / len(near), group, apart)
            return between + self.collective_seconds(kind, size / apart if own else size, near)
        count = slices or len(group)
        if count < 2:
            return 0.0
        if slices or math.isinf(self.chip.ring):
            axes = [(count, self.chip.network_rate if slices else self.chip.link_rate)]
        else:
            axes = self._axes(group)
            if kind.endswith("all-to-all"):
                # Through the middle of axis i, in one direction: half of what half of the n chips hold, n * size / 4,
                # over n / held_i rows of it at rate_i each. The axes work side by side.
                return size / 4 * max(held / rate for held, rate in axes)
        if kind == "collective-permute":
            return size / min(rate for _, rate in axes)
        share = size * (count - 1) / count
        return (2 if kind == "all-reduce" else 1) * share / sum(rate for _, rate in axes)

    def _axes(self, group: tuple[int, ...]) -> list[tuple[int, float]]:
        """Of the axes of the torus along which the group's chips lie: how many places, and bytes/s into a chip."""
        sizes = [max(places) + 1 for places in zip(*self.coordinates, strict=True)]
        closed = [size % self.chip.ring == 0 for size in sizes]
        if sum(size > 1 for size in sizes) > 2 and not all(closed):
            closed = [False] * len(sizes)
        found = []
        for axis, size in enumerate(sizes):
            places = sorted({self.coordinates[chip][axis] for chip in group})
            held = len(places)
            if held > 1:
                gaps = [after - place for place, after in pairwise([*places, places[0] + size])]
                span = size - max(gaps) if closed[axis] else places[-1] - places[0]
                # Where other groups' chips lie between the group's own, each link carries what all of them send: as
                # many as one step between two of its chips takes links.
                step = span / (held - 1)
                around = closed[axis] and held * step == size
                found.append((held, self.chip.link_rate * (2 if around else 1) / step))
        return found or [(len(group), self.chip.link_rate)]


@dataclass
class Estimate:
    """Of one run of a program on one chip.

    Attributes:
      flops: of matrix products, kernels included
      bytes: to and from the chip's memory
      compute_seconds: of everything but collectives
      collective_bytes: by name, of the whole arrays
      collective_seconds: of all collectives, one after the other
      by_source: seconds by (kind, place in the JAX program)
    """

    flops: float = 0.0
    bytes: float = 0.0
    compute_seconds: float = 0.0
    collective_bytes: Counter = field(default_factory=Counter)
    collective_seconds: float = 0.0
    by_source: Counter = field(default_factory=Counter)

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.collective_seconds)

    @property
    def seconds_without_overlap(self) -> float:
        return self.compute_seconds + self.collective_seconds


def estimate(works: Iterable[Work], pod: Pod, kernel_flops: Callable[[Work], float]) -> Estimate:
    """kernel_flops: of one run of a Pallas kernel."""
    total = Estimate()
    for work in works:
        if work.kind in ("compute", "kernel"):
            flops = work.flops if work.kind == "compute" else kernel_flops(work)
            seconds = work.times * max(flops / pod.peak, work.bytes / pod.chip.hbm_rate)
            total.flops += work.times * flops
            total.bytes += work.times * work.bytes
            total.compute_seconds += seconds
        else:
            seconds = work.times * pod.collective_seconds(work.kind, work.bytes, work.group, work.slices)
            total.collective_bytes[work.kind] += work.times * work.bytes
            total.collective_seconds += seconds
        total.by_source[work.kind, work.source] += seconds
    return total
