"""From prepared folders to batches of fixed shapes, by Grain. Only the sampled frames are ever decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grain

from revseg_jax.config import ChainConfig
from revseg_jax.data.example import Batch, Example, make_example, stack
from revseg_jax.data.source import ClipSource
from revseg_jax.data.workers import ExampleWorkers
from revseg_jax.errors import InputError


def _order(source: ClipSource, seed: int) -> grain.MapDataset:
    """Pairs of the source, endlessly. repeat() shuffles anew in each epoch; an epoch's last prompts share their step
    with the next one's first. In a mixture each folder has epochs of its own, and the folders take turns by weight."""
    if not source.weights:
        return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    parts = source.parts()
    if not all(parts):
        raise InputError("a folder of a mixture holds no pair: leave it out of data.train and data.weights")
    ranges = [grain.MapDataset.range(part.start, part.stop) for part in parts]
    orders = [order.seed(seed + number).shuffle().repeat() for number, order in enumerate(ranges)]
    return grain.MapDataset.mix(orders, list(source.weights))


class _Examples:
    """This process's Examples, in the order in which training takes them."""

    def __init__(self, make: Callable[[int, int], Example], order: grain.MapDataset, prompts: int, part: range):
        self._make, self._order, self._prompts, self._part = make, order, prompts, part

    def __len__(self) -> int:
        return len(self._order) // self._prompts * len(self._part)

    def __getitem__(self, position: int) -> Example:
        step, slot = divmod(position, len(self._part))
        index = step * self._prompts + self._part[slot]
        return self._make(int(self._order[index]), index)

    def __repr__(self) -> str:
        return f"Examples({self._part} of {self._prompts} prompts a step)"


class TrainingSteps(Iterator[Batch]):
    """An endless iterator of Batches, one a training step. Its state is the number of steps taken and nothing else, so
    that it means the same for any number of processes, workers and threads."""

    def __init__(self, examples: grain.MapDataset, share: int, options: grain.ReadOptions):
        self._examples, self._share, self._options = examples, share, options
        self.set_state({"steps": 0})

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._steps += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"steps": self._steps}

    def set_state(self, state: dict[str, int]) -> None:
        """The next Batch is that of step `state["steps"]`, counted from 0; nothing before it is read."""
        self._steps = int(state["steps"])
        ahead = self._examples[self._steps * self._share :]
        self._batches = iter(ahead.to_iter_dataset(self._options).batch(self._share, batch_fn=stack))


def training_steps(
    source: ClipSource,
    chain: ChainConfig,
    prompts_per_step: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> TrainingSteps:
    """The Batches of a run, globally shuffled anew in every epoch.

    Each of `process_count` processes gets a contiguous part of every step: joined in the order of the processes, the
    parts are the batch that a single process would get.

    Frames of up to two coming steps are decoded ahead by `workers` processes (0: by one thread of this one); their
    number changes nothing in the batches. Raises InputError when the processes cannot share a step evenly.
    """
    if prompts_per_step % process_count:
        raise InputError(
            f"rollout.prompts_per_step={prompts_per_step} must be a multiple of the {process_count} processes"
        )
    share = prompts_per_step // process_count
    part = range(process_index * share, (process_index + 1) * share)
    make = ExampleWorkers(source, chain, workers) if workers else lambda pair, i: make_example(source[pair], i, chain)
    examples = _Examples(make, _order(source, seed), prompts_per_step, part)
    # Grain's own worker processes each take every n-th example and keep a state each: their number would be part of
    # the checkpoint. Here its threads, two for each process so that none waits for its next task, wait for ours.
    threads = max(2 * workers, 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * share, threads))
    return TrainingSteps(grain.MapDataset.source(examples), share, options)
