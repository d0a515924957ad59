"""Malformed requests against a live sidecar: each gets a proper status, and nothing is left of any of them."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import grpc
import numpy as np
import pytest
from tracker_setup import BOX, moving_shapes, resident_bytes, start_sidecar

from revseg_jax.tracker import TrackerClient, check
from revseg_jax.tracker import tracker_pb2 as pb
from revseg_jax.tracker.connection import CHANNEL_OPTIONS
from revseg_jax.tracker.upload import clip_upload
from revseg_jax.tracker.wire import MESSAGE_BYTES, truth_hash

pytest_plugins = ["tracker_fixtures"]

SERVICE = "/revseg.tracker.v1.Tracker/"
STREAMED = {"PutClip": True, "Track": False, "Score": False, "Info": False}
REFUSED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # a message larger than the limit
    grpc.StatusCode.CANCELLED,  # by the test
}
NUMBERS = [0, 1, 2, 3, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, -3.4e38, float("nan"), float("inf"), -float("inf"), 50.0]


class Fuzzer:
    """Requests drawn from a seed, around a clip of three frames that the sidecar holds."""

    def __init__(self, channel: grpc.Channel, seed: int, image_size: int):
        self.channel, self.random = channel, random.Random(seed)
        self.upload = clip_upload(moving_shapes(3), image_size)
        self.clip_id, self.truth_id = self.upload.header.clip_id, truth_hash([b""] * 3)
        put = pb.PutClipRequest(truth=pb.Truth(counts=[b""] * 3))
        header = pb.ClipHeader()
        header.CopyFrom(self.upload.header)
        header.truth_id = self.truth_id
        frames = list(self.upload.messages())[1:]
        self.good_put = [pb.PutClipRequest(header=header), *frames, put]
        assert not self.send("PutClip", *(message.SerializeToString() for message in self.good_put))

    def send(self, method: str, *messages: bytes, cancel: bool = False) -> grpc.RpcError | None:
        """The refusal, or None for an answer."""
        call = self.channel.stream_stream(SERVICE + method)(iter(messages), timeout=300)
        try:
            if cancel:
                call.cancel()
            for _ in call:
                pass
        except grpc.RpcError as error:
            return error
        return None

    def one(self) -> grpc.RpcError | None:
        kind = self.random.choice(
            [self.bytes, self.mutated, self.fields, self.fields, self.stream, self.stream, self.elsewhere]
        )
        return kind()

    def bytes(self):
        size = self.random.choice([0, 1, 7, 100, 5000])
        return self.send(self.random.choice([*STREAMED]), self.random.randbytes(size))

    def mutated(self):
        """A good request with some of its bytes changed, left out or doubled."""
        request = bytearray(self.request(self.clip_id, self.truth_id, 1, BOX, [0, 2]).SerializeToString())
        for _ in range(self.random.randint(1, 4)):
            at = self.random.randrange(len(request))
            what = self.random.choice([bytes([self.random.randrange(256)]), b"", request[at : at + 9] * 2])
            request[at : at + self.random.randint(1, 3)] = what
        return self.send(self.random.choice(["Track", "Score"]), bytes(request))

    def request(self, clip_id: str, truth_id: str, keyframe: int, box, frames) -> pb.ScoreRequest:
        box = dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))
        prompts = [pb.Prompt(keyframe=keyframe, **box)] * self.random.choice([0, 1, 2, 1025])
        if self.random.random() < 0.5:  # field numbers of Track
            return pb.TrackRequest(clip_id=clip_id, prompts=prompts, frames=frames)
        return pb.ScoreRequest(clip_id=clip_id, truth_id=truth_id, prompts=prompts, frames=frames)

    def fields(self):
        """Well-formed, with values that nobody means."""
        names = [self.clip_id, self.truth_id, "", "0" * 64, "x" * 64, "A" * 100_000, "\0", "../../etc/passwd"]
        choice = self.random.choice
        request = self.request(
            choice([self.clip_id, choice(names)]),
            choice(names),
            choice([0, 3, -1, -(2**31), 2**31 - 1]),
            choice([BOX, [choice(FLOATS) for _ in range(4)]]),
            [choice(NUMBERS) for _ in range(choice([0, 1, 3, 1000]))],
        )
        method = "Track" if isinstance(request, pb.TrackRequest) else "Score"
        return self.send(method, request.SerializeToString())

    def stream(self):
        """PutClip in another order, cut short, with another header or with other bytes in its frames."""
        messages, choice = list(self.good_put), self.random.choice
        spoil = choice(["shuffle", "cut", "header", "bytes", "repeat", "truth", "cancel", "empty"])
        if spoil == "shuffle":
            self.random.shuffle(messages)
        elif spoil == "cut":
            messages = messages[: self.random.randrange(len(messages))]
        elif spoil == "header":
            header = pb.ClipHeader()
            header.CopyFrom(messages[0].header)
            field = choice(["height", "width", "encoding", "frame_height", "frame_width", "clip_id", "truth_id"])
            setattr(header, field, "f" * 64 if field.endswith("id") else choice([0, 1, 2, 2**31 - 1]))
            messages[0] = pb.PutClipRequest(header=header)
        elif spoil == "bytes":
            piece = self.random.randbytes(choice([0, 1, 43_200, 1 << 20, MESSAGE_BYTES]))
            messages[1] = pb.PutClipRequest(piece=pb.FramePiece(data=piece, last=choice([True, False])))
        elif spoil == "repeat":
            messages += [choice(messages)] * choice([1, 50])
        elif spoil == "truth":
            counts = [self.random.randbytes(choice([0, 1, 30])) for _ in range(choice([1, 3, 25_000]))]
            messages[-1] = pb.PutClipRequest(truth=pb.Truth(counts=counts))
        elif spoil == "empty":
            messages = [pb.PutClipRequest()] * choice([0, 1, 30])
        data = [message.SerializeToString() for message in messages]
        return self.send("PutClip", *data, cancel=spoil == "cancel")

    def elsewhere(self):
        """Another method, or a stream where one message is meant."""
        method = self.random.choice(["Trak", "", "PutClip/Track", "Track", "Score", "Info"])
        return self.send(method, *[struct.pack("<Q", self.random.getrandbits(64))] * self.random.choice([1, 2, 5]))


def footprint(process) -> dict[str, int]:
    """Threads, open files and resident bytes of a process."""
    folder = Path(f"/proc/{process.pid}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return {
        "threads": int(status["Threads"]),
        "files": len(list((folder / "fd").iterdir())),
        "bytes": resident_bytes(process.pid),
    }


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")
@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_malformed_requests_leave_nothing_behind(checkpoint, config, tmp_path, count):
    with open(tmp_path / "log", "w+") as log:
        process, port = start_sidecar(checkpoint, config, log=log)
        try:
            with (
                TrackerClient([f"127.0.0.1:{port}"]) as client,
                grpc.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel,
            ):
                clip, prompts = moving_shapes(3), [(1, BOX), (0, BOX)]
                masks = client.track(clip, prompts)
                fuzzer, refused, before = Fuzzer(channel, seed=count, image_size=128), {}, None
                for n in range(count):
                    error = fuzzer.one()
                    if error is not None:
                        code, said = error.code(), error.details()
                        assert code in REFUSED, (n, code, said)
                        assert len(said) < 1000 and "\n" not in said
                        refused[code] = refused.get(code, 0) + 1
                    if n == count // 3:
                        before = footprint(process)
                assert sum(refused.values()) > 0.7 * count and len(refused) >= 4, refused
                assert process.poll() is None and check("127.0.0.1", port)
                np.testing.assert_array_equal(client.track(clip, prompts), masks)
                after = footprint(process)
        finally:
            process.terminate()
            assert process.wait(300) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()
    assert after["threads"] <= before["threads"] + 2 and after["files"] <= before["files"] + 2, (before, after)
    assert after["bytes"] < before["bytes"] + (30 << 20), (before, after)
