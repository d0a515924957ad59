"""The mesh, the table of axes, and two processes over loopback that share rows, agree, and end together."""

import signal
from types import SimpleNamespace

import jax
import pytest
from child_processes import run_two
from jax._src import distributed

from revseg_jax import train
from revseg_jax.config import load_config
from revseg_jax.parallel.processes import first_gpu

CHILD = """
import os, signal, sys
import jax, numpy as np
from child_processes import report
from jax.sharding import PartitionSpec as P
from revseg_jax.config import MeshConfig
from revseg_jax.errors import InputError
from revseg_jax.parallel.processes import agree, failing_together, gather, leads
from revseg_jax.parallel.rows import (
    gather_shares, mean_over_shares, own_rows, place_rows, process_share, same_in_share
)
from revseg_jax.parallel.sharding import make_placement
from revseg_jax.parallel.startup import start_processes

index, what = int(sys.argv[1]), sys.argv[2]
start_processes()
with failing_together():
    if what == "rows":
        for sizes in ((1, 2, 2, 2), (2, 1, 4, 1), (1, 1, 1, 8)):
            placement = make_placement(MeshConfig(*sizes))
            part, parts = process_share(placement)
            own = np.arange(16, dtype=np.float32).reshape(8, 2)[8 // parts * part : 8 // parts * (part + 1)]
            whole = place_rows(placement, {"x": own})["x"]
            assert whole.shape == (8, 2) and place_rows(placement, whole) is whole
            doubled = jax.jit(lambda x: 2 * x, out_shardings=placement.sharding((8, 2), "prompts"))(whole)
            np.testing.assert_array_equal(own_rows(doubled), 2 * own)
            assert float(jax.jit(lambda x: (x * np.arange(8)[:, None]).sum())(whole)) == 588
        split, whole = (make_placement(MeshConfig(*sizes)) for sizes in ((1, 2, 2, 2), (1, 1, 1, 8)))
        metrics = {"reward": float(index), "truncated_count": 2 + index, "tokens_longest": 3 + index}
        report({
            "share": [process_share(placement) for placement in (split, whole)],
            "of_shares": [gather_shares(placement, index) for placement in (split, whole)],
            "same": [same_in_share(placement, index) for placement in (split, whole)],
            "gathered": gather(["a" * (100 + index), index]),
            "agreed": [agree(index == 1), agree(None), agree("first" if index == 0 else "second")],
            "mean": [mean_over_shares(placement, metrics) for placement in (split, whole)],
            "leads": leads(),
        })
    elif what == "errors" or index == 1 and what == "error":
        raise InputError("data.train names no clips")
    elif index == 1 and what == "memory":
        jax.numpy.zeros((10**9, 10**6)).block_until_ready()
    elif index == 1 and what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        gather("a collective that the other never enters")
"""


def test_each_of_several_processes_has_a_sidecar_on_its_own_gpu(monkeypatch):
    assert first_gpu() is None
    devices = []
    monkeypatch.setattr(train, "open_tracker", lambda config, device: devices.append(device))
    for joined, backend in ((None, "gpu"), ("joined", "cpu"), ("joined", "gpu")):
        monkeypatch.setattr(distributed.global_state, "client", joined)
        monkeypatch.setattr(jax, "default_backend", lambda name=backend: name)
        monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(local_hardware_id=3)])
        train.tracker_client(load_config(None, ["run.dir=."]))
    assert devices == ["auto", "auto", "cuda:3"]


def test_two_processes_hold_rows_and_agree():
    found = []
    for one, errors, status in run_two(CHILD, "rows"):
        assert status == 0, errors[-3000:]
        found.append(one)
    for index, one in enumerate(found):
        # Half of the prompts each; all of them where only the tensor axis spans the processes.
        assert one["share"] == [[index, 2], [0, 1]]
        assert one["gathered"] == [["a" * 100, 0], ["a" * 101, 1]]
        assert one["agreed"] == [True, None, "first"]
        assert one["of_shares"] == [[0, 1], [0]] and one["same"] == [index, 0]
        assert one["mean"] == [
            {"reward": 0.5, "truncated_count": 5, "tokens_longest": 4},
            {"reward": 0.0, "truncated_count": 2, "tokens_longest": 3},
        ]
        assert one["leads"] == (index == 0)


@pytest.mark.parametrize("what", ["error", "errors"])  # in process 1, in both at once
def test_an_error_ends_both_processes_with_its_words(what):
    for _, errors, status in run_two(CHILD, what):
        assert status == 2, errors
        said = [line for line in errors.splitlines() if line.startswith("revseg: error:")]
        processes = (0, 1) if what == "errors" else (1,)
        assert said in [[f"revseg: error: process {n} failed: data.train names no clips"] for n in processes]


def test_a_full_device_in_one_process_ends_both_in_one_line():
    for _, errors, status in run_two(CHILD, "memory"):
        assert status == 1 and "Traceback" not in errors
        assert "revseg: error: process 1 failed: a device's memory is full" in errors
        assert "Out of memory allocating 4000000000000000 bytes" in errors


def test_a_killed_process_ends_the_other():
    (_, errors, status), (_, _, killed) = run_two(CHILD, "killed")
    assert killed == -signal.SIGKILL
    assert status not in (0, None) and errors


@pytest.mark.parametrize(
    "settings, devices, said",
    [
        ({"fsdp": 3}, 8, "slice=1 data=1 fsdp=3 tensor=1 does not use the 8 devices"),
        ({"data": -1}, 8, "one may be -1"),
        ({"tensor": 0}, 8, "one may be -1"),
    ],
)
def test_meshes_that_cannot_be_are_refused(settings, devices, said):
    import jax

    from revseg_jax.config import MeshConfig
    from revseg_jax.errors import InputError
    from revseg_jax.parallel.mesh import make_mesh

    with pytest.raises(InputError, match=said):
        make_mesh(MeshConfig(**settings), jax.devices() * devices)
