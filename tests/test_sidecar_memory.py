"""A long clip goes through a sidecar without staying in anybody's memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tracker_setup import BOX, HEIGHT, WIDTH, metrics, resident_bytes, start_sidecar

from revseg_jax.tracker import TrackerClient

pytest_plugins = ["tracker_fixtures"]

LIMIT = 16  # MiB of image features; those of 2,000 frames take 125, and their pixels 82
MOST_GROWN = 64  # MiB, for what the allocator does not give back


def frames(count: int) -> Iterator[np.ndarray]:
    background = np.random.default_rng(0).integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for t in range(count):
        frame, left = background.copy(), 20 + t % 80
        frame[20:60, left : left + 40] = (220, 40, t % 256)
        yield frame


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")
def test_a_clip_of_2000_frames_streams_through_within_the_limit(checkpoint, config, tmp_path):
    with open(tmp_path / "log", "w") as log:
        process, port = start_sidecar(
            checkpoint, config, 0, f"--feature-mebibytes={LIMIT}", "--metrics-port=0", log=log
        )
    metrics_port = json.loads((tmp_path / "log").read_text().splitlines()[0])["metrics_port"]
    processes = process.pid, os.getpid()
    try:
        with TrackerClient([f"127.0.0.1:{port}"]) as client:
            for _ in client.track_stream(lambda: frames(500), [(300, BOX)]):  # fills what is filled once
                pass
            before, most, seen = [resident_bytes(pid) for pid in processes], [0, 0], []
            for _, frame, mask in client.track_stream(lambda: frames(2000), [(900, BOX)]):
                assert mask.shape == (HEIGHT, WIDTH)
                seen.append(frame)
                most = [max(bytes) for bytes in zip(most, map(resident_bytes, processes), strict=True)]
        assert seen == [*range(900, 2000), *range(899, -1, -1)]
        grown = [(peak - start) / 2**20 for peak, start in zip(most, before, strict=True)]
        assert max(grown) < MOST_GROWN, grown
        told = metrics(metrics_port)
        assert 0.9 * LIMIT < told["revseg_sidecar_feature_bytes"] / 2**20 <= LIMIT
    finally:
        process.terminate()
        assert process.wait(300) == 0
