"""The clip pipeline: examples a second and core, against a loader that decodes all frames; random access; worker
processes, what one more costs and gives; their memory over a long run.

    python benchmarks/data.py [--folder DIR] [--clips 24] [--examples 5000] [--records 10000]

Writes its clips into DIR (default: a temporary folder): 80 frames of 480p, and 10,000 records of a few small frames
for random access. The naive loader reads the same records, decodes all 80 frames of a clip to arrays, picks those that
are shown and resizes these as we do; a second one resizes all 80 before it picks. All numbers of one run are of one
machine under one load; ratios are of medians over turns. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from revseg_jax.config import ChainConfig
from revseg_jax.data.clip import encode_mask
from revseg_jax.data.example import make_example
from revseg_jax.data.frames import decode_frame, resize_square
from revseg_jax.data.pipeline import training_steps
from revseg_jax.data.records import VideoExpression, make_record
from revseg_jax.data.source import ClipSource
from revseg_jax.data.writer import Part, write_dataset

FRAMES, HEIGHT, WIDTH = 80, 480, 854
SMALL = 32  # side of the frames of the records for random access


def records(count: int, frames: int, height: int, width: int):
    """Videos of soft shapes and grain, JPEG with chroma at half size as cameras write it; all share their pictures."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(min(frames, 8)):
        coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
        soft = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
        grainy = np.clip(soft + rng.normal(0, 3, soft.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(grainy).save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height // 2, width // 4 : width // 2] = True
    rle = encode_mask(mask)
    for video in range(count):
        images = [pictures[(video + t) % len(pictures)] for t in range(frames)]
        names = [f"{t:05d}" for t in range(frames)]
        expression = VideoExpression("0", f"object of video {video}", "made", (0,))
        yield make_record(f"{video:06d}", 6.0, height, width, images, names, {"0": [rle] * frames}, [expression]), []


def write(folder: Path, count: int, *shape: int) -> ClipSource:
    settings = {"count": count, "shape": shape}
    parts = lambda: [Part("train", f"{settings}", count, partial(records, count, *shape))]  # noqa: E731
    write_dataset(folder, "benchmark", settings, parts, progress=False)
    return ClipSource([folder], "train")


def naive(source: ClipSource, index: int, chain: ChainConfig, resize_all: bool) -> np.ndarray:
    """Decodes every frame, and perhaps resizes every one too, then picks those that are shown."""
    clip = source[index]
    frames = [decode_frame(jpeg) for jpeg in clip.frames]
    if resize_all:
        frames = [resize_square(frame, chain.frame_size) for frame in frames]
    shown = [frames[t] for t in np.linspace(0, len(frames) - 1, chain.frames).round().astype(int)]
    return np.stack(shown if resize_all else [resize_square(frame, chain.frame_size) for frame in shown])


def seconds(function, *arguments) -> float:
    begin = time.process_time()
    function(*arguments)
    return time.process_time() - begin


def workers_of_this() -> list[Path]:
    """/proc folders of the worker processes."""
    return [Path(f"/proc/{child.pid}") for child in multiprocessing.active_children()]


def resident(process: Path) -> float:
    """MiB of a process in memory."""
    return int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_seconds() -> float:
    """Of this process and its workers."""
    fields = [(process / "stat").read_text().rpartition(")")[2].split() for process in workers_of_this()]
    ticks = sum(int(of[11]) + int(of[12]) for of in fields)  # utime and stime, see proc(5)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def throughput(source: ClipSource, chain: ChainConfig, workers: int, steps: int) -> dict[str, float]:
    """Examples a second of wall time and of CPU time; seconds to the first batch; MiB of a worker."""
    begin = time.perf_counter()
    batches = training_steps(source, chain, 8, seed=0, workers=workers)
    next(batches)
    started, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(steps):
        next(batches)
    wall, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    memory = [resident(process) for process in workers_of_this()]
    return {
        "examples_a_second": 8 * steps / wall,
        "examples_a_cpu_second": 8 * steps / cpu,
        "seconds_to_the_first_batch": started - begin,
        "mib_a_worker": max(memory, default=0.0),
    }


def long_run(source: ClipSource, chain: ChainConfig, examples: int, workers: int) -> dict:
    """MiB of the workers together, sampled over a run. What grows would not be the size of a clip: they are small."""
    batches, memory = training_steps(source, chain, 8, seed=0, workers=workers), []
    for step in range(-(-examples // 8)):
        next(batches)
        if step % max(examples // 80, 1) == 0:
            memory.append(round(sum(map(resident, workers_of_this())), 1))
    return {"examples": examples, "samples": memory, "growth": memory[-1] - memory[len(memory) // 4]}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--folder", type=Path)
    arguments.add_argument("--clips", type=int, default=24)
    arguments.add_argument("--examples", type=int, default=5000)
    arguments.add_argument("--records", type=int, default=10000)
    arguments.add_argument("--turns", type=int, default=10)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(measure(options, options.folder or Path(temporary))))


def measure(options: argparse.Namespace, folder: Path) -> dict:
    chain = ChainConfig()
    source = write(folder / "clips", options.clips, FRAMES, HEIGHT, WIDTH)

    ours, all_decoded, all_resized = [], [], []
    for turn in range(options.turns):
        index = turn % len(source)
        ours.append(seconds(lambda index=index: make_example(source[index], index, chain)))
        all_decoded.append(seconds(naive, source, index, chain, False))
        all_resized.append(seconds(naive, source, index, chain, True))

    many = write(folder / "records", options.records, 4, SMALL, SMALL)
    order = np.random.default_rng(0).permutation(len(many))
    begin = time.perf_counter()
    for index in order:
        many[int(index)]
    access = (time.perf_counter() - begin) / len(order)

    workers = {str(n): throughput(source, chain, n, 6) for n in (0, 1, 2)}
    return {
        "clip": [FRAMES, HEIGHT, WIDTH],
        "shown": [chain.frames, chain.frame_size],
        "jpeg_bytes_a_frame": round(np.mean([len(jpeg) for jpeg in source[0].frames])),
        "examples_a_core_second": 1 / statistics.median(ours),
        "ratio_to_decoding_all_frames": statistics.median(all_decoded) / statistics.median(ours),
        "ratio_to_decoding_and_resizing_all_frames": statistics.median(all_resized) / statistics.median(ours),
        "random_access": {"records": len(many), "milliseconds": 1000 * access},
        "workers": workers,
        "speedup_of_a_second_worker": workers["2"]["examples_a_second"] / workers["1"]["examples_a_second"],
        "cpu_cost_of_processes": workers["0"]["examples_a_cpu_second"] / workers["1"]["examples_a_cpu_second"],
        "memory_mib": long_run(many, ChainConfig(frames=4, frame_size=chain.frame_size), options.examples, 2),
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    main()
