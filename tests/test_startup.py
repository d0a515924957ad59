"""Joining several processes: what counts as several, and two real ones over loopback."""

from __future__ import annotations

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from child_processes import run_two

from revseg_jax.cli import main
from revseg_jax.errors import InputError
from revseg_jax.parallel.startup import Processes, find_processes

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "8", "SLURM_PROCID": "5",
         "SLURM_LOCALID": "1"}  # fmt: skip


def explicit(coordinator: str = "host:1234", count: str = "4", index: str = "3") -> dict[str, str]:
    return {"REVSEG_COORDINATOR": coordinator, "REVSEG_PROCESS_COUNT": count, "REVSEG_PROCESS_ID": index}


def test_a_machine_by_itself_is_one_process():
    assert find_processes({"PATH": "/bin"}, tpu=False) == Processes("neither TPU pod nor Slurm nor REVSEG_COORDINATOR")
    assert str(find_processes({}, tpu=False)).startswith("one process")


def test_explicit_addresses_win():
    found = find_processes(explicit() | SLURM, tpu=True)
    assert (found.count, found.index, found.coordinator) == (4, 3, "host:1234")
    assert str(found) == "process 3 of 4 (coordinator host:1234)"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"REVSEG_COORDINATOR": "host:1"}, "REVSEG_PROCESS_COUNT and REVSEG_PROCESS_ID is not set"),
        (explicit(coordinator="host"), "host:port"),
        (explicit(index="4"), "below REVSEG_PROCESS_COUNT=4"),
        (explicit(count="two"), "must be a number"),
    ],
)
def test_explicit_addresses_that_cannot_be(environment, words):
    with pytest.raises(InputError, match=words):
        find_processes(environment, tpu=False)


def test_slurm_steps_are_several_but_a_batch_script_is_one():
    found = find_processes(SLURM, tpu=False)
    assert (found.where, found.count, found.index, found.coordinator) == ("Slurm job 7", 8, 5, None)
    batch = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    assert find_processes(batch, tpu=False).count == 1
    assert find_processes(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, tpu=False).count == 1


def test_tpu_pods_on_gke_name_their_hosts():
    pod = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}
    assert find_processes(pod, tpu=False).count == 1  # a sidecar or a tool in the same cluster
    assert (find_processes(pod, tpu=True).count, find_processes(pod, tpu=True).index) == (4, 2)
    slices = find_processes(pod | {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "1"}, tpu=True)
    assert (slices.where, slices.count, slices.index) == ("TPU pod, 3 slices of 4 hosts", 12, 6)
    assert find_processes({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, tpu=True).count == 1


@pytest.fixture
def metadata():
    """A metadata server as on a TPU VM; answers what the test puts into the dict."""
    attributes: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            known = self.headers["Metadata-Flavor"] == "Google" and name in attributes
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(attributes.get(name, "").encode())

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}, attributes
    server.shutdown()
    server.server_close()


def test_tpu_vms_are_described_by_their_metadata_server(metadata):
    environment, attributes = metadata
    assert find_processes(environment, tpu=True) == Processes("one TPU host")
    attributes |= {"worker-network-endpoints": "x:y:10.0.0.1,x:y:10.0.0.2", "agent-worker-number": "1"}
    assert str(find_processes(environment, tpu=True)) == "process 1 of 2 (TPU pod, 2 hosts)"
    attributes["tpu-env"] = "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    assert str(find_processes(environment, tpu=True)) == "process 3 of 4 (TPU pod, 2 slices of 2 hosts)"


PROGRAM = """
import os
from child_processes import report
from revseg_jax.parallel.startup import start_processes
joined = start_processes()
import jax
from jax.experimental import multihost_utils
gathered = multihost_utils.process_allgather(jax.numpy.array(10 + jax.process_index()))
report([str(joined), os.environ["REVSEG_COORDINATOR"], jax.device_count(), gathered.tolist()])
"""


def test_two_processes_join_over_loopback():
    for index, (found, errors, status) in enumerate(run_two(PROGRAM)):
        assert status == 0, errors
        joined, address, devices, gathered = found
        assert joined == f"process {index} of 2 (coordinator {address})"
        assert (devices, gathered) == (8, [10, 11])


def test_compilations_are_kept_in_the_cache_folder_unless_the_environment_names_another(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for named, expected in ((None, str(tmp_path / "revseg_jax" / "compilations")), ("gs://b/c", "gs://b/c")):
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        if named:
            monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", named)
        with pytest.raises(SystemExit):
            main(["report", str(tmp_path / "no run")])
        assert os.environ["JAX_COMPILATION_CACHE_DIR"] == expected
