"""Which axis of each parameter is spread over which mesh axis: one table, read top to bottom."""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# (pattern on the parameter's path, mesh axis of each array axis). Stacked layers have a leading layer axis.
PARAMETER_AXES = (
    (r"text.*embedding", ("tensor", "fsdp")),
    (r"text.*lm_head.*kernel", ("fsdp", "tensor")),
    (r"layers.*(query|key|value).*kernel", (None, "fsdp", "tensor", None)),
    (r"layers.*(query|key|value).*bias", (None, "tensor", None)),
    (r"layers.*out.*kernel", (None, "tensor", None, "fsdp")),
    (r"(layers|blocks).*(gate|up).*kernel", (None, "fsdp", "tensor")),
    (r"(layers|blocks).*(gate|up).*bias", (None, "tensor")),
    (r"(layers|blocks).*down.*kernel", (None, "tensor", "fsdp")),
    (r"blocks.*qkv.*kernel", (None, "fsdp", None, "tensor", None)),
    (r"blocks.*qkv.*bias", (None, None, "tensor", None)),
    (r"blocks.*proj.*kernel", (None, "tensor", None, "fsdp")),
    (r"merger.*fc1.*kernel", ("fsdp", "tensor")),
    (r"merger.*fc2.*kernel", ("tensor", "fsdp")),
    (r"patch_embed.*kernel", (None, "fsdp")),
    (r"", ()),  # norms and the remaining biases are small: every device holds them
)


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The spec of one parameter; an axis that its mesh axis does not divide stays whole."""
    axes = next(axes for pattern, axes in PARAMETER_AXES if re.search(pattern, path))
    if len(axes) > len(shape):  # a scalar of the optimiser under the same path
        return PartitionSpec()
    return PartitionSpec(*(axis if axis and shape[i] % mesh.shape[axis] == 0 else None for i, axis in enumerate(axes)))


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for parameters, or for an optimiser state, whose moments carry their parameter's path."""

    def sharding(path, leaf) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(jax.tree_util.keystr(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)
