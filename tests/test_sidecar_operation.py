"""What a sidecar tells its operators."""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from tracker_setup import BOX, HEIGHT, WIDTH, jpegs, metrics, moving_shapes, start_sidecar, until

from revseg_jax import cli
from revseg_jax.config import RewardsConfig
from revseg_jax.errors import InputError
from revseg_jax.rewards.scoring import request_rewards
from revseg_jax.tracker import SidecarAway, TrackerClient, monitoring, wire
from revseg_jax.tracker.clips import Limits
from revseg_jax.tracker.process import run_sidecar
from revseg_jax.tracker.security import ServerTLS

pytest_plugins = ["tracker_fixtures"]


# --- rewards


def test_rewards_on_some_frames(serving):
    service, port = serving()
    clip, truth = moving_shapes(6), np.zeros((6, HEIGHT, WIDTH), bool)
    truth[:, 10:60, 20:80] = True
    rollout = SimpleNamespace(ok=True, box=BOX, turn1=SimpleNamespace(frame_idx=2))
    batch = SimpleNamespace(jpegs=[jpegs(clip)], masks=[truth])
    with TrackerClient([f"127.0.0.1:{port}"]) as client:
        for mask_frames, frames in ((0, range(6)), (3, (0, 2, 5)), (1, (0,)), (9, range(6))):
            config = RewardsConfig(preset="custom", mask=1.0, mask_frames=mask_frames)
            pending = request_rewards(client, config, batch, 0, [rollout])
            expected = client.score(batch.jpegs[0], [(2, BOX)], truth, list(frames), contour=False)
            np.testing.assert_array_equal(pending.scores.result(60).j_per_frame, expected.j_per_frame)
            assert expected.j_per_frame.shape == (1, len(frames))


# --- what it says about itself


def test_info(serving, model):
    limits = Limits(max_frames=7, max_pixels=40_000, max_clips=3, clip_bytes=10**6)
    service, port = serving(limits)
    with TrackerClient([f"127.0.0.1:{port}"]) as client:
        client.track(moving_shapes(2), [(0, BOX)])
        info = client.info()
        assert (info.checkpoint, info.device, info.image_size) == ("random", "cpu", model.image_size)
        assert (info.max_frames, info.max_pixels, info.max_clips, info.max_clip_bytes) == (7, 40_000, 3, 10**6)
        assert info.max_prompts == limits.max_prompts and info.max_masks == limits.max_masks
        assert info.max_calls == limits.max_calls and info.max_message_bytes == wire.MESSAGE_BYTES
        assert info.clips_held == 1 and info.model == service.description.model


def test_a_clip_of_too_many_bytes_is_refused(serving):
    clip = moving_shapes(3)
    _, port = serving(Limits(clip_bytes=2 * clip[0].nbytes))
    with TrackerClient([f"127.0.0.1:{port}"]) as client:
        assert len(list(client.track_stream(lambda: clip[:2], [(0, BOX)]))) == 2
        with pytest.raises(InputError, match=f"clip: more than {2 * clip[0].nbytes} bytes"):
            next(client.track_stream(lambda: clip, [(0, BOX)]))


def test_answers_of_two_models_are_never_mixed(endpoint, checkpoint, capsys):
    clip = moving_shapes(2)
    with run_sidecar(threads=1) as other, TrackerClient([endpoint, other]) as client:
        assert client.info().checkpoint == str(checkpoint)  # the sidecars are asked in turn
        words = f"sidecar at {other} runs another model than the first that answered: model .* of embedded runs here"
        for call in (
            lambda: client.track(clip, [(0, BOX)]),
            lambda: client.score(clip, [(0, BOX)], np.ones((2, HEIGHT, WIDTH), bool)),
        ):
            with pytest.raises(SidecarAway, match=words):
                call()
        assert len(list(client.track_stream(lambda: clip, [(0, BOX)]))) == 2
        with pytest.raises(SidecarAway, match=words):
            list(client.track_stream(lambda: clip, [(0, BOX)]))
        with pytest.raises(SystemExit):
            cli.main(["doctor", f"tracker.endpoints=[{endpoint},{other},{endpoint}]"])
    blamed = [line for line in capsys.readouterr().out.splitlines() if "runs another model than the first" in line]
    assert len(blamed) == 1 and f"sidecar: {other} serves" in blamed[0]


# --- logs and metrics


def test_logs_and_metrics(checkpoint, config, tmp_path):
    with open(tmp_path / "log", "w") as log:
        process, port = start_sidecar(checkpoint, config, 0, "--metrics-port=0", log=log)
        try:
            lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
            assert lines[0]["event"] == "serving" and lines[0]["port"] == port
            metrics_port = lines[0]["metrics_port"]
            with TrackerClient([f"127.0.0.1:{port}"]) as client:
                clip, truth = moving_shapes(4), np.ones((4, HEIGHT, WIDTH), bool)
                client.score(clip, [(0, BOX)], truth)
                client.score(clip, [(1, BOX), (2, BOX)], truth)
                with pytest.raises(InputError):
                    client.track(clip, [(9, BOX)])
            seen = metrics(metrics_port)
            prefix = "revseg_sidecar_"
            assert seen[f'{prefix}call_seconds_count{{code="OK",method="Score"}}'] == 2
            assert seen[f'{prefix}call_seconds_count{{code="INVALID_ARGUMENT",method="Track"}}'] == 1
            assert seen[f"{prefix}feature_misses_total"] == 4 and seen[f"{prefix}feature_hits_total"] >= 8
            assert seen[f"{prefix}clips_held"] == 1 and seen[f"{prefix}feature_bytes"] > 1e5
            assert seen[f"{prefix}calls"] == seen[f"{prefix}calls_waiting"] == 0
        finally:
            process.terminate()
            assert process.wait(300) == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    calls = [line for line in lines if line["event"] == "call"]
    assert [(call["method"], call["code"], call.get("prompts")) for call in calls if call["method"] != "PutClip"] == [
        ("Score", "OK", 1),
        ("Score", "OK", 2),
        ("Track", "INVALID_ARGUMENT", 1),
    ]
    assert all(call["seconds"] >= 0 and len(call["clip"]) == 64 and "127.0.0.1" in call["peer"] for call in calls)
    assert calls[-1]["message"] == "keyframe: 9 in a clip of 4 frames"
    assert [line["event"] for line in lines[-2:]] == ["draining", "stopped"] and lines[-1]["finished"] is True


@pytest.fixture
def silent_connections():
    opened = []

    def connect(port: int) -> None:
        opened.append(socket.create_connection(("127.0.0.1", port)))

    yield connect
    for one in opened:
        one.close()


def test_a_connection_that_says_nothing_keeps_no_metrics_back(certificates, silent_connections, monkeypatch):
    """Its handshake would never end."""
    monkeypatch.setattr(monitoring, "REQUEST_SECONDS", 0.2)
    tls = ServerTLS(certificates / "server.pem", certificates / "server.key")
    port, _ = monitoring.serve_metrics("127.0.0.1", 0, tls, {"calls": ("under way", lambda: 3)})
    context = ssl.create_default_context(cafile=certificates / "ca.pem")
    before = threading.enumerate()  # other tests' servers may still wait for theirs
    silent_connections(port)
    with urllib.request.urlopen(f"https://127.0.0.1:{port}/metrics", context=context, timeout=60) as answer:
        assert b"revseg_sidecar_calls 3.0" in answer.read()
    until(lambda: not set(threading.enumerate()) - set(before))  # it has been given up


# --- files to run it with


def test_service_files_say_what_the_command_understands():
    folder = Path(__file__).parents[1] / "tpu_scripts/sidecar"
    unit = (folder / "revseg-sidecar.service").read_text().replace("\\\n", " ")
    commands = [re.search(r"^ExecStart=\S+/revseg (.*)$", unit, re.MULTILINE)[1].split()]
    documents = list(yaml.safe_load_all((folder / "kubernetes.yaml").read_text()))
    service, stateful = documents[0]["spec"], documents[1]["spec"]
    container = stateful["template"]["spec"]["containers"][0]
    commands.append(["sidecar", *container["args"]])
    for probe in ("readinessProbe", "startupProbe", "livenessProbe"):
        command = container[probe]["exec"]["command"]
        assert command[0] == "revseg"
        commands.append(command[1:])
    docker = (folder.parent / "Dockerfile").read_text()
    example = re.search(r"revseg-sidecar \\\n((?:# .*\n)+)", docker)[1]
    commands.append(["sidecar", *example.replace("#", " ").replace("\\", " ").split()])
    options = [cli.parser().parse_args(command) for command in commands]
    assert [o.check for o in options] == [False, False, True, True, True, False]
    for served in (options[0], options[1], options[5]):
        assert served.host == "0.0.0.0" and served.tls_certificate and served.tls_key and served.token_file
    assert "${CREDENTIALS_DIRECTORY}/token" in options[0].token_file  # systemd 249 of Ubuntu 22.04 does not know %d
    assert {port["port"] for port in service["ports"]} == {options[1].port, options[1].metrics_port}
    assert service["selector"] == stateful["template"]["metadata"]["labels"] == stateful["selector"]["matchLabels"]
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    for path in (options[1].tls_certificate, options[1].tls_key, options[1].token_file, options[2].tls_ca):
        assert any(path.startswith(f"{mount}/") for mount in mounted)
