"""The tracker sidecar as a process of its own: equal to the stock predictor, and right when things go wrong."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tracker_setup import (
    BOX,
    FRAMES,
    HEIGHT,
    WIDTH,
    assert_same,
    jpegs,
    metrics,
    moving_shapes,
    slow_channel,
    some_prompts,
    start_sidecar,
    stock_logits,
    track_request,
    until,
)

from revseg_jax.chain.geometry import box_to_original
from revseg_jax.chain.parsing import parse_turn2
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.evaluation.metrics import contour_accuracy, region_similarity
from revseg_jax.tracker import TrackerClient, check, tracker_pb2_grpc
from revseg_jax.tracker import tracker_pb2 as pb
from revseg_jax.tracker.client import Scores, _prompts
from revseg_jax.tracker.clips import Limits
from revseg_jax.tracker.connection import Endpoint
from revseg_jax.tracker.process import run_sidecar
from revseg_jax.tracker.service import TrackerService
from revseg_jax.tracker.upload import clip_upload
from revseg_jax.tracker.wire import decode_masks, encode_masks

pytest_plugins = ["tracker_fixtures"]


@pytest.fixture
def client(endpoint):
    with TrackerClient([endpoint]) as client:
        yield client


# --- masks on the wire


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_masks_survive_the_wire(height, width, density, seed):
    masks = np.random.default_rng(seed).random((2, height, width)) < density
    masks[1] = np.cumsum(masks[1], axis=1) % 2  # longer runs
    np.testing.assert_array_equal(decode_masks(encode_masks(masks), height, width), masks)


@settings(deadline=None)
@given(
    st.binary(min_size=1, max_size=30) | st.text("0123456789:;<=>?@ABCDEFGNOPQRVZ_abcdo", min_size=1).map(str.encode)
)
def test_run_lengths_from_outside_are_a_mask_or_refused(counts):
    try:
        mask = decode_masks([counts], 5, 7)
    except InputError:
        return
    assert mask.shape == (1, 5, 7)


# --- boxes on the wire

PLACES = st.floats(allow_nan=False, allow_infinity=False) | st.floats(-10, 850) | st.sampled_from([0.0, 420.0, 840.0])
SIDES = st.floats(0, 850) | st.floats(-20, 2).map(lambda exponent: 10**exponent)  # many are lost in float32
PIXELS = st.integers(1, 65_535)


@settings(deadline=None)
@given(PLACES, PLACES, SIDES, SIDES, PIXELS, PIXELS, st.sampled_from([28, 112, 840]))
@example(500.00001, 100.0, 1e-5, 200.0, 64, 64, 840)  # thinner than float32 can say
@example(839.99999999, 0.0, 1.0, 840.0, 64, 64, 840)  # begins just before the frame's edge
@example(0.0, 0.0, 1e-60, 1.0, 64, 64, 840)  # ends just behind it
def test_a_sidecar_takes_every_box_that_a_chain_may_end_with(x, y, width, height, frame_height, frame_width, size):
    turn = parse_turn2(json.dumps([{"bbox_2d": [x, y, x + width, y + height]}]))
    box = box_to_original(turn.box, size, frame_height, frame_width) if turn.ok else None
    if box is not None:
        clip = SimpleNamespace(frames=1, height=frame_height, width=frame_width)
        assert TrackerService(None, None, Limits())._prompts(_prompts([(0, box)]), clip)[1] == [[0]]


# --- equal to the package's own predictor


@pytest.mark.parametrize(("frames", "count"), [(FRAMES, 8), (20, 3), (2, 3), (1, 2)])
def test_masks_are_those_of_the_stock_predictor(client, model, tmp_path, frames, count):
    clip, prompts = jpegs(moving_shapes(frames)), some_prompts(count, frames)
    masks = client.track(clip, prompts)
    assert masks.shape == (count, frames, HEIGHT, WIDTH) and masks.dtype == bool
    expected = stock_logits(model, tmp_path, clip, prompts)
    assert_same(masks, expected)
    if frames == FRAMES:  # the comparison means something
        present = (expected > 0).any((2, 3)).mean()
        assert 0.3 < present < 1 and 0.02 < masks.mean() < 0.9, (present, masks.mean())


def test_absent_objects_and_the_order_of_prompts(client, model, tmp_path):
    clip, prompts = moving_shapes(FRAMES), some_prompts(5, FRAMES)
    masks = client.track(clip, prompts)
    shuffled = [3, 0, 4, 0, 2, 1]  # one of them twice
    assert (client.track(clip, [prompts[n] for n in shuffled]) != masks[shuffled]).sum() <= 3


# --- the service


def test_some_frames_only(client):
    clip, prompts = moving_shapes(FRAMES), some_prompts(5, FRAMES)
    whole = client.track(clip, prompts)
    for frames in ([4], [7, 2], list(range(FRAMES))):
        assert (client.track(clip, prompts, frames=frames) != whole[:, frames]).sum() <= 3
    assert client.track(clip, prompts, frames=[]).shape == (5, 0, HEIGHT, WIDTH)
    assert client.track(clip, []).shape == (0, FRAMES, HEIGHT, WIDTH)


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (300, 200)])  # smaller and larger than the model's frames
def test_jpeg_images_and_their_pixels_give_the_same(client, size):
    images = jpegs(moving_shapes(5, *size))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in images])
    prompts = [(2, BOX), (0, (5.0, 5.0, 90.0, 80.0))]
    masks = client.track(images, prompts)
    assert masks.shape == (2, 5, *size)
    np.testing.assert_array_equal(client.track(pixels, prompts), masks)


def test_a_streamed_clip_gives_the_same(client):
    clip, prompts = moving_shapes(FRAMES), some_prompts(3, FRAMES)
    masks, seen = client.track(clip, prompts), []
    for prompt, frame, mask in client.track_stream(lambda: iter(clip), prompts):
        np.testing.assert_array_equal(mask, masks[prompt, frame])
        seen.append((prompt, frame))
    assert sorted(seen) == [(p, t) for p in range(3) for t in range(FRAMES)]
    keyframe = prompts[2][0]
    assert [t for p, t in seen if p == 2] == [*range(keyframe, FRAMES), *range(keyframe - 1, -1, -1)]
    with pytest.raises(InputError, match="no frames"):
        next(client.track_stream(lambda: iter(()), prompts))
    with pytest.raises(InputError, match="one size"):
        next(client.track_stream(lambda: iter([clip[0], clip[1, :-1]]), prompts))


def test_scores_are_those_of_the_masks(client):
    clip, prompts = moving_shapes(FRAMES), some_prompts(4, FRAMES)
    prompts.append(prompts[0])
    truth = np.zeros((FRAMES, HEIGHT, WIDTH), bool)
    truth[:9, 10:60, 20:80] = True  # absent at the end
    masks, scores = client.track(clip, prompts), client.score(clip, prompts, truth)
    for n in range(5):
        np.testing.assert_allclose(scores.j_per_frame[n], region_similarity(masks[n], truth), atol=1e-3)
        np.testing.assert_allclose(scores.f_per_frame[n], contour_accuracy(masks[n], truth), atol=1e-2)
    np.testing.assert_allclose(scores.j, scores.j_per_frame.mean(1))
    np.testing.assert_allclose(scores.f, scores.f_per_frame.mean(1))
    assert scores.j[4] == scores.j[0] and len(set(scores.j)) > 2
    some = client.score(clip, prompts, truth, frames=[8, 3], contour=False)
    np.testing.assert_allclose(some.j_per_frame, scores.j_per_frame[:, [8, 3]], atol=1e-3)
    assert np.isnan(some.f).all() and np.isnan(some.f_per_frame).all()
    rles = [{"size": [HEIGHT, WIDTH], "counts": c} if t < 9 else None for t, c in enumerate(encode_masks(truth))]
    assert_equal(client.score(clip, prompts, rles), scores)
    other = client.score(clip, prompts, ~truth)  # another truth of the same clip
    assert (other.j_per_frame[:, :9] < 1).all() and not np.allclose(other.j, scores.j)
    assert client.score(clip, [], truth).j_per_frame.shape == (0, FRAMES)


def assert_equal(a: Scores, b: Scores) -> None:
    for name in ("j", "f", "j_per_frame", "f_per_frame"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_many_callers_at_once(client):
    clips = [moving_shapes(4, seed=seed) for seed in range(3)]
    truth = np.ones((4, HEIGHT, WIDTH), bool)
    alone = [client.score(clip, some_prompts(3, 4), truth) for clip in clips]
    futures = [client.score_async(clips[n % 3], some_prompts(3, 4), truth) for n in range(12)]
    for n, future in enumerate(futures):
        assert_equal(future.result(60), alone[n % 3])


def test_an_evicted_clip_is_put_again(endpoint):
    with TrackerClient([endpoint]) as client:
        clip = moving_shapes(3)
        masks = client.track(clip, [(1, BOX)])
        crowd = Endpoint(endpoint)
        for n in range(Limits().max_clips + 1):
            upload = clip_upload(np.full((1, 2, 2, 3), [n % 256, n // 256, 7], np.uint8), 128)
            crowd.put(upload, 10.0)
        assert client.info().clips_held == Limits().max_clips
        with pytest.raises(grpc.RpcError) as gone:
            list(crowd.stub.Track(pb.TrackRequest(clip_id=clip_upload(clip, 128).header.clip_id)))
        assert gone.value.code() == grpc.StatusCode.NOT_FOUND
        np.testing.assert_array_equal(client.track(clip, [(1, BOX)]), masks)
        crowd.channel.close()


def test_a_held_clip_costs_one_small_message(endpoint):
    upload = clip_upload(np.random.default_rng(1).integers(0, 255, (8, 100, 100, 3), dtype=np.uint8), 128)
    one, other = Endpoint(endpoint), Endpoint(endpoint)
    one.put(upload, 10.0)
    sent = []
    put = other.stub.PutClip
    other.stub.PutClip = lambda messages, **k: put((sent.append(m.ByteSize()) or m for m in messages), **k)
    assert other.put(upload, 10.0) == upload.header.clip_id
    assert len(sent) == 1 and sent[0] < 300
    other.put(upload, 10.0)
    assert len(sent) == 1


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ((-1, BOX), "keyframe"),
        ((3, BOX), "keyframe"),
        ((2**40, BOX), "keyframe"),
        ((1, (10.0, 10.0, float("nan"), 20.0)), "box"),
        ((1, (10.0, 10.0, float("inf"), 20.0)), "box"),
        ((1, (10.0, 10.0, 10.0, 20.0)), "box"),
        ((1, (30.0, 10.0, 10.0, 20.0)), "box"),
        ((1, (WIDTH, 10.0, WIDTH + 9, 20.0)), "box"),
        ((1, (1.0, 2.0, 3.0)), "prompt"),
        ((1, None), "prompt"),
    ],
)
def test_bad_prompts_are_named(client, prompt, says):
    with pytest.raises(InputError, match=says) as error:
        client.track(moving_shapes(3), [(0, BOX), prompt])
    assert "\n" not in str(error.value)
    assert client.track(moving_shapes(3), [(0, BOX)]).shape[0] == 1


def test_bad_clips_and_truths_are_named(client):
    clip, truth = moving_shapes(3), np.zeros((3, HEIGHT, WIDTH), bool)
    image = jpegs(clip)
    for frames in (clip[:0], clip[..., :2], clip.astype(np.float32), clip[0], [], [b""], ["x"], [b"not a jpeg"]):
        with pytest.raises(InputError, match="clip"):
            client.track(frames, [(0, BOX)])
    with pytest.raises(InputError, match="frame 1: not a JPEG"):
        client.track([image[0], b"not a jpeg"], [(0, BOX)])
    with pytest.raises(InputError, match="frame 1: 4 x 4 pixels"):
        client.track([image[0], *jpegs(np.zeros((1, 4, 4, 3), np.uint8))], [(0, BOX)])
    with pytest.raises(InputError, match="frame 2 cannot be decoded"):
        client.track([*image[:2], image[2][: len(image[2]) // 2]], [(0, BOX)])
    for bad in (truth[:2], truth[:, 1:], truth.astype(np.uint8), [None, None], [{"size": [4, 4], "counts": b"@0"}] * 3):
        with pytest.raises(InputError, match="truth"):
            client.score(clip, [(0, BOX)], bad)
    with pytest.raises(InputError, match="truth: mask 1: not an RLE"):
        client.score(clip, [(0, BOX)], [None, {"size": [HEIGHT, WIDTH], "counts": b"zzzz"}, None])
    for frames in ([3], [1, 1], [-1]):
        with pytest.raises(InputError, match="frames"):
            client.track(clip, [(0, BOX)], frames=frames)


def test_requests_no_client_of_ours_would_send(endpoint):
    stub, rgb = Endpoint(endpoint).stub, dict(encoding=pb.RGB, height=2, width=2, frame_height=2, frame_width=2)
    piece = pb.PutClipRequest(piece=pb.FramePiece(data=bytes(12), last=True))

    def put(*parts, **header):
        header = pb.PutClipRequest(header=pb.ClipHeader(**{**rgb, **header}))
        return stub.PutClip(iter([header, *parts]))

    refused = {
        "header": lambda: stub.PutClip(iter([piece])),
        "header: ": lambda: stub.PutClip(iter([])),
        "clip_id": lambda: put(piece, clip_id="0" * 64),
        "clip_id: not a SHA": lambda: put(piece, clip_id="../../etc"),
        "encoding": lambda: put(piece, encoding=0),
        "height, width": lambda: put(piece, height=2**31, width=2**31),
        "frame_height": lambda: put(piece, frame_height=0),
        "frame 0: 3 bytes": lambda: put(pb.PutClipRequest(piece=pb.FramePiece(data=b"abc", last=True))),
        "frame 0: longer": lambda: put(pb.PutClipRequest(piece=pb.FramePiece(data=bytes(13)))),
        "frame 0: an empty": lambda: put(pb.PutClipRequest(piece=pb.FramePiece())),
        "frame 0: its last piece": lambda: put(pb.PutClipRequest(piece=pb.FramePiece(data=b"abc"))),
        "truth: 2 masks": lambda: put(piece, pb.PutClipRequest(truth=pb.Truth(counts=[b"", b""])), truth_id="a" * 64),
        "truth_id: not the": lambda: put(piece, pb.PutClipRequest(truth=pb.Truth(counts=[b""])), truth_id="a" * 64),
        "truth_id: not a SHA": lambda: put(piece, truth_id="a"),
        "part": lambda: put(pb.PutClipRequest()),
        "model: not a SHA": lambda: list(stub.Track(pb.TrackRequest(clip_id=put(piece).clip_id, model="\n"))),
        "prompts: 0": lambda: list(stub.Track(pb.TrackRequest(clip_id=put(piece).clip_id))),
        "prompts: 1025": lambda: stub.Score(
            pb.ScoreRequest(clip_id=put(piece).clip_id, prompts=[pb.Prompt(x2=1, y2=1)] * 1025)
        ),
    }
    for says, ask in refused.items():
        with pytest.raises(grpc.RpcError) as error:
            ask()
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT and error.value.details().startswith(says)
    with pytest.raises(grpc.RpcError) as error:
        stub.Score(pb.ScoreRequest(clip_id=put(piece).clip_id, truth_id="a" * 64, prompts=[pb.Prompt(x2=1, y2=1)]))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
    assert put(piece).clip_held


def test_the_client_needs_no_torch():
    code = (
        "import sys, revseg_jax.tracker, revseg_jax.tracker.process; print({'torch', 'jax', 'sam2'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_the_generated_code_is_that_of_the_proto(tmp_path):
    protoc = pytest.importorskip("grpc_tools.protoc")
    root, proto = Path(__file__).parents[1], "revseg_jax/tracker/tracker.proto"
    assert protoc.main(["", f"-I{root}", f"--descriptor_set_out={tmp_path / 'set'}", proto]) == 0
    from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

    committed = FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(committed)
    fresh = FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file[0]
    fresh.ClearField("source_code_info")
    for message in fresh.message_type:  # protoc fills in names that the Python runtime leaves out
        for field in [*message.field, *(f for nested in message.nested_type for f in nested.field)]:
            field.ClearField("json_name")
    for message in committed.message_type:
        for field in [*message.field, *(f for nested in message.nested_type for f in nested.field)]:
            field.ClearField("json_name")
    assert fresh == committed


# --- processes that come and go


def test_a_sidecar_that_is_not_there(tmp_path):
    with TrackerClient(["127.0.0.1:1"], patience_seconds=0.5) as client:
        with pytest.raises(RunFailure, match=r"127\.0\.0\.1:1 .*`revseg sidecar --port 1`$"):
            client.track(moving_shapes(2), [(0, BOX)])
    assert not check("127.0.0.1", 1)
    with pytest.raises(InputError, match="host:port"):
        TrackerClient(["localhost"])
    with pytest.raises(InputError, match="host:port"):
        TrackerClient([])


@pytest.fixture
def far(endpoint):
    """An address from which the sidecar's first word takes longer than a second; and how often one has connected."""
    host, _, port = endpoint.rpartition(":")
    listening, connected = socket.create_server(("127.0.0.1", 0)), []

    def pump(source: socket.socket, target: socket.socket, wait: float) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(wait)
                wait = 0
                target.sendall(data)

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, there = listening.accept()[0], socket.create_connection((host, int(port)))
                connected.append((near, there))
                threading.Thread(target=pump, args=(near, there, 0), daemon=True).start()
                threading.Thread(target=pump, args=(there, near, 1.2), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"127.0.0.1:{listening.getsockname()[1]}", connected
    for one in (listening, *(side for pair in connected for side in pair)):
        one.close()


def test_a_sidecar_far_away_is_reached_by_one_connection(far):
    address, connected = far
    with TrackerClient([address]) as client:
        assert client.info().max_calls > 0
    assert len(connected) == 1


def test_a_dead_sidecar_is_left_out(endpoint):
    with TrackerClient(["127.0.0.1:1", endpoint, "127.0.0.1:2"]) as client:
        for seed in range(4):
            assert client.track(moving_shapes(1, seed=seed), [(0, BOX)]).shape == (1, 1, HEIGHT, WIDTH)


def test_killed_and_started_again(checkpoint, config):
    clip, truth = moving_shapes(8), np.ones((8, HEIGHT, WIDTH), bool)
    work = [some_prompts(8, 8, seed) for seed in range(8)]
    process, port = start_sidecar(checkpoint, config)
    try:
        with TrackerClient([f"127.0.0.1:{port}"], patience_seconds=600, deadline_seconds=600) as client:
            few = client.score(clip, work[0][:2], truth)
            pending = [client.score_async(clip, prompts, truth) for prompts in work]
            first = wait(pending, 300, FIRST_COMPLETED).done
            assert len(first) < len(pending)
            process.kill()
            process.wait()
            assert not check("127.0.0.1", port)
            process, _ = start_sidecar(checkpoint, config, port)
            assert_equal(client.score(clip, work[0][:2], truth), few)
            answers = [future.result(300) for future in pending]  # asked again by themselves
            assert_equal(client.score(clip, work[-1], truth), answers[-1])
    finally:
        process.kill()


def test_what_was_taken_is_finished_before_the_end(checkpoint, config, tmp_path):
    """SIGTERM while some scores are asked for and a slow caller has taken a few of its masks only."""
    clip, truth = moving_shapes(8), np.ones((8, HEIGHT, WIDTH), bool)
    work, many = [some_prompts(3, 8, seed) for seed in range(4)], some_prompts(16, 8)
    with open(tmp_path / "log", "w") as log:
        process, port = start_sidecar(checkpoint, config, 0, "--metrics-port=0", log=log)
    serving = json.loads((tmp_path / "log").read_text().splitlines()[0])
    under_way = lambda: metrics(serving["metrics_port"])["revseg_sidecar_calls"]  # noqa: E731
    try:
        address = f"127.0.0.1:{port}"
        with TrackerClient([address]) as client, slow_channel(address) as slow:
            alone = [client.score(clip, prompts, truth) for prompts in work]
            masks = tracker_pb2_grpc.TrackerStub(slow).Track(track_request(clip_upload(clip, 128), many))
            taken = len(next(masks).masks)
            pending = [client.score_async(clip, prompts, truth) for prompts in work]
            # All are taken: one that is done does not count as under way any more.
            until(lambda: sum(future.done() for future in pending) + under_way() == 1 + len(work))
            process.send_signal(signal.SIGTERM)
            until(lambda: health_of(address) == health_pb2.HealthCheckResponse.NOT_SERVING)
            assert not check("127.0.0.1", port)
            with TrackerClient([address], patience_seconds=0.2) as late:
                with pytest.raises(RunFailure, match="no tracker sidecar answers"):
                    late.track(clip, work[0][:1])
            for future, expected in zip(pending, alone, strict=True):
                assert_equal(future.result(300), expected)
            assert health_of(address) == health_pb2.HealthCheckResponse.NOT_SERVING and under_way() == 1
            taken += sum(len(reply.masks) for reply in masks)
            assert taken == 16 * 8
            assert process.wait(300) == 0
    finally:
        process.kill()


def health_of(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60).status


def test_a_taken_port_and_an_orphan(checkpoint, config, endpoint):
    port = int(endpoint.rpartition(":")[2])
    taken, _ = start_sidecar(checkpoint, config, port, wait=False)
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(checkpoint), str(config)], stdout=subprocess.PIPE, text=True
    )
    out, err = taken.communicate(timeout=300)
    assert taken.returncode == 1 and out == "" and err.count("\n") == 1 and str(port) in err
    orphan = int(parent.stdout.readline().rpartition(":")[2])
    assert check("127.0.0.1", orphan)
    parent.kill()
    parent.wait()
    until(lambda: not check("127.0.0.1", orphan))


_PARENT = """
import sys, time
from revseg_jax.tracker.process import run_sidecar
from revseg_jax.tracker.service import TrackerService
with run_sidecar(checkpoint=sys.argv[1], config=sys.argv[2], threads=1) as endpoint:
    print(endpoint, flush=True)
    time.sleep(3600)
"""


def test_a_sidecar_that_does_not_come_up(tmp_path, config):
    with pytest.raises(InputError, match="did not start: .*nothing.safetensors"):
        with run_sidecar(checkpoint=str(tmp_path / "nothing.safetensors"), config=str(config)):
            pass
