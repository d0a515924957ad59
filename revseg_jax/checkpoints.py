"""A run's Orbax checkpoints: written in the background, complete or not at all, read back from the newest sound one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from revseg_jax.errors import RunFailure
from revseg_jax.paths import AnyPath, absolute


class Checkpoints:
    """The folder of a run's checkpoints, of which the newest `keep` stay.

    before_save: what has to be safe when the checkpoint is; it may raise RunFailure.
    """

    def __init__(self, folder: AnyPath, keep: int, before_save: Callable[[], None] = lambda: None):
        self.folder = absolute(folder)
        self._before_save = before_save
        self._options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
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
            self._manager.save(step, args=items)
        except (OSError, ValueError) as error:
            raise self._not_written(error) from error

    def restore(self, state: Any) -> tuple[int, Any, dict[str, Any]]:
        """(step, state, iterator state) of the newest checkpoint that can be read, placed like `state`.

        A damaged one (a disk that filled up, a file cut short) is named on stderr and set aside under `damaged/`.
        Raises RunFailure when none is left.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        problem = None
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._manager.restore(step, args=items)
                return step, restored.state, restored.data
            except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
                problem = str(error).splitlines()[0]
                print(f"revseg: warning: checkpoint {self.folder / str(step)} is damaged: {problem}", file=sys.stderr)
                self._set_aside(step)
        raise RunFailure(f"no checkpoint in {self.folder} can be read ({problem}): delete the run folder to start anew")

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
        """Waits for what is still being written."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._not_written(error) from error
        finally:
            self._manager.close()

    def _not_written(self, error: Exception) -> RunFailure:
        first = (str(error) or type(error).__name__).splitlines()[0]
        return RunFailure(f"cannot write a checkpoint into {self.folder}: {first}; the previous one is intact")
