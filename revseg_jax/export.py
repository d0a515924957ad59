"""`revseg export`: a run's policy as a folder that transformers, vLLM and `--policy` read."""

from __future__ import annotations

import jax
import orbax.checkpoint as ocp
from flax import nnx

from revseg_jax.config import load_config
from revseg_jax.errors import InputError
from revseg_jax.paths import absolute, path_of
from revseg_jax.policy.checkpoint import load_policy, save_policy
from revseg_jax.rollout.loading import split_policy
from revseg_jax.run.checkpoints import best_steps
from revseg_jax.run.folder import evaluation_scores


def main(run: str, out: str, best: bool = False) -> None:
    """Writes the newest checkpoint of the run folder `run`, or the one that was evaluated best, to the new folder `out`
    and prints its path."""
    folder = path_of(run)
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder} is not a run folder: it has no config.yaml")
    config = load_config(folder / "config.yaml")
    loaded = load_policy(config.policy.path, config.policy.dtype, config.policy.param_dtype)
    graphdef, trained, frozen = split_policy(loaded.policy, config.learner.freeze_vision)
    with ocp.CheckpointManager(absolute(folder / "checkpoints")) as checkpoints:
        steps = sorted(checkpoints.all_steps(), reverse=True)
        if best:
            steps = best_steps(steps, evaluation_scores(folder))
        if not steps:
            raise InputError(f"{folder} has no checkpoint{' that was evaluated' if best else ' yet'}")
        step = steps[0]
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trained)
        # Only the policy is wanted: the optimiser's state stays on disk.
        restore = ocp.args.PyTreeRestore({"trained": abstract}, partial_restore=True)
        restored = checkpoints.restore(step, args=ocp.args.Composite(state=restore))
    save_policy(nnx.merge(graphdef, restored.state["trained"], frozen), out, loaded.folder, config.chain)
    print(f"step {step} of {folder} written to {out}")
