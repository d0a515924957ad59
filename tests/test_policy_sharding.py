"""Loading straight onto a mesh: the same numbers, every device its part, no byte read twice."""

import json
import os
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

CHILD = """
import json, sys
import jax, numpy as np
from flax import nnx
from revseg_jax.config import MeshConfig
from revseg_jax.parallel.sharding import make_placement, tree_shardings
from revseg_jax.policy import hf_weights, load_policy

folder, sizes, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
read, original = [], hf_weights.read_weight
def recorded(weight, tensors, dtype, index=None):
    part = original(weight, tensors, dtype, index)
    read.append((weight.path, part.size))
    return part
hf_weights.read_weight = recorded
placement = make_placement(MeshConfig(1, *sizes))
policy = load_policy(folder, mesh=placement.mesh)
state = nnx.state(policy.policy, nnx.Param)
wanted = tree_shardings(state, placement)
assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, state, wanted))
leaves = {".".join(path): value[...] for path, value in nnx.to_flat_state(state)}
whole = sum(leaf.size for leaf in leaves.values())
print(json.dumps({
    "read": sum(size for _, size in read) / whole,
    "split": sum(not leaf.sharding.is_fully_replicated for leaf in leaves.values()),
    "largest": max(leaf.addressable_shards[0].data.size for leaf in leaves.values()),
}))
inputs = dict(np.load(out + "/inputs.npz"))
np.savez(out + "/result.npz", logits=policy.logits(**inputs), **leaves)
policy.save(out + "/saved")
"""


@pytest.mark.parametrize("sizes", [(2, 2, 2)])
def test_loading_onto_eight_devices(sizes, tmp_path):
    folder = save_policy_folder(random_model(44, tie_word_embeddings=False), tmp_path / "policy")
    alone = load_policy(folder)
    leaves = {".".join(path): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(alone.policy, nnx.Param))}
    rng = np.random.default_rng(0)
    talks = [conversation(rng, alone.policy.config, 3, (0, 4, 8), n, (2, 2, 6), 2) for n in (4, 9, 2)]
    inputs = processor_output(talks, "left")
    np.savez(tmp_path / "inputs.npz", **inputs)
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CHILD, str(folder), json.dumps(sizes), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["read"] == 1  # two devices hold each part, and it is read once
    assert said["split"] > 15 and said["largest"] < max(leaf.size for leaf in leaves.values())
    result = np.load(tmp_path / "result.npz")
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(result[name], leaf)
    real = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(result["logits"][real], alone.logits(**inputs)[real], atol=1e-4)
    assert (tmp_path / "saved" / SINGLE).read_bytes() == saved_alone(alone, tmp_path).read_bytes()


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
