"""Rematerialisation by name: the same gradient from less and less memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from revseg_jax.config import load_config
from revseg_jax.errors import InputError
from revseg_jax.policy.checkpoint import load_policy
from revseg_jax.policy.remat import POLICIES
from revseg_jax.rollout.keyframes import encode_keyframes

pytestmark = pytest.mark.usefixtures("optimised")
NAMES = ["none", *reversed(POLICIES)]  # from the most memory to the least


@pytest.fixture(scope="module")
def policy():
    return load_policy("embedded").policy


def gradient(run, module: nnx.Module):
    """The compiled gradient of a loss on what `run(module)` returns, by the module's parameters; and these."""
    graphdef, parameters = nnx.split(module)

    def loss(parameters):
        return jnp.sum(run(nnx.merge(graphdef, parameters)) ** 2) / 1e3

    return jax.jit(jax.grad(loss)).lower(parameters).compile(), parameters


def memory(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


def test_the_decoders_gradient_stays_and_its_memory_shrinks(policy):
    x = np.random.default_rng(0).normal(size=(2, 128, policy.config.text.hidden_size)).astype(np.float32)
    positions = np.broadcast_to(np.arange(128, dtype=np.int32), (3, 2, 128))
    programs, gradients = [], []
    for name in NAMES:
        run = partial(lambda text, remat: text.prefill(x, positions, remat)[0], remat=name)
        program, parameters = gradient(run, policy.text)
        programs.append(program)
        gradients.append(jax.tree.leaves(program(parameters)))
    sizes = [memory(program) for program in programs]
    assert all(after < before for before, after in zip(sizes, sizes[1:], strict=False)), sizes
    products = [program.as_text().count(" dot(") for program in programs]
    assert products[0] == products[1] < products[2] < products[3], products  # "dots" computes no product again
    for others in gradients[1:]:
        for ours, expected in zip(others, gradients[0], strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max() + 1e-9)


def test_the_vision_tower_takes_the_same_names(policy):
    patches = np.random.default_rng(0).normal(size=(8, 64, policy.config.vision.patch_dim)).astype(np.float32)
    sizes = [memory(gradient(lambda v, n=name: v(patches, 8, 8, n), policy.vision)[0]) for name in ("none", "full")]
    assert sizes[1] < sizes[0], sizes


def test_rounds_of_keyframes_keep_inputs_of_blocks_and_no_parameters(policy, monkeypatch):
    """Each round is a condition's branch, of which JAX would keep the parameters that it reads."""
    side, vision = 168, policy.config.vision
    images = np.random.default_rng(0).integers(0, 256, (2, 6, side, side, 3), np.uint8)
    index = np.array([[0, 2, 1, 0, 2, 1], [0, 0, 1, 1, 0, 1]], np.int32)  # the last three rounds are not run

    def run(rounds, module):
        return encode_keyframes(module, images[:, :rounds], index[:, :rounds])

    programs = {}
    for remat in ("none", "full"):
        monkeypatch.setattr(policy, "remat", remat)
        for rounds in (3, 6):
            programs[remat, rounds], parameters = gradient(partial(run, rounds), policy)
    kept = (memory(programs["full", 6]) - memory(programs["full", 3])) / 3
    inputs = (vision.depth + 1) * 2 * (side // vision.patch_size) ** 2 * vision.hidden_size * 4
    outputs = inputs / (vision.depth + 1)  # and the images, as floats and bytes
    blocks = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(policy.vision.blocks)))
    assert inputs <= kept < inputs + 2 * outputs < inputs + blocks, (kept, inputs, outputs, blocks)
    for ours, expected in zip(
        *(jax.tree.leaves(programs[name, 6](parameters)) for name in ("full", "none")), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max() + 1e-9)


def test_the_config_knows_the_same_names():
    for name in NAMES:
        assert load_config(None, ["run.dir=x", f"policy.remat={name}"]).policy.remat == name
    with pytest.raises(InputError, match=f"policy.remat=True is not one of .*{', '.join(reversed(POLICIES))}"):
        load_config(None, ["run.dir=x", "policy.remat=true"])
