"""A SAM2 with lively random weights.

The architecture is the embedded one. The random weights are enlarged until masks, memories and the verdict on absence
all matter: a trained model would forgive small mistakes.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tracker_setup import FRAMES, moving_shapes, some_prompts, stored

from revseg_jax.tracker.clips import Limits
from revseg_jax.tracker.engine import Engine
from revseg_jax.tracker.model import EMBEDDED, build_tracker
from revseg_jax.tracker.process import run_sidecar
from revseg_jax.tracker.security import ServerTLS
from revseg_jax.tracker.service import Description, TrackerService
from revseg_jax.tracker.sidecar import serve


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Path:
    """The embedded architecture with all the options of the published ones."""
    tree = OmegaConf.load(EMBEDDED / "tracker.yaml")
    tree.model.multimask_output_in_sam = tree.model.multimask_output_for_tracking = True
    path = tmp_path_factory.mktemp("config") / "tracker.yaml"
    OmegaConf.save(tree, path)
    return path


@pytest.fixture(scope="session")
def model(config):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = build_tracker(config, None)
    weights = model.state_dict()
    for name, value in weights.items():
        if value.dim() >= 2 and "pos_embed" not in name:
            value *= 1.3
    model.load_state_dict(weights)
    # Shift the object score so that it is below zero for a quarter of what is tracked.
    head = model.sam_mask_decoder.pred_obj_score_head
    for quantile in (0.0, 0.25):
        scores = []
        hook = head.register_forward_hook(lambda *a, scores=scores: scores.append(a[2].flatten()))
        engine = Engine(model)
        for _ in engine.track(stored(moving_shapes(FRAMES)), some_prompts(6, FRAMES)):
            pass
        hook.remove()
        with torch.no_grad():
            head.layers[-1].bias -= torch.quantile(torch.cat(scores), quantile) - 1e-3
    return model


@pytest.fixture(scope="session")
def checkpoint(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return path


@pytest.fixture(scope="session")
def endpoint(checkpoint, config):
    with run_sidecar(checkpoint=str(checkpoint), config=str(config), threads=1) as endpoint:
        yield endpoint


@pytest.fixture
def serving(model):
    """Starts servers in this process: (limits, tls, token) -> (service, port)."""
    servers = []

    def start(limits: Limits | None = None, tls: ServerTLS | None = None, token: str | None = None):
        service = TrackerService(Engine(model), Description("random", "small", "f" * 64, {}), limits or Limits())
        server, _, port = serve(service, tls=tls, token=token)
        servers.append(server)
        return service, port

    yield start
    for server in servers:
        server.stop(grace=None).wait()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory) -> Path:
    """ca.pem signed server.pem (localhost, 127.0.0.1) and client.pem; other.pem is an authority of its own."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make certificates")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for name in ("ca", "other"):
        made = ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN=test {name}", "-days", "2"]
        openssl("req", "-x509", *new_key, *made)
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        sign = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names"]
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *sign)
    return folder
