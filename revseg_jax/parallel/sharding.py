"""Where every array lives: the logical axes of each parameter, and the config's table from these to mesh axes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from revseg_jax.config import AxesConfig, MeshConfig
from revseg_jax.errors import InputError
from revseg_jax.parallel.mesh import make_mesh

# (pattern on the parameter's path, logical axis of each array axis). Stacked layers have a leading layer axis.
PARAMETER_AXES = (
    (r"text.*embedding", ("vocab", "width")),
    (r"text.*lm_head.*kernel", ("width", "vocab")),
    (r"layers.*query.*kernel", (None, "width", "heads", None)),
    (r"layers.*query.*bias", (None, "heads", None)),
    (r"layers.*(key|value).*kernel", (None, "width", "key_heads", None)),
    (r"layers.*(key|value).*bias", (None, "key_heads", None)),
    (r"layers.*out.*kernel", (None, "heads", None, "width")),
    (r"(layers|blocks).*(gate|up).*kernel", (None, "width", "hidden")),
    (r"(layers|blocks).*(gate|up).*bias", (None, "hidden")),
    (r"(layers|blocks).*down.*kernel", (None, "hidden", "width")),
    (r"blocks.*qkv.*kernel", (None, "width", None, "heads", None)),
    (r"blocks.*qkv.*bias", (None, None, "heads", None)),
    (r"blocks.*proj.*kernel", (None, "heads", None, "width")),
    (r"merger.*fc1.*kernel", ("width", "hidden")),
    (r"merger.*fc1.*bias", ("hidden",)),
    (r"merger.*fc2.*kernel", ("hidden", "width")),
    (r"patch_embed.*kernel", (None, "width")),
    (r"", ()),  # norms and the remaining biases are small: every device holds them
)


@dataclass(frozen=True)
class Placement:
    """A mesh and the table of logical axes; hashable, so that jitted functions may close over it.

    Attributes:
      mesh: of `revseg_jax.parallel.mesh.make_mesh`
      table: (logical axis, mesh axes) as in `AxesConfig`
    """

    mesh: Mesh
    table: tuple[tuple[str, tuple[str, ...]], ...]

    def over(self, logical: str) -> tuple[str, ...]:
        """The mesh axes that a logical axis is spread over."""
        return dict(self.table)[logical]

    def parts(self, logical: str) -> int:
        return math.prod(self.mesh.shape[name] for name in self.over(logical))

    def spec(self, shape: tuple[int, ...], *logical: str | None) -> PartitionSpec:
        """The spec of an array whose leading axes have these logical names; one that does not divide stays whole."""
        return PartitionSpec(
            *(
                self.over(name) or None if name and size % self.parts(name) == 0 else None
                for size, name in zip(shape, logical, strict=False)
            )
        )

    def sharding(self, shape: tuple[int, ...], *logical: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(shape, *logical))

    @property
    def whole(self) -> NamedSharding:
        """Every device has all of it."""
        return NamedSharding(self.mesh, PartitionSpec())

    def with_width(self, logical: str) -> Placement:
        """The same with the row `logical` in place of the row "width"."""
        return replace(self, table=tuple(dict(self.table, width=self.over(logical)).items()))


def place(mesh: Mesh, axes: AxesConfig) -> Placement:
    """Raises InputError for a table that names no mesh axis, or one twice for the same array."""
    table = {name: tuple(over) for name, over in vars(axes).items()}
    for name, over in table.items():
        unknown = [axis for axis in over if axis not in mesh.axis_names]
        if unknown:
            raise InputError(f"mesh.axes.{name} names {unknown[0]!r}, which is not one of {', '.join(mesh.axis_names)}")
    for width in ("width", "optimizer_width", "rollout_width"):
        for other in ("heads", "key_heads", "hidden", "vocab"):
            both = set(table[width]) & set(table[other])
            if both:
                raise InputError(f"mesh.axes: {width} and {other} cannot both be spread over {both.pop()!r}")
    return Placement(mesh, tuple(table.items()))


def make_placement(config: MeshConfig, devices: list[jax.Device] | None = None) -> Placement:
    return place(make_mesh(config, devices), config.axes)


def parameter_spec(path: str, shape: tuple[int, ...], placement: Placement) -> PartitionSpec:
    """The spec of one parameter, or of a moment of it."""
    axes = next(axes for pattern, axes in PARAMETER_AXES if re.search(pattern, path))
    if len(axes) > len(shape):  # a scalar of the optimiser under the same path
        return PartitionSpec()
    return placement.spec(shape, *axes)


def tree_shardings(tree: Any, placement: Placement) -> Any:
    """NamedShardings for parameters, or for an optimiser state, whose moments carry their parameter's path."""

    def sharding(path, leaf) -> NamedSharding:
        return NamedSharding(placement.mesh, parameter_spec(jax.tree_util.keystr(path), leaf.shape, placement))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def constrain(placement: Placement | None, array: jax.Array, *logical: str | None) -> jax.Array:
    """Inside jit: the compiler keeps the array spread as the table says. Without a placement nothing is said."""
    if placement is None:
        return array
    return jax.lax.with_sharding_constraint(array, placement.sharding(array.shape, *logical))


def constrain_tree(placement: Placement | None, tree: Any) -> Any:
    """As `constrain`, for parameters or gradients."""
    return tree if placement is None else jax.lax.with_sharding_constraint(tree, tree_shardings(tree, placement))
