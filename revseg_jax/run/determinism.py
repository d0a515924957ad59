"""Kernels whose results do not depend on which thread was first."""

from __future__ import annotations

import os

# Reductions and scatters in a fixed order, and no autotuning, whose choice depends on timings. CPUs and TPUs need none.
GPU_FLAG = "--xla_gpu_deterministic_ops=true"


def use_deterministic_kernels() -> None:
    """To be called before anything asks JAX for devices."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    if GPU_FLAG not in flags:
        os.environ["XLA_FLAGS"] = " ".join([*flags, GPU_FLAG])
