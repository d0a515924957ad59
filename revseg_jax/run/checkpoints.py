"""A run's Orbax checkpoints: written in the background, complete or not at all, read back from the newest sound one.

What keeps a checkpoint from being read may be the machine and not its files. It is moved only when its files are at
fault and an older one has been read.
"""

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
from revseg_jax.parallel.processes import agree, gather, leads
from revseg_jax.paths import AnyPath, absolute, is_remote
from revseg_jax.run.checksums import checksums, differences
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


def holds_checkpoint(folder: AnyPath) -> bool:
    """Whether a whole checkpoint lies in a folder, which need not exist."""
    there = (path for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else ()
    return any(ocp.utils.is_checkpoint_finalized(epath.Path(path)) for path in there)


# What Orbax raises for files that are missing, cut short or garbled; TensorStore's errors are ValueErrors.
DAMAGE = (ValueError, LookupError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
# Those that are not about the files begin with one of these.
OTHER_CAUSES = tuple(
    """
    RESOURCE_EXHAUSTED PERMISSION_DENIED UNAUTHENTICATED UNAVAILABLE DEADLINE_EXCEEDED ABORTED CANCELLED INTERNAL
    UNKNOWN
    """.split()
)


def first_sound(
    folder: AnyPath,
    steps: Sequence[int],
    restore: Callable[[int], Any],
    differences: Callable[[Any], str | None],
    advice: str,
) -> tuple[int, Any, list[int]]:
    """(step, what `restore` returns for it, damaged steps) of the first of `steps` whose checkpoint can be read, by all
    processes. All of them must call it with the same steps.

    differences: says of what `restore` returned how it is not what was saved, in all processes alike; None when it is.

    Damaged ones before it are named on stderr. Raises RunFailure when none can be read, which ends with `advice`, and
    at the first that cannot be read for another cause: memory, a permission, storage that is away.
    """
    damaged: list[int] = []
    reason = None
    for step in steps:
        restored = reason = None
        try:
            with waiting_event_loops():
                restored = restore(step)
        except Exception as error:
            cause = _cause(error)
            reason = _in_words(cause)
            if not isinstance(cause, DAMAGE) or reason.startswith(OTHER_CAUSES):
                raise RunFailure(
                    f"cannot read checkpoint {folder / str(step)}: {reason}; its files may be sound: try again when "
                    "that is mended, or move the checkpoint away to use the one before"
                ) from error
        reason = agree(reason)  # each process reads its own parts of the arrays
        if reason is None:
            reason = differences(restored)
        if reason is None:
            return step, restored, damaged
        if leads():
            print(f"revseg: warning: checkpoint {folder / str(step)} is damaged: {reason}", file=sys.stderr)
        damaged.append(step)
    raise RunFailure(f"no checkpoint in {folder} can be read ({reason}): {advice}")


def _cause(error: BaseException) -> BaseException:
    """Orbax wraps what goes wrong with an array."""
    return error if error.__cause__ is None else _cause(error.__cause__)


def _in_words(error: BaseException) -> str:
    """The first line, without TensorStore's specifications."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    return text.partition(" [tensorstore_spec")[0].rstrip(".")


class Checkpoints:
    """The folder of a run's checkpoints, of which those that `kept` names stay.

    before_save: what has to be safe when the checkpoint is; it may raise RunFailure.
    """

    def __init__(self, folder: AnyPath, kept: NewestAndBest, before_save: Callable[[], None] = lambda: None):
        self.folder = absolute(folder)
        self._aside = epath.Path(self.folder.parent) / "damaged"
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

    def prepare(self, state: Any) -> None:
        """Compiles what `save` needs. All processes must call it."""
        checksums(state)

    def save(self, step: int, state: Any, iterator: dict[str, Any]) -> None:
        """Writes the train state's arrays, their checksums and Grain's iterator state while the run goes on.

        Raises RunFailure when this or the previous checkpoint could not be written; older ones stay as they are.
        """
        self._before_save()
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(iterator),
            checksums=ocp.args.JsonSave(checksums(state)),
        )
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
        """(step, state, iterator state) of the newest checkpoint that can be read, placed like `state`. All processes
        must call it and get the same step.

        A damaged one before it (a disk that filled up, a file cut short) is named on stderr and set aside under
        `damaged/`. Raises RunFailure when none can be read, or one for another cause; all stay where they are then.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore(), checksums=ocp.args.JsonRestore()
        )
        steps = gather(sorted(self._manager.all_steps(), reverse=True))[0]
        with self._reader() as reader:
            step, restored, damaged = first_sound(
                self.folder,
                steps,
                lambda step: reader.restore(step, args=items),
                lambda restored: differences(checksums(restored.state), restored.checksums),
                advice="repair the storage, or delete the run folder to start anew",
            )
        if damaged:
            self._set_aside(damaged)
        return step, restored.state, restored.data

    def _reader(self) -> ocp.CheckpointManager:
        """Reads in this process alone: the others would wait for one that finds a damaged file."""
        process = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
        options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone)
        return ocp.CheckpointManager(self.folder, options=options)

    def _set_aside(self, steps: Sequence[int]) -> None:
        """These steps are going to be saved again: their damaged folders make room but are not deleted. Of one step the
        last is kept. The first process moves them; all must call it."""
        if leads():
            try:
                self._aside.mkdir(exist_ok=True)
                (self._aside / ".folder").write_text("")  # a store has only the folders in which something lies
                for step in map(str, steps):
                    (self._aside / step).rmtree(missing_ok=True)
                    (epath.Path(self.folder) / step).rename(self._aside / step)
            except OSError as error:
                reason = error.strerror or error
                raise RunFailure(
                    f"cannot move damaged checkpoints from {self.folder} to {self._aside}: {reason}"
                ) from None
        gather(None)  # until they have been moved
        self._manager.reload()

    def damaged_steps(self) -> list[int]:
        """The steps that lie under `damaged/`."""
        names = [path.name for path in self._aside.iterdir()] if self._aside.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

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
