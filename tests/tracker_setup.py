"""Clips and prompts to track, and what the sam2 package's own predictor makes of them."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import sam2.sam2_video_predictor
import sam2.utils.misc
from PIL import Image

from revseg_jax.tracker import tracker_pb2 as pb
from revseg_jax.tracker.clips import Clip, ClipWriter, Limits
from revseg_jax.tracker.upload import Upload, clip_upload

HEIGHT, WIDTH, FRAMES = 96, 150, 11
BOX = (20.0, 20.0, 70.0, 60.0)


def moving_shapes(frames: int, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    clip = rng.integers(0, 60, (1, height, width, 3), dtype=np.uint8).repeat(frames, axis=0)
    for t in range(frames):
        clip[t][(x - 20 - 9 * t) ** 2 + (y - 50) ** 2 < 18**2] = (220, 40, 40)
        clip[t][(abs(x - width + 30 + 7 * t) < 14) & (abs(y - 15 - 5 * t) < 12)] = (40, 60, 230)
    return clip


def jpegs(clip: np.ndarray) -> list[bytes]:
    encoded = []
    for frame in clip:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=95)
        encoded.append(buffer.getvalue())
    return encoded


def some_prompts(count: int, frames: int, seed: int = 0) -> list[tuple[int, tuple[float, ...]]]:
    rng = np.random.default_rng(seed)
    keyframes = [0, frames - 1, *rng.integers(0, frames, count).tolist()][:count]
    corners = rng.uniform((0, 0), (WIDTH - 40, HEIGHT - 40), (count, 2))
    sides = rng.uniform(12, 39, (count, 2))
    return [
        (k, tuple(map(float, np.float32([*corner, *(corner + side)]))))
        for k, corner, side in zip(keyframes, corners, sides, strict=True)
    ]


def stock_logits(model, folder: Path, frames: list[bytes], prompts) -> np.ndarray:
    """float32 [P, T, H, W] by the package's own calls on a folder of these JPEG images."""
    for index, frame in enumerate(frames):
        (folder / f"{index:05d}.jpg").write_bytes(frame)
    sam2.sam2_video_predictor.tqdm = sam2.utils.misc.tqdm = lambda frames, **_: frames  # no progress bars
    state = model.init_state(str(folder))
    results = []
    for keyframe, box in prompts:
        model.reset_state(state)
        model.add_new_points_or_box(state, keyframe, obj_id=1, box=np.array(box, np.float32))
        found = {}
        for reverse in (False, True):
            for frame, _, logits in model.propagate_in_video(state, keyframe, reverse=reverse):
                found[frame] = logits[0, 0].numpy()
        results.append([found[frame] for frame in range(state["num_frames"])])
    return np.array(results)


def assert_same(masks: np.ndarray, logits: np.ndarray) -> None:
    """Equal masks. A pixel whose logit is zero to float32's precision may fall on either side."""
    different = masks != (logits > 0)
    assert different.sum() <= 3 and (np.abs(logits[different]) < 1e-4).all(), different.sum()


def stored(clip: np.ndarray | list[bytes]) -> Clip:
    """The clip as a sidecar holds it."""
    upload = clip_upload(clip, image_size=10**6)
    h = upload.header
    writer = ClipWriter(h.height, h.width, h.encoding, h.frame_height, h.frame_width, Limits())
    for frame in upload.frames():
        writer.add(frame, last=True)
    return writer.close(h.clip_id)


def tracked(engine, clip: Clip, prompts) -> np.ndarray:
    """Masks bool [P, T, H, W] by our engine."""
    masks = np.zeros((len(prompts), clip.frames, clip.height, clip.width), bool)
    for which, at, found in engine.track(clip, prompts):
        masks[which, at] = found
    return masks


def start_sidecar(checkpoint: Path, config: Path, port: int = 0, *options: str, wait: bool = True, log=subprocess.PIPE):
    """(process, its port) of a sidecar that serves already if `wait`. log: where its stderr goes."""
    command = [sys.executable, "-m", "revseg_jax.cli", "sidecar", f"--port={port}", "--threads=1"]
    process = subprocess.Popen(
        [*command, f"--checkpoint={checkpoint}", f"--config={config}", *options],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    if wait:
        port = int(process.stdout.readline().rpartition(":")[2])
    return process, port


def until(holds: Callable[[], bool]) -> None:
    """Waits for it; the limit is for what hangs, not for what is slow."""
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def metrics(port: int) -> dict[str, float]:
    """What a sidecar's metrics port says, by the name of the metric with its labels."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
    return {name: float(value) for name, value in re.findall(r"^(revseg\S+) (\S+)$", text, re.MULTILINE)}


def resident_bytes(pid: int) -> int:
    """Memory of a process, where there is a /proc."""
    status = (Path("/proc") / str(pid) / "status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s*(\d+) kB", status)[1])


def slow_channel(address: str) -> grpc.Channel:
    """A connection that takes an answer only when it is asked for the next one: a server's buffers stay full."""
    options = [("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.insecure_channel(address, options=options)


def track_request(upload: Upload, prompts) -> pb.TrackRequest:
    request = pb.TrackRequest(clip_id=upload.header.clip_id)
    for n, (keyframe, (x1, y1, x2, y2)) in enumerate(prompts):
        request.prompts.add(prompt_id=n, keyframe=keyframe, x1=x1, y1=y1, x2=x2, y2=y2)
    return request
