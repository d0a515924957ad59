"""`revseg compile`: compiles a training step's programs for chips that are not there, and says what they would cost."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass
from typing import Any

import jax

from revseg_jax.compilation.hlo import largest_arrays, parse
from revseg_jax.compilation.programs import StepPrograms, chip_bytes, make_programs
from revseg_jax.compilation.roofline import Estimate, Pod, estimate
from revseg_jax.compilation.topologies import GPUS, describe, make_pod
from revseg_jax.compilation.work import open_loops, program_work
from revseg_jax.config import Config
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.learner.flops import update_flops
from revseg_jax.parallel.device_memory import GPU_SHARE, SHARE_VARIABLE
from revseg_jax.parallel.sharding import make_placement

PAPER_STEP_SECONDS = 725  # of 128 prompts x 8 rollouts at 16 frames, on hardware that the paper does not name
SAMPLING = ("prefill", "decode", "turn2", "decode2")  # the programs that need the sampler's weights and its caches
NAMED = 4  # largest buffers and dearest places that are named
GIB = 2**30


@dataclass(frozen=True)
class Compiled:
    """One program. Attributes:
    cost: of one run on one chip
    temporary: bytes a chip beside arguments and results
    seconds: that compiling took
    open_loops: loops of unknown length, and how often each was taken to run
    """

    cost: Estimate
    temporary: int
    seconds: float
    open_loops: tuple[int, int]


def main(config: Config, topology: str, names: list[str], as_json: bool) -> None:
    """names: of programs; none: all of them. Raises RunFailure, after what was found is printed, when the step does not
    fit into a chip's memory."""
    placement = make_placement(config.mesh, describe(topology, config.mesh.slice))
    programs, pod = make_programs(config, placement), make_pod(topology, config.mesh.slice, placement.mesh)
    names = names or list(programs.names)
    if absent := [name for name in names if name not in programs.names]:
        raise InputError(f"--programs {absent[0]} is not one of all, {', '.join(programs.names)}")
    compiled = {name: compile_program(programs, name, pod) for name in names}
    found = summary(programs, pod, compiled)
    print(table(found))
    if as_json:
        print(json.dumps(found))
    if not found["fits"]:
        largest = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in found["largest_buffers"])
        needed, held = (found["memory"][name] / GIB for name in ("peak", "hbm"))
        raise RunFailure(f"{topology}: a chip needs {needed:.1f} GiB and has {held:.1f}; the largest: {largest}")


def compile_program(programs: StepPrograms, name: str, pod: Pod) -> Compiled:
    """Raises RunFailure that names the largest buffers when the program alone is too large for a chip."""
    begin = time.perf_counter()
    lowered = programs.lower(name)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = too_large(str(error), lowered.as_text("hlo"))
        raise RunFailure(f"{pod.name}: the program {name} does not fit: {said}") from None
    seconds = time.perf_counter() - begin
    program, limit = parse(compiled.as_text()), programs.loop_limit(name)
    cost = estimate(program_work(program, limit), pod, programs.kernel_flops)
    return Compiled(cost, compiled.memory_analysis().temp_size_in_bytes, seconds, (open_loops(program), limit))


def too_large(text: str, program: str) -> str:
    """One line of XLA's account of a program that exceeds the memory: how much, and the largest buffers. Where it names
    none, those of `program`, the HLO that XLA was given, whose arrays are not spread over the chips yet."""
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", text)
    parts = re.split(r"\n\s+\d+\. Size: ", text)[1 : NAMED + 1]
    named = []
    for part in parts:
        source, shape = (re.search(pattern, part) for pattern in (r'op_name="([^"]*)"', r"Shape: ([^{\s]+)"))
        what = source[1].rpartition("/")[2] if source else "argument"
        named.append(f"{part.split()[0]} {shape[1] if shape else ''} {what}".replace("  ", " "))
    if named:
        return (f"{used[1]} of {used[2]} HBM; " if used else "") + f"the largest buffers: {', '.join(named)}"
    arrays = [f"{size / GIB:.2f} GiB {array}" for array, size in largest_arrays(program, NAMED)]
    return f"{text.splitlines()[0]} The largest arrays, over all chips: {', '.join(arrays)}"


def summary(programs: StepPrograms, pod: Pod, compiled: dict[str, Compiled]) -> dict[str, Any]:
    """Everything that was found, ready for JSON. Bytes and FLOPs are of one chip, seconds of one run of a program."""
    memory = programs.memory()
    resident = {name: size for name, size in memory.items() if name not in ("sampler", "kv_cache")}
    sampling = memory["sampler"] + memory["kv_cache"]
    fetched = chip_bytes(programs.reference) if programs.config.learner.reference == "host" else 0
    beside = dict.fromkeys(SAMPLING, sampling) | {"score": fetched}
    peaks = {name: sum(resident.values()) + one.temporary + beside.get(name, 0) for name, one in compiled.items()}
    largest = max(peaks, key=peaks.get)
    kinds = {**memory, "activations": compiled[largest].temporary, "peak": peaks[largest], "hbm": pod.chip.hbm}
    buffers = [(f"temporary arrays of {largest}", compiled[largest].temporary), *programs.largest_arguments(NAMED)]
    mesh = dict(programs.placement.mesh.shape)
    found = {
        "policy": programs.config.policy.path,
        "topology": pod.name,
        "chips": pod.chips,
        "mesh": mesh,
        "memory": kinds,
        "largest_program": largest,
        "largest_buffers": sorted(buffers, key=lambda pair: -pair[1])[:NAMED],
        "fits": peaks[largest] <= pod.chip.hbm,
        "programs": {name: figures(one) | {"peak_bytes": peaks[name]} for name, one in compiled.items()},
    }
    if "update" in compiled:
        needed = update_flops(programs.model, programs.config.learner, programs.full_batch()) / pod.chips / pod.peak
        cost = compiled["update"].cost
        found["mfu"] = needed / cost.seconds
        found["mfu_without_overlap"] = needed / cost.seconds_without_overlap
    if all(name in compiled for name in programs.names):
        found["step_seconds"] = step_seconds(programs, compiled)
        found["paper_step_seconds"] = PAPER_STEP_SECONDS
    return found


def figures(one: Compiled) -> dict[str, Any]:
    cost = one.cost
    return {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "collective_bytes": dict(cost.collective_bytes),
        "compute_seconds": cost.compute_seconds,
        "collective_seconds": cost.collective_seconds,
        "seconds": cost.seconds,
        "temporary_bytes": one.temporary,
        "compile_seconds": round(one.seconds, 1),
        "open_loops": one.open_loops,
        "dearest": [[kind, source, seconds] for (kind, source), seconds in cost.by_source.most_common(2 * NAMED)],
    }


def step_seconds(programs: StepPrograms, compiled: dict[str, Compiled]) -> float:
    """Of a whole step: sampling part by part with all answers at their limits, one pass of the reference, the update.
    What the host and the sidecars do meanwhile is not in it."""
    seconds = {name: one.cost.seconds for name, one in compiled.items()}
    part = sum(seconds.get(name, 0.0) for name in SAMPLING)
    parts = programs.config.rollout.prompts_per_step // programs.prompts_per_batch
    score = seconds["score"] if programs.config.learner.kl != "off" else 0.0
    return part * parts + score + seconds["update"]


def table(found: dict[str, Any]) -> str:
    mesh = " ".join(f"{name}={size}" for name, size in found["mesh"].items())
    lines = [f"{found['policy']} on {found['topology']}: {found['chips']} chips, mesh {mesh}", ""]
    lines.append(f"memory a chip, GiB (most in {found['largest_program']})")
    lines += [f"  {name:<14}{size / GIB:>9.2f}" for name, size in found["memory"].items()]
    share = found["memory"]["peak"] / found["memory"]["hbm"]
    if found["topology"].partition(":")[0] in GPUS and GPU_SHARE < share <= 1:
        least = math.ceil(100 * share) / 100
        lines.append(f"  JAX takes {GPU_SHARE:.0%} of a GPU by default: set {SHARE_VARIABLE} to {least:.2f} or more")
    names = ("TFLOP", "GB", "compute s", "collect. s", "GiB at most", "compiled in s")
    header = f"{'a chip, one run':<16}" + "".join(f"{name:>15}" for name in names)
    lines += ["", header]
    for name, one in found["programs"].items():
        numbers = (one["flops"] / 1e12, one["bytes"] / 1e9, one["compute_seconds"], one["collective_seconds"])
        numbers += (one["peak_bytes"] / GIB, one["compile_seconds"])
        lines.append(f"  {name:<14}" + "".join(f"{number:>15.3f}" for number in numbers))
    lines += ["", "collectives, GB a chip"]
    for name, one in found["programs"].items():
        said = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in sorted(one["collective_bytes"].items()))
        lines.append(f"  {name:<14}{said or 'none'}")
    for name, one in found["programs"].items():
        loops, times = one["open_loops"]
        if loops:
            lines.append(f"  {name}: {loops} loops of unknown length were counted {times} times each")
    for name, one in found["programs"].items():
        lines += ["", f"dearest places of {name}, seconds"]
        lines += [f"  {seconds:>9.4f}  {kind}  {source[-90:]}" for kind, source, seconds in one["dearest"]]
    lines.append("")
    if "mfu" in found:
        lines.append(
            f"update: predicted MFU {found['mfu']:.1%}, {found['mfu_without_overlap']:.1%} if no collective overlaps"
        )
    if "step_seconds" in found:
        lines.append(f"a step: {found['step_seconds']:.1f} s predicted; the paper's took {PAPER_STEP_SECONDS} s")
    return "\n".join(lines)
