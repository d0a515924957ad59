"""What to say when a device's memory is full, and how much of it JAX takes."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

GPU_SHARE = 0.75  # of a GPU's memory, what JAX takes unless the variable says otherwise
SHARE_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def explain_full_memory(error: BaseException) -> str | None:
    """One line on an error of JAX that is about a device's memory: how much was asked for, where, and what helps. None
    for any other error."""
    words = str(error).partition("\n")[0]
    if not words.startswith("RESOURCE_EXHAUSTED"):
        return None
    package = Path(__file__).parents[1]
    places = [
        f"{Path(frame.filename).relative_to(package.parent)}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(package)
    ]
    said = "a device's memory is full" + (f" (at {places[-1]})" if places else "")
    said += f": {words.removeprefix('RESOURCE_EXHAUSTED: ').rstrip('.')}; "
    said += "lower rollout.prompts_per_batch for sampling, learner.prompts_per_microbatch or learner.logprob_chunk "
    said += "for updates; revseg compile says what each takes"
    if _on_gpu() and SHARE_VARIABLE not in os.environ:
        said += f"; JAX takes {GPU_SHARE:.0%} of a GPU unless {SHARE_VARIABLE} says otherwise"
    return said


def _on_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"
