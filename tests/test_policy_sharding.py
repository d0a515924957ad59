"""Loading straight onto a mesh: the same numbers, every device its part, no byte read twice."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from torch_policy import conversation, processor_output, random_model, save_policy_folder

from revseg_jax.policy import hf_weights, load_policy
from revseg_jax.policy.safetensors_files import SINGLE

LOAD = """
import json, pathlib, sys
import jax, numpy as np
from flax import nnx
from revseg_jax.config import MeshConfig
from revseg_jax.errors import InputError
from revseg_jax.parallel.sharding import make_placement, tree_shardings
from revseg_jax.policy import hf_weights, load_policy

folder, sizes, out, process, coordinator = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
if coordinator:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, 2, int(process))
read, original = [], hf_weights.read_weight
def recorded(weight, tensors, dtype, index=None):
    part = original(weight, tensors, dtype, index)
    read.append((".".join(weight.path), part.size))
    return part
hf_weights.read_weight = recorded
placement = make_placement(MeshConfig(1, *sizes))
policy = load_policy(folder, mesh=placement.mesh)
state = nnx.state(policy.policy, nnx.Param)
wanted = tree_shardings(state, placement)
assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, state, wanted))
leaves = {".".join(path): value[...] for path, value in nnx.to_flat_state(state)}
whole = sum(leaf.size for leaf in leaves.values())
pathlib.Path(f"{out}/told{process}.json").write_text(json.dumps({
    "read": sum(size for _, size in read) / whole,
    "split": sum(not leaf.sharding.is_fully_replicated for leaf in leaves.values()),
    "largest": max(leaf.addressable_shards[0].data.size for leaf in leaves.values()),
}))
"""

ALONE = """
inputs = dict(np.load(out + "/inputs.npz"))
np.savez(out + "/result.npz", logits=policy.logits(**inputs), **leaves)
policy.save(out + "/saved")
"""

# What a process holds, NaN elsewhere.
TOGETHER = """
held = {name: np.full(leaf.shape, np.nan, leaf.dtype) for name, leaf in leaves.items()}
for name, leaf in leaves.items():
    for shard in leaf.addressable_shards:
        held[name][shard.index] = shard.data
    assert sum(size for path, size in read if path == name) == np.isfinite(held[name]).sum(), name
np.savez(f"{out}/held{process}.npz", **held)
policy.save(out + "/saved")
try:
    policy.save(out + "/saved")
except InputError as error:
    assert "exists already" in str(error)
else:
    raise AssertionError("saved twice")
"""


def start(code: str, folder: Path, sizes, out: Path, devices: int, process: int = 0, coordinator: str = ""):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", LOAD + code, str(folder), json.dumps(sizes), str(out), str(process), coordinator]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[1], **pipes)


def told_by(process: subprocess.Popen, out: Path, number: int = 0) -> dict:
    errors = process.communicate()[1]
    assert process.returncode == 0, errors[-2000:]
    return json.loads((out / f"told{number}.json").read_text())


def leaves_of(policy) -> dict[str, np.ndarray]:
    return {".".join(path): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(policy.policy, nnx.Param))}


@pytest.mark.parametrize("sizes", [(2, 2, 2)])
def test_loading_onto_eight_devices(sizes, tmp_path):
    folder = save_policy_folder(random_model(44, tie_word_embeddings=False), tmp_path / "policy")
    alone = load_policy(folder)
    leaves = leaves_of(alone)
    rng = np.random.default_rng(0)
    talks = [conversation(rng, alone.policy.config, 3, (0, 4, 8), n, (2, 2, 6), 2) for n in (4, 9, 2)]
    inputs = processor_output(talks, "left")
    np.savez(tmp_path / "inputs.npz", **inputs)
    told = told_by(start(ALONE, folder, sizes, tmp_path, devices=8), tmp_path)
    assert told["read"] == 1  # two devices hold each part, and it is read once
    assert told["split"] > 15 and told["largest"] < max(leaf.size for leaf in leaves.values())
    result = np.load(tmp_path / "result.npz")
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(result[name], leaf)
    real = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(result["logits"][real], alone.logits(**inputs)[real], atol=1e-4)
    assert (tmp_path / "saved" / SINGLE).read_bytes() == saved_alone(alone, tmp_path).read_bytes()


def test_two_processes_read_only_what_their_devices_hold(tmp_path):
    """Over loopback, 2 x 4 devices: together they hold the checkpoint, and each has read its own part of it alone."""
    folder = save_policy_folder(random_model(44, tie_word_embeddings=False), tmp_path / "policy")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [start(TOGETHER, folder, (1, 4, 2), tmp_path, 4, number, coordinator) for number in range(2)]
    told = [told_by(process, tmp_path, number) for number, process in enumerate(processes)]
    assert all(0.5 < part["read"] < 0.6 for part in told)  # half of what is spread, all of the small rest
    held = [np.load(tmp_path / f"held{number}.npz") for number in range(2)]
    for name, leaf in leaves_of(load_policy(folder)).items():
        first, second = held[0][name], held[1][name]
        np.testing.assert_array_equal(np.where(np.isfinite(first), first, second), leaf)
        if not np.isfinite(first).all():
            assert (np.isfinite(first) != np.isfinite(second)).all()
    assert (tmp_path / "saved" / SINGLE).read_bytes() == saved_alone(load_policy(folder), tmp_path).read_bytes()


def saved_alone(policy, folder: Path) -> Path:
    policy.save(folder / "alone")
    return folder / "alone" / SINGLE


def test_large_tensors_are_read_in_pieces(monkeypatch, tmp_path):
    folder = save_policy_folder(random_model(45), tmp_path / "policy")
    whole = jax.tree.leaves(nnx.state(load_policy(folder).policy, nnx.Param))
    monkeypatch.setattr(hf_weights, "COPY_BYTES", 100)
    pieces = jax.tree.leaves(nnx.state(load_policy(folder).policy, nnx.Param))
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(a, b)
