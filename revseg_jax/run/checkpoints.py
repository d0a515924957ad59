"""A run's Orbax checkpoints: written in the background, complete or not at all, read back from the newest sound one."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from revseg_jax.errors import RunFailure
from revseg_jax.paths import AnyPath, absolute, is_remote
from revseg_jax.run.event_loops import waiting_event_loops


@dataclass(frozen=True)
class NewestAndBest:
    """Which checkpoints stay: the newest ones and those with the best scores.

    Attributes:
      newest, best: how many of each
      scores: of evaluated steps; more may be added while the run goes on
    """

    newest: int
    best: int
    scores: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One answer for each of Orbax's checkpoint infos, oldest first."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(steps[max(len(steps) - self.newest, 0) :]) | set(best_steps(steps, self.scores)[: self.best])
        return [step in kept for step in steps]


def best_steps(steps: Sequence[int], scores: Mapping[int, float]) -> list[int]:
    """Those of `steps` that have a score, the best first; of equal ones the later first."""
    return sorted((step for step in steps if step in scores), key=lambda step: (scores[step], step), reverse=True)


def first_sound(
    folder: AnyPath,
    steps: Sequence[int],
    restore: Callable[[int], Any],
    advice: str,
    set_aside: Callable[[int], None] = lambda step: None,
) -> tuple[int, Any]:
    """(step, what `restore` returns for it) of the first of `steps` whose checkpoint can be read.

    Damaged ones before it are named on stderr and given to `set_aside`. Raises RunFailure, which ends with `advice`,
    when none can be read.
    """
    reason = None
    for step in steps:
        try:
            with waiting_event_loops():
                return step, restore(step)
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            reason = (str(error) or type(error).__name__).splitlines()[0].partition(". See full TensorStore")[0]
            print(f"revseg: warning: checkpoint {folder / str(step)} is damaged: {reason}", file=sys.stderr)
            set_aside(step)
    raise RunFailure(f"no checkpoint in {folder} can be read ({reason}): {advice}")


class Checkpoints:
    """The folder of a run's checkpoints, of which those that `kept` names stay.

    before_save: what has to be safe when the checkpoint is; it may raise RunFailure.
    """

    def __init__(self, folder: AnyPath, kept: NewestAndBest, before_save: Callable[[], None] = lambda: None):
        self.folder = absolute(folder)
        self._before_save = before_save
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=kept,
            create=True,
            cleanup_tmp_directories=True,  # what a killed run was writing
            # Made in the background, a folder that the disk refuses would be waited for until a timeout of minutes.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=self._options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, iterator: dict[str, Any]) -> None:
        """Writes the train state's arrays and Grain's iterator state while the run goes on.

        Raises RunFailure when this or the previous checkpoint could not be written; older ones stay as they are.
        """
        self._before_save()
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(iterator))
        try:
            self._manager.wait_until_finished()
            self._check_room(state)
            self._manager.save(step, args=items)
        except (OSError, ValueError) as error:
            raise self._not_written(error) from None

    def _check_room(self, state: Any) -> None:
        """Raises OSError when the disk has less room than the newest checkpoint takes, or than this state's arrays do.
        A store has room.

        Orbax would find out too, but midway, and its threads would write tracebacks of it.
        """
        if is_remote(self.folder):
            return
        newest = self.latest_step()
        if newest is None:
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        else:
            files = (path for path in (self.folder / str(newest)).rglob("*") if path.is_file())
            needed = sum(path.stat().st_size for path in files)
        if shutil.disk_usage(self.folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def restore(self, state: Any) -> tuple[int, Any, dict[str, Any]]:
        """(step, state, iterator state) of the newest checkpoint that can be read, placed like `state`.

        A damaged one (a disk that filled up, a file cut short) is named on stderr and set aside under `damaged/`.
        Raises RunFailure when none is left.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        steps = sorted(self._manager.all_steps(), reverse=True)
        step, restored = first_sound(
            self.folder,
            steps,
            lambda step: self._manager.restore(step, args=items),  # setting one aside replaces the manager
            advice="delete the run folder to start anew",
            set_aside=self._set_aside,
        )
        return step, restored.state, restored.data

    def _set_aside(self, step: int) -> None:
        """The step is going to be saved again: its damaged folder makes room but is not deleted."""
        self._manager.close()
        aside = epath.Path(self.folder.parent) / "damaged"
        aside.mkdir(exist_ok=True)
        (aside / ".folder").write_text("")  # a store has only the folders in which something lies
        (aside / str(step)).rmtree(missing_ok=True)
        (epath.Path(self.folder) / str(step)).rename(aside / str(step))
        self._manager = ocp.CheckpointManager(self.folder, options=self._options)

    def close(self) -> None:
        """Waits for what is still being written. Raises RunFailure when it could not be."""
        try:
            self._manager.wait_until_finished()
            self._manager.close()
        except (OSError, ValueError) as error:
            raise self._not_written(error) from None

    def _not_written(self, error: Exception) -> RunFailure:
        text = str(error) or type(error).__name__
        full = "RESOURCE_EXHAUSTED" in text  # TensorStore's name for a full disk, amid much else
        reason = os.strerror(errno.ENOSPC) if full else getattr(error, "strerror", None) or text.splitlines()[0]
        return RunFailure(f"cannot write a checkpoint into {self.folder}: {reason}; the previous one is intact")
