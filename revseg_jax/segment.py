"""`revseg segment`: a question about a video, answered with a mask for every frame. Read it from top to bottom."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from revseg_jax.chain.prompts import one_line, prefix_text
from revseg_jax.config import ChainConfig, Config, MeshConfig, PolicyConfig, TrackerConfig, check
from revseg_jax.data.frames import encode_frame, resize_square
from revseg_jax.data.sampling import sample_frames
from revseg_jax.data.video import Video, open_video
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.overlay import draw, write_video
from revseg_jax.paths import local_only
from revseg_jax.policy.checkpoint import read_chain, resolve_folder
from revseg_jax.rollout.chains import Rollout
from revseg_jax.rollout.engine import Prompt
from revseg_jax.rollout.loading import LoadedEngine, inference_dtype, load_engine
from revseg_jax.rollout.sampling import rollout_keys
from revseg_jax.tracker.client import Prompt as TrackerPrompt
from revseg_jax.tracker.client import TrackerClient, description
from revseg_jax.tracker.process import open_tracker
from revseg_jax.tracker.upload import sent_size

PACKAGES = ("revseg-jax", "jax", "flax", "av", "pillow", "numpy")


def main(
    video: str,
    query: str,
    out: str,
    policy: str = "embedded",
    tracker: str = "embedded",
    tracker_config: str = "embedded",
    endpoints: Sequence[str] = (),
    token_file: str = "",
    tls_ca: str = "",
) -> None:
    """Writes masks/00000.png ... (L, 0 or 255, the video's own size), overlay.mp4 and trace.json into the new folder
    `out`, which appears complete or not at all, and prints the answer.

    video: a file that PyAV reads or a folder of JPEG or PNG frames. policy: a folder in Hugging Face layout; its
    chain.yaml says what the policy is shown, else it is `ChainConfig()`. tracker, tracker_config: checkpoint and config
    of the sidecar that is started here unless `endpoints` ("host:port") names running ones; token_file, tls_ca: what
    those ask for, see `TrackerConfig`.

    A chain that fails is an answer too: the masks are empty and trace.json says why. Raises InputError or RunFailure.
    """
    query = one_line(_valid(query))
    if not query:
        raise InputError('the query is empty: ask for something, such as "the red car"')
    if endpoints and (tracker, tracker_config) != ("embedded", "embedded"):
        raise InputError("a sidecar that runs already has its tracker: give --endpoint or --tracker, not both")
    timings, lap_began = {}, time.monotonic()

    def lap(name: str) -> None:
        nonlocal lap_began
        timings[name], lap_began = round(time.monotonic() - lap_began, 3), time.monotonic()

    with _new_folder(local_only(out)) as folder:
        # ---- Whatever can be wrong with the input shows before anything slow begins ----
        source = open_video(video, progress=True)
        lap("read")
        loaded = _load_policy(policy)
        encoder = loaded.engine.encoder
        said = query, encoder.chain.frames, float(source.duration)
        if encoder.turn1_prompt(*said) != prefix_text(encoder.chain, *said):
            slots = encoder.chain.query_tokens
            raise InputError(f"the query of {len(query)} characters is too long for the policy's query_tokens={slots}")
        lap("load_policy")

        sidecars = TrackerConfig(list(endpoints), tracker, tracker_config, token_file=token_file, tls_ca=tls_ca)
        with open_tracker(sidecars) as client:
            info = client.info()
            if len(source) > info.max_frames:
                raise InputError(f"video {video} has {len(source)} frames, the tracker takes {info.max_frames} at most")
            sent_height, sent_width = sent_size(source.height, source.width, info.image_size)
            if (size := len(source) * sent_height * sent_width * 3) > info.max_clip_bytes:
                raise InputError(
                    f"video {video} has {len(source)} frames, {size / 1e9:.1f} GB as they are sent "
                    f"({sent_width} x {sent_height} pixels), the tracker holds {info.max_clip_bytes / 1e9:.1f} GB: "
                    "cut it, or give it fewer frames a second"
                )
            lap("start_tracker")

            # ---- The chain: two turns, greedily ----
            shown = sample_frames(len(source), encoder.chain.frames)
            rollout = _answer(loaded, source, query, shown)
            keyframe = None if rollout.turn1.frame_idx is None else int(shown[rollout.turn1.frame_idx])
            lap("chain")

            # ---- Masks for every frame, empty ones when the chain failed ----
            (folder / "masks").mkdir()
            prompt = (keyframe, rollout.box) if rollout.ok else None
            masked = _write_masks(folder / "masks", source, client, prompt)
            lap("track")

        # ---- For a person to look at ----
        drawn = _draw_all(source, folder / "masks", keyframe, rollout.box)
        write_video(folder / "overlay.mp4", drawn, source.pts, source.last, source.time_base)
        lap("overlay")
        trace = {
            **_trace(loaded, source, query, shown, keyframe, rollout),
            "masked_frames": int(masked.sum()),
            "timings": timings,  # seconds
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            **description(info),
        }
        (folder / "trace.json").write_text(json.dumps(trace, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print(_summary(trace, out))
    if policy == "embedded":
        print("note      the embedded policy knows synthetic clips only; --policy takes a real one")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` to write into; it becomes `out` when the block ends well and else is gone."""
    made: list[Path] = []
    partial = None
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out {out} exists already: give a new folder")
        out = out.resolve()
        made = [parent for parent in out.parents if not parent.exists()]
        partial = out.parent / f".{out.name}.{os.getpid()}.partial"
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except (OSError, av.error.FFmpegError) as error:
        raise RunFailure(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # not empty: it holds `out`
                parent.rmdir()


def _load_policy(path: str) -> LoadedEngine:
    chain = read_chain(resolve_folder(path)) or ChainConfig()
    dtype = inference_dtype()
    # One prompt cannot be spread over devices; the policy's parameters can.
    config = Config(policy=PolicyConfig(path, dtype, dtype), chain=chain, mesh=MeshConfig(data=1, fsdp=1, tensor=-1))
    check(config)
    return load_engine(config)


def _answer(loaded: LoadedEngine, source: Video, query: str, shown: np.ndarray) -> Rollout:
    chain = loaded.engine.encoder.chain
    frames, jpegs = [], []
    for _, pixels in source.read(shown.tolist()):
        frames.append(resize_square(pixels, chain.frame_size))
        jpegs.append(encode_frame(pixels))
    padding = frames[-1:] * (chain.frames - len(frames))
    prompt = Prompt(
        query=query,
        frames=np.stack(frames + padding),
        frame_count=len(frames),
        seconds=float(source.duration),
        jpegs=jpegs,
        size=(source.height, source.width),
    )
    keys = rollout_keys(seed=0, step=0, prompts=np.array([0]), group_size=1)
    weights = loaded.engine.weights((loaded.trained, loaded.frozen))
    return loaded.greedy.sample(weights, [prompt], keys)[1][0][0]


def _write_masks(folder: Path, source: Video, client: TrackerClient, prompt: TrackerPrompt | None) -> np.ndarray:
    """A PNG for every frame, as the masks come. Returns bool [T], which frames have any mask."""
    masked, written = np.zeros((2, len(source)), bool)
    if prompt is None:
        buffer = io.BytesIO()
        Image.new("L", (source.width, source.height)).save(buffer, "PNG")
        for index in range(len(source)):
            _mask_file(folder, index).write_bytes(buffer.getvalue())
        return masked
    masks = client.track_stream(lambda: _bar(source.frames(), source, "sending"), [prompt])
    for _, index, mask in _bar(masks, source, "tracking"):
        Image.fromarray(mask.astype(np.uint8) * 255).save(_mask_file(folder, index))
        written[index], masked[index] = True, mask.any()
    if not written.all():
        raise RunFailure(f"the tracker answered for {written.sum()} of {len(source)} frames")
    return masked


def _draw_all(source: Video, masks: Path, keyframe: int | None, box: Sequence[float] | None) -> Iterator[np.ndarray]:
    for index, pixels in enumerate(_bar(source.frames(), source, "drawing")):
        with Image.open(_mask_file(masks, index)) as image:
            mask = np.asarray(image) > 0
        yield draw(pixels, mask, box if index == keyframe else None)


def _mask_file(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.png"


def _bar(items: Iterable, source: Video, what: str) -> tqdm:
    """On a terminal only, and gone when done: whatever reads our stderr otherwise finds messages alone."""
    return tqdm(items, what, total=len(source), unit=" frames", leave=False, disable=None)


def _trace(
    loaded: LoadedEngine, source: Video, query: str, shown: np.ndarray, keyframe: int | None, rollout: Rollout
) -> dict[str, Any]:
    """Frames are those of the video, seconds count from its first one, the box is in its pixels."""
    chain, turn1 = loaded.engine.encoder.chain, rollout.turn1
    times = source.times
    return {
        "video": _valid(str(source.path)),
        "size": [source.height, source.width],
        "frames": len(source),
        "fps": float(source.fps),
        "seconds": float(source.duration),
        "query": query,
        "shown_frames": shown.tolist(),
        "prompt1": prefix_text(chain, query, len(shown), float(source.duration)),
        "answer1": rollout.answer1,
        "prompt2": loaded.engine.encoder.turn2_prompt(turn1.description) if rollout.answer2 is not None else None,
        "answer2": rollout.answer2,
        "keyframe": keyframe,
        "keyframe_seconds": float(times[keyframe]) if keyframe is not None else None,
        "description": turn1.description,
        "box": list(rollout.box) if rollout.box else None,
        "failure": rollout.failure,
        "policy": _valid(str(loaded.folder)),
    }


def _summary(trace: dict[str, Any], out: str) -> str:
    lines = [("query", trace["query"])]
    if trace["description"]:
        lines.append(("answer", trace["description"]))
    if trace["keyframe"] is not None:
        place = f"{trace['keyframe']} of 0..{trace['frames'] - 1}, at {trace['keyframe_seconds']:.2f} s"
        lines.append(("keyframe", place))
    if trace["box"]:
        x1, y1, x2, y2 = trace["box"]
        height, width = trace["size"]
        lines.append(("box", f"x {x1:.0f} to {x2:.0f}, y {y1:.0f} to {y2:.0f} of {width} x {height} pixels"))
    if trace["failure"]:
        lines.append(("failed", f"{trace['failure']}; all masks are empty"))
    lines.append(("masks", f"on {trace['masked_frames']} of {trace['frames']} frames"))
    lines.append(("written", f"{out}: masks/, overlay.mp4, trace.json"))
    return "\n".join(f"{name:<9} {_printable(value)}" for name, value in lines)


def _valid(text: str) -> str:
    """Text that can be written to a file: what comes from a shell need not be valid UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _printable(text: str) -> str:
    """One line that is safe on a terminal, whatever the policy wrote."""
    return "".join(c if c.isprintable() else " " for c in one_line(_valid(text)))
