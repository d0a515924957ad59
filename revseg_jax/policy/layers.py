"""The few layers both towers share. Parameters are used in the activations' dtype, norms in float32 or wider."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


class Linear(nnx.Module):
    """y = einsum(equation, x, kernel) + bias, with the kernel shaped by its axes, e.g. [hidden, heads, head_dim]."""

    def __init__(
        self, shape: tuple[int, ...], bias_shape: tuple[int, ...] | None = None, *, rngs: nnx.Rngs, scale: float = 0.02
    ):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) * scale)
        if bias_shape is not None:
            self.bias = nnx.Param(jnp.zeros(bias_shape))

    def __call__(self, equation: str, x: jax.Array) -> jax.Array:
        y = jnp.einsum(equation, x, self.kernel[...].astype(x.dtype))
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y


class RMSNorm(nnx.Module):
    def __init__(self, size: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return normal.astype(x.dtype) * self.scale[...].astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x)); the vision tower's has biases, the decoder's has none."""

    def __init__(self, hidden: int, intermediate: int, use_bias: bool, *, rngs: nnx.Rngs):
        wide, narrow = ((intermediate,), (hidden,)) if use_bias else (None, None)
        self.gate = Linear((hidden, intermediate), wide, rngs=rngs)
        self.up = Linear((hidden, intermediate), wide, rngs=rngs)
        self.down = Linear((intermediate, hidden), narrow, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = jax.nn.silu(self.gate("...d,df->...f", x)) * self.up("...d,df->...f", x)
        return self.down("...f,fd->...d", inner)


def stack_layers(create: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """One module whose every parameter has a leading axis `count`: the form that `jax.lax.scan` runs over."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stacked(layer_rngs: nnx.Rngs) -> nnx.Module:
        return create(layer_rngs)

    return stacked(rngs)
