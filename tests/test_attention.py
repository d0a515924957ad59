"""The implementations of attention against softmax written out in NumPy, and against each other."""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revseg_jax.errors import InputError
from revseg_jax.parallel.startup import CUDA_PLUGINS
from revseg_jax.policy import attention as dispatch
from revseg_jax.policy import attention_plain
from revseg_jax.policy.attention import AttentionChoice, attention, cached_attention, windowed_attention
from revseg_jax.policy.attention_kernels import (
    cudnn_attention,
    cudnn_suffix_attention,
    splash_attention,
    splash_suffix_attention,
)
from revseg_jax.policy.attention_plain import plain_attention, shared_prefix_attention

interpreted = partial(splash_attention, interpret=jax.default_backend() != "tpu")
# rows, slots, heads, key heads, head width
SHAPES = [(2, 21, 4, 2, 16), (3, 9, 3, 3, 8), (1, 17, 4, 1, 12)]


def draw(shape: tuple[int, ...], dtype=np.float32):
    """query, key, value and segments: two segments in the first row between padding, one in each other."""
    rows, slots, heads, key_heads, width = shape
    rng = np.random.default_rng(slots)
    parts = [rng.normal(size=(rows, slots, count, width)).astype(dtype) for count in (heads, key_heads, key_heads)]
    segments = np.ones((rows, slots), np.int32)
    segments[:, slots * 3 // 4 :] = 0
    segments[0, : slots // 4] = 0
    segments[0, slots // 2 : slots * 3 // 4] = 2
    return *parts, segments


def whole(segments):
    """The segments that None stands for."""
    return np.ones_like(segments)


def written_out(query, key, value, segments, causal):
    """One query at a time, in float64."""
    rows, slots, heads, width = query.shape
    output, logsumexp = np.zeros(query.shape), np.zeros(query.shape[:3])
    for n, s, h in np.ndindex(rows, slots, heads):
        seen = [t for t in range(slots) if segments[n, t] == segments[n, s] and (t <= s or not causal)]
        shared = h // (heads // key.shape[2])
        scores = key[n, seen, shared].astype(float) @ query[n, s, h].astype(float) / np.sqrt(width)
        logsumexp[n, s, h] = np.log(np.exp(scores).sum())
        output[n, s, h] = np.exp(scores - logsumexp[n, s, h]) @ value[n, seen, shared].astype(float)
    return output, logsumexp


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [512, 8])
def test_plain_attention_equals_softmax_written_out(shape, causal, block, monkeypatch):
    monkeypatch.setattr(attention_plain, "BLOCK", block)
    *parts, segments = draw(shape)
    for given, meant in ((segments, segments), (None, whole(segments))):
        results, expectations = attention(*parts, given, causal), written_out(*parts, meant, causal)
        for ours, expected in zip(results, expectations, strict=True):
            assert ours.dtype == jnp.float32
            np.testing.assert_allclose(ours, expected, atol=1e-5)


def differentiable(query, key, value, segments, causal):
    """`written_out` in a few lines that JAX differentiates as they stand."""
    key, value = (jnp.repeat(part, query.shape[2] // part.shape[2], axis=2) for part in (key, value))
    visible = segments[:, None, :, None] == segments[:, None, None, :]
    visible = np.tril(visible) if causal else visible
    scores = jnp.einsum("nshd,nthd->nhst", query, key) / np.sqrt(query.shape[-1])
    scores = jnp.where(visible, scores, -jnp.inf)
    output = jnp.einsum("nhst,nthd->nshd", jax.nn.softmax(scores, -1), value)
    return output, jnp.moveaxis(jax.nn.logsumexp(scores, -1), 1, 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize("block", [512, 5])
def test_plain_attentions_gradients_equal_those_of_softmax_written_out(causal, segmented, block, monkeypatch):
    *parts, segments = draw(SHAPES[0])
    monkeypatch.setattr(attention_plain, "BLOCK", block)

    def loss(run, segments, *parts):
        output, logsumexp = run(*parts, segments, causal)
        return jnp.sum(output**2) + jnp.sum(logsumexp**2)

    sides = (attention, segments if segmented else None), (differentiable, segments if segmented else whole(segments))
    gradients = [jax.jit(jax.grad(partial(loss, *side), (0, 1, 2)))(*parts) for side in sides]
    for ours, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_padding_after_causal_rows_needs_no_segments(implementation, monkeypatch):
    """As the decoder's prefill has it: real queries and the gradients of what they see are those of shorter rows."""
    monkeypatch.setattr(dispatch, "splash_attention", interpreted)
    *parts, _ = draw((2, 21, 4, 2, 16))
    real = 13

    def loss(length, *parts):
        output, _ = attention(*(part[:, :length] for part in parts), None, True, AttentionChoice(implementation))
        return jnp.sum(output[:, :real] ** 3)

    for ours, expected in zip(*(jax.grad(partial(loss, n), (0, 1, 2))(*parts) for n in (21, real)), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_windowed_attention_is_attention_in_windows_or_whole_rows(full, segmented, implementation, monkeypatch):
    """Values and gradients; by a kernel (here the interpreter runs it), the backward pass goes another way."""
    monkeypatch.setattr(dispatch, "splash_attention", interpreted)
    windows, slots = 3, 7
    *parts, segments = draw((2, windows * slots, 4, 4, 16))

    def loss(run, *parts):
        output = run(*parts)
        return jnp.sum(output**3), output

    def windowed(*parts):
        choice = AttentionChoice(implementation)
        return windowed_attention(*parts, segments if segmented else None, jnp.asarray(full), windows, choice)

    def reference(query, *parts):
        sets = 1 if full else windows
        meant = segments if segmented else whole(segments)
        folded = (part.reshape(2 * sets, -1, *part.shape[2:]) for part in (query, *parts, meant))
        return differentiable(*folded, False)[0].reshape(query.shape)

    results = []
    for run in (windowed, reference):
        (_, output), gradients = jax.value_and_grad(partial(loss, run), (0, 1, 2), has_aux=True)(*parts)
        results.append((output, *gradients))
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)


def kernel_cases():
    gpu = pytest.param("cudnn", marks=pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"))
    return ["splash", gpu]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize("name", kernel_cases())
def test_kernels_equal_plain_attention(name, causal, segmented):
    """Output, log-sum-exp and gradients. Splash runs in the interpreter where there is no TPU."""
    dtype, tolerance = (np.float32, 1e-4) if name == "splash" else (jnp.bfloat16, 0.1)
    run = {
        "splash": interpreted,
        "cudnn": lambda *arrays: attention(*arrays, AttentionChoice("cudnn")),
    }[name]
    *parts, segments = draw((2, 150, 4, 2, 16), dtype)  # longer than a block of splash, and not a multiple of one
    weights = np.random.default_rng(0).normal(size=parts[0].shape).astype(np.float32)

    def loss(implementation, *parts):
        output, logsumexp = implementation(*parts, segments if segmented else None, causal)
        return jnp.sum(output * weights), (output, logsumexp)

    results = []
    for implementation in (plain_attention, run):
        (_, values), gradients = jax.value_and_grad(partial(loss, implementation), (0, 1, 2), has_aux=True)(*parts)
        results.append((*values, *gradients))
    for expected, ours in zip(*results, strict=True):
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours.astype(np.float32), expected.astype(np.float32), atol=tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_cudnn_is_given_even_lengths_only(shape, causal, segmented, monkeypatch):
    """JAX takes the gradient of no other ones. XLA stands in for cuDNN, behind the same function."""
    attend = jax.nn.dot_product_attention

    def even_only(query, *rest, implementation, **options):
        assert implementation == "cudnn" and query.shape[1] % 2 == 0
        return attend(query, *rest, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", even_only)
    *parts, segments = draw(shape)
    segments = segments if segmented else None
    results = (run(*parts, segments, causal) for run in (cudnn_attention, plain_attention))
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_the_choice_by_platform(monkeypatch):
    def chosen(platform, dtype=jnp.bfloat16, length=1024, width=80, devices=1):
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        return AttentionChoice().resolve(dtype, length, width)

    assert chosen("cpu") == "xla"
    assert chosen("gpu") == "cudnn" and chosen("gpu", devices=8) == "cudnn"
    assert {chosen("gpu", jnp.float32), chosen("gpu", width=12)} == {"xla"}
    assert chosen("tpu") == "splash" and chosen("tpu", jnp.float32) == "splash"
    assert chosen("tpu", devices=4) == "xla"  # a kernel of one device: on several it needs the mesh
    assert {chosen("gpu", length=64), chosen("tpu", length=64)} == {"xla"}  # windows
    assert AttentionChoice("splash").resolve(jnp.float32, 8, 8) == "splash"
    with pytest.raises(InputError, match="attention=flash is not one of auto, xla, cudnn, splash"):
        AttentionChoice("flash")
    used = []
    monkeypatch.setattr(dispatch, "cudnn_attention", lambda *arrays: used.append(arrays))
    attention(*draw(SHAPES[0]), choice=AttentionChoice("cudnn"))
    assert len(used) == 1


@pytest.mark.parametrize(
    "kernel",
    [
        partial(splash_suffix_attention, interpret=jax.default_backend() != "tpu"),
        partial(cudnn_suffix_attention, run=plain_attention),  # all of it but cuDNN's own causal attention
    ],
    ids=["splash", "cudnn"],
)
def test_suffix_kernels_equal_plain_attention_over_prefix_and_suffixes(kernel):
    """Output and all gradients, with padding in the prefix, at the end of suffixes and between their turns."""
    prompts, groups, slots, prefix, heads, key_heads, width = 2, 2, 70, 150, 4, 2, 16
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    query = normal(prompts, groups, slots, heads, width)
    key, value = (normal(prompts, groups, slots, key_heads, width) for _ in range(2))
    shared = [normal(prompts, prefix, key_heads, width) for _ in range(2)]
    real, prefix_real = np.ones((prompts, groups, slots), bool), np.ones((prompts, prefix), bool)
    real[0, 0, 30:40] = real[1, :, 60:] = False
    prefix_real[1, 100:] = False
    prefix_real = jnp.asarray(prefix_real)
    causal = np.tril(np.ones((slots, slots), bool)) & real[:, :, None, :]
    weights = normal(*query.shape) * real[..., None, None]

    def loss(run, mask, query, key, value, *shared):
        output = run(query, key, value, mask, (*shared, prefix_real))
        return jnp.sum(output * weights), output

    results = [
        jax.value_and_grad(partial(loss, *run), (0, 1, 2, 3, 4), has_aux=True)(query, key, value, *shared)
        for run in ((kernel, jnp.asarray(real)), (shared_prefix_attention, causal))
    ]
    (ours, our_gradients), (expected, gradients) = (((aux), grads) for ((_, aux), grads) in results)
    np.testing.assert_allclose(ours[real], expected[real], atol=1e-4)
    for a, b in zip(our_gradients, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_kernel_appends_several_tokens_as_plain_attention_does(monkeypatch):
    """In slots amid a cache: padding before them and within them, and slots behind them that nobody may see."""
    prompts, groups, slots, prefix, heads, key_heads, width = 2, 2, 12, 9, 4, 2, 16
    slot, length = 4, 5
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    query = normal(prompts, groups, length, heads, width)
    filled = np.arange(slots) < slot + length
    filled = np.broadcast_to(filled, (prompts, groups, slots)).copy()
    filled[0, 1, 2] = filled[1, 0, 5:7] = False
    own = *(normal(prompts, key_heads, groups, slots, width) for _ in range(2)), jnp.asarray(filled)
    prefix_real = jnp.asarray(np.arange(prefix) < np.array([[prefix], [6]]))
    shared = *(normal(prompts, key_heads, prefix, width) for _ in range(2)), prefix_real
    monkeypatch.setattr(dispatch, "cudnn_suffix_attention", partial(cudnn_suffix_attention, run=plain_attention))
    ours, expected = (cached_attention(query, own, shared, slot, AttentionChoice(name)) for name in ("cudnn", "xla"))
    real = filled[:, :, slot : slot + length]
    np.testing.assert_allclose(ours[real], expected[real], atol=1e-5)


COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from revseg_jax.compilation.topologies import describe
from revseg_jax.config import MeshConfig
from revseg_jax.parallel.sharding import make_placement
from revseg_jax.policy.attention import AttentionChoice, attention, suffix_attention

kernel = f'custom_call_target="{sys.argv[2]}'
devices = describe(sys.argv[1], 1)
placement = make_placement(MeshConfig(tensor=2), devices)
parts, rows = (NamedSharding(placement.mesh, P("fsdp", None, *last)) for last in (("tensor",), ()))
def own(heads, spread):  # by key heads too few to divide stay whole
    return NamedSharding(placement.mesh, P("fsdp", *[None] * spread, *(["tensor"] if heads > 1 else [])))

decoder, one_key, tower = (True, 8, 2, 128), (True, 8, 1, 128), (False, 4, 4, 80)
for (causal, heads, key_heads, width), segmented in ((decoder, 0), (one_key, 0), (tower, 0), (tower, 1)):
    def step(query, key, value, segments=None):
        def loss(*parts):
            output, logsumexp = attention(*parts, segments, causal, AttentionChoice(placement=placement))
            return output.astype(jnp.float32).sum(), logsumexp
        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
    shapes = [(len(devices) // 2, 1023, n, width) for n in (heads, key_heads, key_heads)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=own(shape[2], 1)) for shape in shapes]
    arrays += [jax.ShapeDtypeStruct(shapes[0][:2], jnp.int32, sharding=rows)] * segmented
    program = jax.jit(step).lower(*arrays).compile().as_text()
    print(program.count(kernel), "all-gather" in program)

def suffixes(query, key, value, prefix_key, prefix_value):
    def loss(query, key, value, prefix_key, prefix_value):
        real = jnp.ones(query.shape[:3], bool)
        shared = prefix_key, prefix_value, jnp.ones(prefix_key.shape[:2], bool)
        choice = AttentionChoice(placement=placement)
        return suffix_attention(query, key, value, real, shared, choice).astype(jnp.float32).sum()
    return jax.grad(loss, (0, 1, 2, 3, 4))(query, key, value, prefix_key, prefix_value)

for keys in (2, 1):
    shapes = [(len(devices) // 2, 4, 301, n, 128) for n in (8, keys, keys)] + [(len(devices) // 2, 520, keys, 128)] * 2
    spread = [own(shape[-2], len(shape) - 3) for shape in shapes]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=over) for shape, over in zip(shapes, spread)]
    program = jax.jit(suffixes).lower(*arrays).compile().as_text()
    print(program.count(kernel), "all-gather" in program)
"""


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "h200:4", "a100:4"])
def test_kernels_compile_for_chips_that_are_not_there(topology):
    """Forward, log-sum-exp and backward of both kinds of attention, of odd lengths, each device on its own rows and
    heads. cuDNN gives output and log-sum-exp at once."""
    tpu = topology.startswith("v")
    compilers, kernel, count = (("libtpu",), "tpu_custom_call", "3") if tpu else (CUDA_PLUGINS, "__cudnn$fmha", "2")
    if not any(map(importlib.util.find_spec, compilers)):
        pytest.skip(f"compiling for {topology} needs {' or '.join(compilers)}")
    settings = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}
    environment = os.environ | settings
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, topology, kernel], capture_output=True, text=True, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [count, "False"] * 6
