"""The SAM2 sidecar: a group of prompts against the stock predictor, and the load of several clients.

    python benchmarks/sidecar.py group [--config embedded] [--checkpoint CKPT] [--image-size N] [--device cpu]
    python benchmarks/sidecar.py load [--minutes 10] [--clients 4]

group: 8 prompts on one clip of 16 frames, by our engine and by 8 separate runs of the sam2 package's own predictor on
the same JPEG images, in turns in one process; on the CPU in processor seconds on one thread, so that other work on the
machine does not count, on a GPU in wall seconds. load: a sidecar of its own with the embedded tracker on one thread,
and clients that ask for scores of 8 prompts without pause; latencies as the clients see them, memory as the sidecar's
metrics tell it. Both print one JSON object. Exit 1 when masks differ beyond pixels on an outline (not looked at on a
GPU, where ours is in bfloat16), when the group costs more than 1.6 passes of the image encoder besides the tracking,
when a request under load fails or when memory grows under load.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from revseg_jax.data.frames import encode_frame
from revseg_jax.data.synthetic import Scene, render
from revseg_jax.tracker import TrackerClient

PROMPTS, FRAMES, CLIPS = 8, 16, 32
MOST_PASSES = 1.6  # of the image encoder over the clip
MOST_GROWN_BYTES = 50 << 20  # while it serves the same clips again and again


def clip(seed: int) -> tuple[list[bytes], Scene]:
    scene = render(seed, "easy", "test", frames=FRAMES)
    return [encode_frame(frame) for frame in scene.frames], scene


def prompts(scene: Scene, seed: int) -> list[tuple[int, tuple[float, ...]]]:
    """(keyframe, box) of objects, each edge moved outwards by a few pixels."""
    rng, found = np.random.default_rng(seed), []
    visible = np.argwhere(scene.masks.sum((2, 3)) > 16)
    for frame, index in visible[rng.integers(len(visible), size=PROMPTS)]:
        rows, columns = np.nonzero(scene.masks[frame, index])
        box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        found.append((int(frame), tuple(map(float, np.float32(box + rng.uniform(0, 3, 4) * [-1, -1, 1, 1])))))
    return found


# --- a group of prompts


def group(options: argparse.Namespace) -> tuple[dict, bool]:
    import torch
    from omegaconf import OmegaConf
    from sam2.sam2_video_predictor import SAM2VideoPredictor

    from revseg_jax.tracker.clips import Clip, ClipWriter, Limits
    from revseg_jax.tracker.engine import FEATURE_BYTES, Engine
    from revseg_jax.tracker.features import FeatureCache
    from revseg_jax.tracker.model import _config_path, build_tracker
    from revseg_jax.tracker.tracker_pb2 import JPEG

    on_gpu = options.device.startswith("cuda")
    if not on_gpu:
        torch.set_num_threads(1)
    images, scene = clip(seed=0)
    asked = prompts(scene, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        config = options.config
        checkpoint = options.checkpoint or ("embedded" if config == "embedded" else None)
        if options.image_size:
            tree = OmegaConf.load(_config_path(config, None))
            tree.model.image_size = options.image_size
            config = Path(folder) / "config.yaml"
            OmegaConf.save(tree, config)

        def build() -> SAM2VideoPredictor:
            torch.manual_seed(0)
            return build_tracker(config, checkpoint, options.device)

        model, stock_model = build(), build()
        half = torch.autocast(options.device.partition(":")[0], torch.bfloat16, enabled=on_gpu)
        engine = Engine(model, compiled=on_gpu)
        if on_gpu:
            print(engine.warm_up() or "compiled", file=sys.stderr)
        for index, image in enumerate(images):
            (Path(folder) / f"{index:05d}.jpg").write_bytes(image)
        height, width = scene.frames.shape[1:3]
        writer = ClipWriter(height, width, JPEG, 0, 0, Limits())
        for image in images:
            writer.add(image, last=True)
        held: Clip = writer.close("")

        def ours() -> np.ndarray:
            engine.features = FeatureCache(model.device, FEATURE_BYTES, 0)
            return tracked()

        def tracked() -> np.ndarray:
            masks = np.zeros((PROMPTS, FRAMES, height, width), bool)
            for which, at, found in engine.track(held, asked):
                masks[which, at] = found
            return masks

        def stock() -> np.ndarray:
            with half:
                return np.array([stock_masks(stock_model, folder, *prompt) for prompt in asked])

        def timed(work: Callable) -> tuple[float, object]:
            if on_gpu:
                torch.cuda.synchronize()
            clock = time.perf_counter if on_gpu else time.process_time
            began = clock()
            result = work()
            if on_gpu:
                torch.cuda.synchronize()
            return clock() - began, result

        frames = [normalised(held.frame(index, model.image_size), options.device) for index in range(FRAMES)]

        @torch.inference_mode()
        def encode() -> None:
            with half:
                for frame in frames:
                    stock_model.forward_image(frame)

        seconds = {"ours": [], "tracking": [], "stock": [], "encoder": []}
        timed(ours), timed(lambda: stock_masks(stock_model, folder, *asked[0]))  # what is only done once is not counted
        for _ in range(options.repeats):
            spent, masks = timed(ours)
            seconds["ours"].append(spent)
            seconds["tracking"].append(timed(tracked)[0])  # features are there
            spent, expected = timed(stock)
            seconds["stock"].append(spent)
            seconds["encoder"].append(timed(encode)[0])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    # Beyond their own tracking, what 8 prompts cost in passes of the image encoder over the clip, a frame at a time.
    passes = (median["ours"] - median["tracking"]) / median["encoder"]
    different = float((masks != expected).mean())
    return {
        "what": "group",
        "config": options.config,
        "image_size": model.image_size,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu, one thread",
        "prompts": PROMPTS,
        "frames": FRAMES,
        "seconds": median,
        "repeats": seconds,
        "stock_over_ours": median["stock"] / median["ours"],
        "encoder_passes": passes,
        "frames_a_second": PROMPTS * FRAMES / median["ours"],
        "stock_frames_a_second": PROMPTS * FRAMES / median["stock"],
        "pixels_that_differ": different,
        "versions": {name: version(name) for name in ("torch", "sam2", "revseg-jax")},
        "machine": platform.processor() or platform.machine(),
    }, passes <= MOST_PASSES and (on_gpu or different < 1e-4)


def normalised(frame: np.ndarray, device: str):
    """uint8 [S, S, 3] -> float32 [1, 3, S, S] as the image encoder takes it."""
    import torch

    from revseg_jax.tracker.engine import _normalise

    return _normalise(torch.from_numpy(frame[None].copy()).to(device))


def stock_masks(model, folder: str, keyframe: int, box: Sequence[float]) -> np.ndarray:
    """bool [T, H, W] by the sam2 package's own calls, from the JPEG folder on."""
    import sam2.sam2_video_predictor
    import sam2.utils.misc

    sam2.sam2_video_predictor.tqdm = sam2.utils.misc.tqdm = lambda frames, **_: frames  # no progress bars
    state = model.init_state(folder)
    model.add_new_points_or_box(state, keyframe, obj_id=1, box=np.array(box, np.float32))
    found = {}
    for reverse in (False, True):
        for frame, _, logits in model.propagate_in_video(state, keyframe, reverse=reverse):
            found[frame] = (logits[0, 0] > 0).cpu().numpy()
    return np.array([found[frame] for frame in range(state["num_frames"])])


# --- several clients


def load(options: argparse.Namespace) -> tuple[dict, bool]:
    clips = [clip(seed) for seed in range(CLIPS)]
    latencies: list[float] = []
    failures: list[str] = []
    samples: list[tuple[float, float, float]] = []  # seconds, resident bytes, feature bytes
    began, stop = time.monotonic(), threading.Event()

    def client(number: int, endpoint: str) -> None:
        rng = np.random.default_rng(number)
        with TrackerClient([endpoint]) as tracker:
            while not stop.is_set():
                images, scene = clips[rng.integers(CLIPS)]
                truth = scene.masks[:, rng.integers(scene.masks.shape[1])]
                asked = prompts(scene, seed=int(rng.integers(2**31)))
                start = time.monotonic()
                try:
                    tracker.score(images, asked, truth)
                except Exception as error:  # what went wrong is the result
                    failures.append(str(error))
                latencies.append(time.monotonic() - start)

    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w") as log:
        # On the CPU, where the features are part of what is resident.
        command = [sys.executable, "-m", "revseg_jax.cli", "sidecar", "--device=cpu", "--threads=1"]
        command += ["--port=0", "--metrics-port=0"]
        sidecar = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            port = sidecar.stdout.readline().rpartition(":")[2].strip()
            metrics_port = json.loads((Path(folder) / "log").read_text().splitlines()[0])["metrics_port"]
            began = time.monotonic()
            threads = [threading.Thread(target=client, args=(n, f"127.0.0.1:{port}")) for n in range(options.clients)]
            for thread in threads:
                thread.start()
            while time.monotonic() - began < 60 * options.minutes:
                stop.wait(min(10, 6 * options.minutes))
                seen = metrics(metrics_port)
                resident, features = seen["process_resident_memory_bytes"], seen["revseg_sidecar_feature_bytes"]
                samples.append((time.monotonic() - began, resident, features))
            stop.set()
            for thread in threads:
                thread.join()
            seconds = time.monotonic() - began
            spent = metrics(metrics_port)["process_cpu_seconds_total"]
        finally:
            stop.set()
            sidecar.terminate()
            code = sidecar.wait(90)
    # The first fifth of the time fills what is filled once; the cache of features grows until it holds all clips.
    later = [resident - features for at, resident, features in samples if at > 12 * options.minutes]
    grown = max(later) - later[0]
    return {
        "what": "load",
        "minutes": options.minutes,
        "clients": options.clients,
        "requests": len(latencies),
        "failures": len(failures),
        "first_failure": failures[0] if failures else None,
        "requests_a_second": len(latencies) / seconds,
        "latency_seconds": {f"p{q}": float(np.percentile(latencies, q)) for q in (50, 90, 99)},
        "mebibytes_besides_features": {"early": round(later[0] / 2**20), "late": round(later[-1] / 2**20)},
        "mebibytes_grown": grown / 2**20,
        "feature_mebibytes": round(samples[-1][2] / 2**20),
        "sidecar_cpu_share": spent / seconds,
        "exit_code": code,
        "versions": {name: version(name) for name in ("torch", "sam2", "grpcio", "revseg-jax")},
    }, not failures and code == 0 and grown < MOST_GROWN_BYTES


def metrics(port: int) -> dict[str, float]:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).read().decode()
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="what", required=True)
    one = kinds.add_parser("group")
    one.add_argument("--config", default="embedded", help="embedded, sam2.1_hiera_l, ... or a YAML file")
    one.add_argument("--checkpoint", help="default: the embedded one, random weights for other configs")
    one.add_argument("--image-size", type=int, help="instead of the config's")
    one.add_argument("--device", default="cpu")
    one.add_argument("--repeats", type=int, default=5)
    other = kinds.add_parser("load")
    other.add_argument("--minutes", type=float, default=10.0)
    other.add_argument("--clients", type=int, default=4)
    options = parser.parse_args()
    result, fine = group(options) if options.what == "group" else load(options)
    print(json.dumps(result))
    sys.exit(not fine)


if __name__ == "__main__":
    main()
