"""The few layers both towers share. Parameters are used in the activations' dtype, norms in float32 or wider."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
        return _affine(equation, x, self.kernel[...], self.bias[...] if hasattr(self, "bias") else None)

    def parts(self, equation: str, x: jax.Array) -> list[jax.Array]:
        """One y for each index of the kernel's second axis, the bias's first, as products of their own: to take one
        product apart, and to put its gradient together, would be copies of it."""
        kernels, biases = jnp.unstack(self.kernel[...], axis=1), jnp.unstack(self.bias[...])
        return [_affine(equation, x, kernel, bias) for kernel, bias in zip(kernels, biases, strict=True)]


def _affine(equation: str, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    y = product(equation, x, kernel.astype(x.dtype))
    return y if bias is None else y + bias.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """einsum(equation, x, kernel) of x [*tokens, *inputs] and kernel [*inputs, *outputs] -> [*tokens, *outputs].

    As JAX would differentiate it, but for the order of factors in the kernel's gradient. A product whose factors are
    summed over their first axes has to turn one of them, the first: that had better be the narrow one. The barrier is
    for the compiler, which would put the transposition of the result into the product and turn the wide one after all.
    """
    return jnp.einsum(equation, x, kernel)


def _product_forward(equation: str, x: jax.Array, kernel: jax.Array):
    return jnp.einsum(equation, x, kernel), (x, kernel)  # in sight of remat policies, unlike a call of `product`


def _product_backward(equation: str, kept: tuple[jax.Array, jax.Array], into_y: jax.Array):
    x, kernel = kept
    of_x, of_kernel, of_y = equation.replace(",", "->").split("->")
    into_x = jnp.einsum(f"{of_y},{of_kernel}->{of_x}", into_y, kernel)
    tokens = tuple(range(x.ndim + into_y.ndim - kernel.ndim >> 1))
    over_tokens = partial(jax.lax.dot_general, dimension_numbers=((tokens, tokens), ((), ())))
    if x.size <= into_y.size:
        return into_x, over_tokens(x, into_y)
    outputs = range(into_y.ndim - len(tokens))
    into_kernel = jax.lax.optimization_barrier(over_tokens(into_y, x))
    return into_x, jnp.moveaxis(into_kernel, outputs, [axis - len(outputs) for axis in outputs])


product.defvjp(_product_forward, _product_backward)


class RMSNorm(nnx.Module):
    def __init__(self, size: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., size]"""
        # Rows have one axis here: XLA on a CPU sums the gradient ten times slower when one of several has length 1.
        rows = x.reshape(-1, x.shape[-1])
        wide = rows.astype(jnp.promote_types(x.dtype, jnp.float32))
        normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (normal.astype(x.dtype) * self.scale[...].astype(x.dtype)).reshape(x.shape)


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
