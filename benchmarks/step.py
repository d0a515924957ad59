"""A whole training step by phase, at any size, on the devices at hand: seconds, memory, and shares of their limits.

    python benchmarks/step.py --config configs/revseg_3b.yaml [key=value ...] [--repeats 3] [--out step.json]

The programs are those of training; parameters are random, in the shapes of `policy.path`: a policy folder or the name
of a published model (no weights and no tokenizer are needed). Every slot is real, no answer ends before its limit, and
each rollout of a group chose another keyframe: the dearest step there is. Data and rewards take no part.

Decoding is compared with the memory's speed (a step reads the decoder's weights, the shared prefixes and what the
suffixes hold by then), the update with the speed of products of the policy's type; both limits are measured here. The
whole step is extrapolated to the paper's 128 prompts, beside its 725 s (on hardware that it does not name).

On one GPU of 140 GB: `rollout.prompts_per_step=8 rollout.prompts_per_batch=8 learner.prompts_per_microbatch=1`; the 7B
needs at least two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from policy import matmul_peak

from revseg_jax.compilation.programs import StepPrograms, chip_bytes, make_programs
from revseg_jax.compile import PAPER_STEP_SECONDS
from revseg_jax.config import load_config
from revseg_jax.errors import InputError
from revseg_jax.learner.flops import peak_flops, update_flops
from revseg_jax.learner.reference import fetch_reference, store_reference
from revseg_jax.learner.update import Learner, TrainState
from revseg_jax.parallel.rows import place_rows
from revseg_jax.parallel.sharding import make_placement
from revseg_jax.rollout.batch import RolloutBatch
from revseg_jax.rollout.engine import RolloutEngine, answer_turn1, answer_turn2, read_prefix, read_turn2
from revseg_jax.rollout.sampling import rollout_keys

PAPER_PROMPTS = 128
ROLLOUT = ("prefill", "turn 1", "keyframes", "turn 2")


class Phases:
    """Compiles each phase once, and keeps what it took: seconds of every run, and bytes a chip beside its arguments."""

    def __init__(self):
        self.programs: dict[str, jax.stages.Compiled] = {}
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def run(self, name: str, function: Callable, statics: int, *arguments: Any) -> Any:
        """function: a jitted one whose first `statics` arguments are static."""
        if name not in self.programs:
            self.programs[name] = function.lower(*arguments).compile()
        begin = time.perf_counter()
        result = jax.block_until_ready(self.programs[name](*arguments[statics:]))
        self.seconds[name].append(time.perf_counter() - begin)
        return result

    def temporary_bytes(self) -> dict[str, int]:
        return {name: program.memory_analysis().temp_size_in_bytes for name, program in self.programs.items()}


def random_weights(shapes: Any, seed: int) -> Any:
    """Arrays for a tree of shapes, made where they belong."""
    leaves, tree = jax.tree.flatten(shapes)

    def make(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(leaves))
        made = [0.02 * jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(tree, made)

    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes))(jax.random.key(seed))


def sample(programs: StepPrograms, phases: Phases, weights: Any) -> None:
    """The rollouts of a step, batch by batch, as `RolloutEngine.sample` runs them."""
    layout, rollout = programs.layout, programs.config.rollout
    graphdef, count, place = programs.parts[0], programs.prompts_per_batch, partial(place_rows, programs.placement)
    never_ending = replace(programs.sampling, end_token=-1)
    batch = RolloutBatch(*(place(part[:count]) for part in programs.full_batch()))
    video = batch.frames, batch.prefix_tokens, batch.prefix_positions, batch.prefix_mask
    slots = slice(layout.turn2_prompt_start, layout.turn2_start - 1)
    question = [part[..., slots] for part in (batch.tokens, batch.positions, batch.mask)]
    images = batch.keyframes, batch.keyframe_index
    one, alive = (place(np.ones((count, rollout.group_size), kind)) for kind in (np.int32, bool))
    keys = place(np.asarray(jax.random.key_data(rollout_keys(0, 0, np.arange(count), rollout.group_size))))

    for _ in range(rollout.prompts_per_step // count):
        prefix = phases.run("prefill", read_prefix, 1, graphdef, weights, *video)
        static = (graphdef, layout.turn1, layout.suffix, never_ending)
        _, suffix = phases.run("turn 1", answer_turn1, 4, *static, weights, prefix, one, one, alive, keys)
        static = (graphdef, layout.turn2_prompt_start)
        suffix = phases.run("keyframes", read_turn2, 2, *static, weights, prefix, suffix, *question, *images)
        static = (graphdef, layout.turn2_start - 1, layout.turn2, never_ending)
        phases.run("turn 2", answer_turn2, 4, *static, weights, prefix, suffix, one, one, alive, keys)


def step(programs: StepPrograms, phases: Phases, state: TrainState, reference: Any, frozen: Any) -> TrainState:
    """As in `revseg_jax/train.py`, and nothing else."""
    config, learner = programs.config.learner, programs.learner
    engine = RolloutEngine(programs.parts[0], None, None, programs.placement)  # which writes no prompts
    begin = time.perf_counter()
    weights = jax.block_until_ready(engine.weights((state.trained, frozen)))
    phases.seconds["weights for sampling"].append(time.perf_counter() - begin)
    sample(programs, phases, weights)
    del weights
    place = partial(place_rows, programs.placement)
    shapes = programs.experience(programs.config.rollout.prompts_per_step)
    experience = jax.tree.map(lambda shape: place(np.zeros(shape.shape, shape.dtype)), shapes._replace(batch=None))
    batch = RolloutBatch(*map(place, programs.full_batch()))
    if reference is not None:
        fetched = fetch_reference(config.reference, reference)
        phases.run("score", Learner.logprobs, 1, learner, fetched, frozen, batch)
        del fetched
    if config.algorithm == "ppo":
        phases.run("values", Learner.values, 1, learner, state, frozen, batch)
    experience = experience._replace(batch=batch)
    state, metrics = phases.run("update", Learner.update, 1, learner, state, frozen, experience)
    assert not int(metrics["skipped_updates"]), "a loss or gradient was not finite"
    return state


def memory_rate() -> float:
    """Bytes a second that one device reads and writes when it copies much."""
    size = 2**30 if jax.default_backend() != "cpu" else 2**27
    array, add = jnp.zeros(size // 4, jnp.float32), jax.jit(lambda x: x + 1, donate_argnums=0)
    array, times = add(array).block_until_ready(), []
    for _ in range(10):
        begin = time.perf_counter()
        array = add(array).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * size / min(times)


def decoding_bytes(programs: StepPrograms) -> float:
    """That a chip must read for a token of turn 1: the decoder's weights, all prefixes, suffixes filled half of it."""
    tied = programs.model.text.tie_word_embeddings
    named = jax.tree_util.tree_leaves_with_path(programs.sampler)
    read = [
        leaf
        for path, leaf in named
        if "vision" not in (name := jax.tree_util.keystr(path)) and (tied or "embedding" not in name)
    ]
    prefix, suffix = programs.caches(programs.prompts_per_batch)
    filled = (1 + programs.layout.turn1 / 2) / programs.layout.suffix
    return chip_bytes(read) + chip_bytes(prefix) + filled * chip_bytes(suffix)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    try:
        config = load_config(options.config, options.overrides)
        programs = make_programs(config, make_placement(config.mesh))
    except InputError as error:
        parser.error(str(error))
    dtype, devices = config.policy.dtype, jax.devices()
    limits = {"memory_bytes_per_second": memory_rate(), "matmul_flops_per_second": matmul_peak(dtype)[1]}

    trained, frozen = (random_weights(part, seed) for seed, part in enumerate(programs.parts[1:]))
    reference = None if config.learner.kl == "off" else store_reference(config.learner.reference, trained)
    state, phases = programs.learner.init(trained, donate=reference is not trained), Phases()
    del trained
    for repeat in range(options.repeats + 1):
        state = step(programs, phases, state, reference, frozen)
        if repeat == 0:  # a warm-up
            phases.seconds.clear()
    batches = config.rollout.prompts_per_step // programs.prompts_per_batch
    runs = {name: batches if name in ROLLOUT else 1 for name in phases.seconds}
    seconds = {name: runs[name] * statistics.median(times) for name, times in phases.seconds.items()}
    whole = sum(seconds.values())

    needed = update_flops(programs.model, config.learner, programs.full_batch()) / len(devices)
    token = statistics.median(phases.seconds["turn 1"]) / (programs.layout.turn1 + 1)
    peak = peak_flops(devices[0].device_kind)
    prompts = config.rollout.prompts_per_step
    result = {
        "command": " ".join(sys.argv),
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "policy": config.policy.path,
        "prompts": prompts,
        "rollouts_per_prompt": config.rollout.group_size,
        "slots": vars(programs.layout),
        "seconds": seconds,
        "all_seconds": phases.seconds,
        "temporary_bytes": phases.temporary_bytes(),
        "resident_bytes": programs.memory(),
        "peak_bytes": (devices[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "limits": limits,
        "decoding": {
            "tokens_per_second": programs.prompts_per_batch * config.rollout.group_size / token,
            "bytes_per_token": decoding_bytes(programs),
            "share_of_memory_rate": decoding_bytes(programs) / token / limits["memory_bytes_per_second"],
        },
        "update": {
            "flops": needed,
            "share_of_matmul_rate": needed / seconds["update"] / limits["matmul_flops_per_second"],
            "mfu": needed / seconds["update"] / peak if peak else None,
        },
        "step_seconds": whole,
        "step_seconds_of_128_prompts": whole * PAPER_PROMPTS / prompts,
        "paper_step_seconds": PAPER_STEP_SECONDS,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
