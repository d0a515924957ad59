"""Who may talk to a sidecar, and what nobody may make it do."""

from __future__ import annotations

import io

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image
from tracker_setup import BOX, HEIGHT, WIDTH, jpegs, moving_shapes

from revseg_jax import cli
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.tracker import TLS, TrackerClient, check, wire
from revseg_jax.tracker import tracker_pb2 as pb
from revseg_jax.tracker.clips import MOST_SCANS, Limits
from revseg_jax.tracker.connection import CHANNEL_OPTIONS, Endpoint
from revseg_jax.tracker.security import ServerTLS, channel, is_loopback, read_token, refuse_exposure
from revseg_jax.tracker.wire import encode_masks, truth_hash

pytest_plugins = ["tracker_fixtures"]

TOKEN = "correct-horse-battery-staple"


def track(port: int, **options) -> np.ndarray:
    with TrackerClient([f"127.0.0.1:{port}"], patience_seconds=0.6, **options) as client:
        return client.track(moving_shapes(2), [(0, BOX)])


# --- tokens and TLS


def test_calls_without_the_token_are_refused(serving):
    records = []
    service, port = serving(token=TOKEN)
    service.watchers.append(records.append)
    assert track(port, token=TOKEN).shape == (1, 2, HEIGHT, WIDTH)
    for wrong in (None, TOKEN + "r", TOKEN[:-1] + "f", TOKEN.upper()):
        with pytest.raises(InputError, match="refuses the call.*token"):
            track(port, token=wrong)
    assert check("127.0.0.1", port)  # a probe carries no token
    assert {record.code for record in records[-4:]} == {"UNAUTHENTICATED"}
    with channel(f"127.0.0.1:{port}", None, None, CHANNEL_OPTIONS) as bare:
        stub = reflection_pb2_grpc.ServerReflectionStub(bare)
        with pytest.raises(grpc.RpcError) as error:
            next(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")])))
        assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
        for metadata in ([("authorization", TOKEN)], [("authorization", f"Bearer {TOKEN}")] * 2):
            for method in ("Info", "SomethingElse"):
                with pytest.raises(grpc.RpcError) as error:
                    bare.unary_unary(f"/revseg.tracker.v1.Tracker/{method}")(b"", metadata=metadata)
                assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert {record.method for record in records[-4:]} == {"Info", "unknown"}


def test_the_server_lists_its_services(serving):
    _, port = serving(token=TOKEN)
    with channel(f"127.0.0.1:{port}", None, None, CHANNEL_OPTIONS) as bare:
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        stub = reflection_pb2_grpc.ServerReflectionStub(bare)
        reply = next(stub.ServerReflectionInfo(asked, metadata=[("authorization", f"Bearer {TOKEN}")]))
    names = {service.name for service in reply.list_services_response.service}
    assert {"revseg.tracker.v1.Tracker", "grpc.health.v1.Health"} <= names


def test_tls(serving, certificates):
    ca, other = certificates / "ca.pem", certificates / "other.pem"
    _, port = serving(tls=ServerTLS(certificates / "server.pem", certificates / "server.key"), token=TOKEN)
    assert track(port, tls=TLS(ca), token=TOKEN).shape == (1, 2, HEIGHT, WIDTH)
    with pytest.raises(InputError, match="refuses the call"):
        track(port, tls=TLS(ca))
    with pytest.raises(RunFailure, match="TLS handshake .* failed"):
        track(port, tls=TLS(other), token=TOKEN)
    with pytest.raises(RunFailure, match="no tracker sidecar answers"):
        track(port, token=TOKEN)  # plain text to a TLS port
    assert check("127.0.0.1", port, tls=TLS(ca)) and check("localhost", port, tls=TLS(ca))
    assert not check("127.0.0.1", port) and not check("127.0.0.1", port, tls=TLS(other), seconds=1.0)


def test_mutual_tls(serving, certificates):
    ca, server, client = (certificates / name for name in ("ca.pem", "server", "client"))
    _, port = serving(tls=ServerTLS(server.with_suffix(".pem"), server.with_suffix(".key"), ca), token=TOKEN)
    mine = TLS(ca, client.with_suffix(".pem"), client.with_suffix(".key"))
    assert track(port, tls=mine, token=TOKEN).shape == (1, 2, HEIGHT, WIDTH)
    with pytest.raises(RunFailure, match="no tracker sidecar answers"):
        track(port, tls=TLS(ca), token=TOKEN)
    stranger = TLS(ca, certificates / "other.pem", certificates / "other.key")
    with pytest.raises(RunFailure, match="no tracker sidecar answers"):
        track(port, tls=stranger, token=TOKEN)
    assert check("127.0.0.1", port, tls=mine) and not check("127.0.0.1", port, tls=TLS(ca), seconds=1.0)


def test_unfit_certificates_and_tokens_are_named(certificates, tmp_path):
    (tmp_path / "bad.pem").write_text("no certificate")
    cases = {
        "ca.pem.*no such file": lambda: TLS(tmp_path / "ca.pem"),
        "authority .*bad.pem": lambda: TLS(tmp_path / "bad.pem"),
        "go together": lambda: TLS(None, certificates / "client.pem"),
        "server.pem with key .*client.key": lambda: ServerTLS(certificates / "server.pem", certificates / "client.key"),
        "only over TLS": lambda: TrackerClient(["192.0.2.1:50051"], token=TOKEN),
        "at least 16": lambda: TrackerClient(["127.0.0.1:50051"], token="short"),
        "token file .*nothing.*cannot be read": lambda: read_token(tmp_path / "nothing"),
        "token file .*bad.pem: .*at least 16": lambda: read_token(tmp_path / "bad.pem"),
    }
    for says, make in cases.items():
        with pytest.raises(InputError, match=f"(?i){says}") as error:
            make()
        assert "\n" not in str(error.value)
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert read_token(tmp_path / "token") == TOKEN


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *(("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)),
        *(("0.0.0.0", False), ("::", False), ("", False), ("192.0.2.1", False), ("no.such.host.invalid", False)),
    ],
)
def test_what_counts_as_this_machine_only(host, loopback):
    assert is_loopback(host) == loopback


def test_other_machines_are_served_only_with_tls_and_a_token(certificates, tmp_path, capsys):
    pair = certificates / "server.pem", certificates / "server.key"
    refuse_exposure("0.0.0.0", ServerTLS(*pair), TOKEN)
    refuse_exposure("127.0.0.1", None, None)
    (tmp_path / "token").write_text(TOKEN)
    files = {"--tls-certificate": pair[0], "--tls-key": pair[1], "--token-file": tmp_path / "token"}
    options = [str(part) for item in files.items() for part in item]
    for given, says in (([], "TLS and a token"), (options[:4], "a token"), (options[4:], "TLS")):
        with pytest.raises(SystemExit) as end:
            cli.main(["sidecar", "--host", "0.0.0.0", "--port", "0", *given])
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count("\n") == 1 and f"0.0.0.0 without {says} would" in err, err
    with pytest.raises(SystemExit) as end:
        cli.main(["sidecar", "--port", "0", "--tls-client-ca", str(pair[0])])
    assert end.value.code == 2 and "--tls-client-ca needs" in capsys.readouterr().err


# --- what is small to send and large to hold


def put(stub, *frames: bytes, counts: list[bytes] = (), **header) -> pb.PutClipReply:
    truth_id = truth_hash(counts) if counts else ""
    parts = [pb.PutClipRequest(header=pb.ClipHeader(truth_id=truth_id, **header))]
    parts += [pb.PutClipRequest(piece=pb.FramePiece(data=frame, last=True)) for frame in frames]
    return stub.PutClip(iter([*parts, *([pb.PutClipRequest(truth=pb.Truth(counts=counts))] if counts else [])]))


def refusal(says: str, ask) -> None:
    with pytest.raises(grpc.RpcError) as error:
        ask()
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT and error.value.details().startswith(says)


def test_images_that_cost_more_than_they_weigh_are_refused(serving):
    stub = Endpoint(f"127.0.0.1:{serving()[1]}").stub
    image = io.BytesIO()
    Image.fromarray(moving_shapes(1)[0]).save(image, "JPEG", progressive=True)
    image, sizes = image.getvalue(), {"encoding": pb.JPEG, "height": HEIGHT, "width": WIDTH}
    assert put(stub, image, **sizes).clip_held
    scan = image.rindex(b"\xff\xda")  # the last one; again and again is a valid image that takes long to decode
    slow = image[:-2] + image[scan:-2] * MOST_SCANS + b"\xff\xd9"
    refusal("frame 0: a JPEG image of more than", lambda: put(stub, slow, **sizes))
    # A header that claims 65,535 x 65,535 pixels, in a clip that claims less.
    frame_header = image.index(b"\xff\xc2") + 5
    huge = image[:frame_header] + b"\xff" * 4 + image[frame_header + 4 :]
    refusal("frame 0", lambda: put(stub, huge, **sizes))
    refusal("height, width", lambda: put(stub, huge, encoding=pb.JPEG, height=65535, width=65535))


def test_truths_are_not_unpacked_to_be_checked(serving, monkeypatch):
    service, port = serving(Limits(truth_bytes=1000))
    monkeypatch.delattr(wire, "_decode")  # it makes the masks
    stub = Endpoint(f"127.0.0.1:{port}").stub
    sizes = {"height": 6000, "width": 6000, "encoding": pb.RGB, "frame_height": 1, "frame_width": 1}
    empty = encode_masks(np.zeros((1, 6000, 6000), bool))[0]
    assert len(empty) < 10
    reply = put(stub, *[b"abc"] * 100, counts=[empty] * 100, **sizes)  # 3.6 GB of masks
    assert reply.truth_held
    refusal("truth: more than", lambda: put(stub, *[b"abc"] * 201, counts=[empty] * 201, **sizes))
    refusal("truth: mask 1", lambda: put(stub, *[b"abc"] * 2, counts=[empty, b"1" * 400], **sizes))


def test_truths_count_against_the_limits(serving):
    clip, limits = moving_shapes(3), Limits(max_truths=2, all_truth_bytes=2700)
    service, port = serving(limits)
    with TrackerClient([f"127.0.0.1:{port}"]) as client:
        truths = [np.random.default_rng(seed).random((3, HEIGHT, WIDTH)) < 0.01 for seed in range(4)]
        scores = [client.score(clip, [(0, BOX)], truth, contour=False).j for truth in truths]
        assert client.score(clip, [(0, BOX)], truths[0], contour=False).j == scores[0]  # evicted, so sent again
        held = next(iter(service.store._clips.values()))
        assert len(held.truths) == 2
        assert held.truth_bytes == sum(len(counts) for truth in held.truths.values() for counts in truth) > 2200
        client.score(clip[:1], [(0, BOX)], truths[0][:1], contour=False)
        assert [clip.frames for clip in service.store._clips.values()] == [1]  # too many bytes of truth together


def test_a_call_is_bounded_in_masks(serving):
    _, port = serving(Limits(max_masks=10))
    with TrackerClient([f"127.0.0.1:{port}"]) as client:
        clip = moving_shapes(6)
        assert client.track(clip, [(0, BOX)] * 1).shape[0] == 1
        with pytest.raises(InputError, match="prompts: 12 masks asked for, 10 at most"):
            client.track(clip, [(0, BOX), (1, BOX)])
        assert client.track(clip, [(0, BOX), (1, BOX)], frames=[0, 1]).shape[:2] == (2, 2)


def test_boxes_far_outside_are_refused(serving):
    _, port = serving()
    with TrackerClient([f"127.0.0.1:{port}"]) as client:
        assert client.track(jpegs(moving_shapes(1)), [(0, (-1e4, -1e4, 1e4, 1e4))]).shape[0] == 1
        with pytest.raises(InputError, match="box: .* reaches farther"):
            client.track(jpegs(moving_shapes(1)), [(0, (-3e38, 0.0, 3e38, 9.0))])
