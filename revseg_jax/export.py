"""`revseg export`: a run's policy as a folder that transformers, vLLM and `--policy` read."""

from __future__ import annotations

from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from revseg_jax.config import load_config
from revseg_jax.errors import InputError
from revseg_jax.paths import AnyPath, absolute, path_of
from revseg_jax.policy.checkpoint import check_new, load_policy, save_policy
from revseg_jax.rollout.loading import split_policy
from revseg_jax.run.checkpoints import best_steps, first_sound
from revseg_jax.run.checksums import checksums, differences
from revseg_jax.run.folder import evaluation_scores


def main(run: str, out: str, best: bool = False) -> None:
    """Writes the newest checkpoint of the run folder `run`, or the one that was evaluated best, to the new folder `out`
    and prints its path. A damaged checkpoint is named on stderr, and the next one taken; the run stays as it is."""
    folder = path_of(run)
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder} is not a run folder: it has no config.yaml")
    check_new(path_of(out))  # before everything is read
    config = load_config(folder / "config.yaml")
    # read_only: nothing is created or cleared away in the run, which may still be training.
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(absolute(folder / "checkpoints"), options=options) as checkpoints:
        steps = wanted_steps(folder, checkpoints.all_steps(), best)
        loaded = load_policy(config.policy.path, config.policy.dtype, config.policy.param_dtype)
        graphdef, trained, frozen = split_policy(loaded.policy, config.learner.freeze_vision)
        advice = "without --best others are tried" if best else "train again into a new run.dir"
        step, (trained, _), _ = first_sound(
            folder / "checkpoints",
            steps,
            lambda step: restore_trained(checkpoints, step, trained),
            lambda restored: differences(checksums({"trained": restored[0]}), restored[1]),
            advice,
        )
    save_policy(nnx.merge(graphdef, trained, frozen), out, loaded.folder, config.chain)
    print(f"step {step} of {folder} written to {out}")


def wanted_steps(folder: AnyPath, there: list[int], best: bool) -> list[int]:
    """The checkpoints to try, in turn. Raises InputError when there are none."""
    steps = sorted(there, reverse=True)
    if best:
        steps = best_steps(steps, evaluation_scores(folder))
    if not steps:
        raise InputError(f"{folder} has no checkpoint{' that was evaluated' if best else ' yet'}")
    return steps


def restore_trained(checkpoints: ocp.CheckpointManager, step: int, like: Any) -> tuple[Any, dict[str, int]]:
    """The trained parameters, and all checksums: the optimiser's state stays on disk."""
    abstract = {"trained": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)}
    # Without these Orbax takes the placement from the file, which may name devices of another machine, and warns.
    placed = ocp.checkpoint_utils.construct_restore_args(abstract)
    restore = ocp.args.PyTreeRestore(abstract, restore_args=placed, partial_restore=True)
    found = checkpoints.restore(step, args=ocp.args.Composite(state=restore, checksums=ocp.args.JsonRestore()))
    return found.state["trained"], found.checksums
