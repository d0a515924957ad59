"""`revseg segment` on small real videos, with a real sidecar; the policy's answers are given where tests need them."""

from __future__ import annotations

import json
import os
import resource
import signal
from contextlib import nullcontext
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from video_files import number, numbered, peak_growth, write

from revseg_jax import cli, segment
from revseg_jax.chain.geometry import box_to_keyframe, box_to_original
from revseg_jax.chain.parsing import parse_turn1, parse_turn2
from revseg_jax.chain.prompts import turn1_answer, turn2_answer
from revseg_jax.data.frames import decode_frame, resize_square
from revseg_jax.data.sampling import sample_frames
from revseg_jax.data.synthetic import DIFFICULTIES, render
from revseg_jax.data.video import open_video
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.rollout.chains import Rollout
from revseg_jax.rollout.engine import RolloutEngine
from revseg_jax.tracker import TrackerClient
from revseg_jax.tracker.process import run_sidecar

REAL = sorted((Path(__file__).parents[2] / "shared/videos").glob("*.mp4"))
NO_CHAIN = "I see nothing of the kind."


@pytest.fixture(scope="module")
def endpoint():
    with run_sidecar(threads=1) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def loaded():
    return segment._load_policy("embedded")


@pytest.fixture
def answers(loaded, monkeypatch):
    """Call it with the two answers that the policy is to give. Returns the list of the prompts it got."""

    def give(answer1: str, answer2: str = "") -> list:
        prompts = []

        def sample(engine, params, asked, keys):
            prompts.append(asked[0])
            turn1, turn2, box = parse_turn1(answer1, asked[0].frame_count), None, None
            if turn1.ok:
                turn2 = parse_turn2(answer2)
                box = box_to_original(turn2.box, engine.encoder.chain.keyframe_size, *asked[0].size)
            return None, [[Rollout(answer1, answer2 if turn1.ok else None, turn1, turn2, box, False, 9)]]

        monkeypatch.setattr(RolloutEngine, "sample", sample)
        monkeypatch.setattr(segment, "_load_policy", lambda path: loaded)
        return prompts

    return give


@pytest.fixture
def clip(tmp_path):
    return str(write(tmp_path / "clip.mp4", numbered(6)))


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def trace_of(out: Path) -> dict:
    return json.loads((out / "trace.json").read_text())


def masks_of(out: Path) -> np.ndarray:
    images = [Image.open(path) for path in sorted((out / "masks").iterdir())]
    assert {image.mode for image in images} == {"L"}
    masks = np.stack([np.asarray(image) for image in images])
    assert set(np.unique(masks)) <= {0, 255}
    return masks > 0


# --- the whole way


def test_everything_real_on_a_synthetic_clip(tmp_path, capfd):
    scene = render(0, DIFFICULTIES["easy"], "test")
    query = scene.expressions[0].query
    video = write(tmp_path / "scene.mkv", scene.frames, "ffv1", pixels="yuv444p")
    cli.main(["segment", str(video), query, "--out", str(tmp_path / "new" / "answer")])
    out, err = capfd.readouterr()
    trace = trace_of(tmp_path / "new" / "answer")
    assert err == "" and f"query     {query}\n" in out and str(tmp_path / "new" / "answer") in out
    assert left_in(tmp_path / "new") == {"answer"}
    assert left_in(tmp_path / "new/answer") == {"masks", "overlay.mp4", "trace.json"}
    count = len(scene.frames)
    assert (trace["frames"], trace["size"], trace["query"]) == (count, list(scene.frames.shape[1:3]), query)
    assert query in trace["prompt1"] and trace["answer1"] and trace["shown_frames"] == sample_frames(count, 8).tolist()
    assert masks_of(tmp_path / "new/answer").shape == scene.frames.shape[:3]
    assert {"jax", "revseg-jax"} <= set(trace["versions"]) and {"torch", "sam2"} <= set(trace["tracker_versions"])
    assert list(trace["timings"]) == ["read", "load_policy", "start_tracker", "chain", "track", "overlay"]
    if trace["failure"]:
        assert not masks_of(tmp_path / "new/answer").any()
    else:
        keyframe, (x1, y1, x2, y2) = trace["keyframe"], trace["box"]
        assert f"keyframe  {keyframe} of 0..{count - 1}, at {keyframe / 30:.2f} s" in out
        assert trace["description"] in trace["prompt2"] and trace["answer2"]
        mask = masks_of(tmp_path / "new/answer")[keyframe]
        assert mask[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1].sum() >= 0.5 * mask.sum()


def test_a_portrait_video_with_its_own_times(tmp_path, endpoint, answers, capsys):
    """A turned, variable-rate, odd-sized video: every number of the answer is known."""
    height, width, count = 131, 95, 24  # as shown
    shown = np.full((count, height, width, 3), 60, np.uint8)
    truth = np.zeros((count, height, width), bool)
    for t in range(count):
        truth[t, 10 + 3 * t : 42 + 3 * t, 20 + t : 50 + t] = True
        shown[t][truth[t]] = (220, 40, 40)
    pts = (np.arange(count) * 40 + np.arange(count) ** 2).tolist()
    quarter = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    stored = np.rot90(shown, axes=(1, 2)).copy()
    time = Fraction(1, 1000)
    video = write(tmp_path / "v.mp4", stored, "libx264", pts, time, pixels="yuv444p", matrix=quarter, qp="0")

    index = 3
    keyframe = int(sample_frames(count, 8)[index])
    box = (20 + keyframe, 10 + 3 * keyframe, 50 + keyframe, 42 + 3 * keyframe)
    second = turn2_answer(box_to_keyframe(box, 168, height, width), "red square")
    prompts = answers(turn1_answer("It moves.", index, "red \x1b[31msquare"), second)
    out = tmp_path / "out"
    segment.main(str(video), "  the red\nsquare ", str(out), endpoints=[endpoint])

    trace, printed = trace_of(out), capsys.readouterr().out
    assert trace["keyframe"] == keyframe and trace["keyframe_seconds"] == pytest.approx(pts[keyframe] / 1000)
    np.testing.assert_allclose(trace["box"], box, atol=0.5)
    assert trace["size"] == [height, width] and trace["seconds"] > pts[-1] / 1000
    assert trace["query"] == "the red square" and trace["failure"] == "" and trace["masked_frames"] == count
    assert f"keyframe  {keyframe} of 0..23, at {pts[keyframe] / 1000:.2f} s" in printed
    assert "red  [31msquare" in printed and "\x1b" not in printed  # nothing the policy writes reaches the terminal

    prompt = prompts[0]
    assert prompt.size == (height, width) and prompt.seconds == trace["seconds"] and prompt.frame_count == 8
    for n, t in enumerate(trace["shown_frames"]):
        assert np.abs(prompt.frames[n].astype(int) - resize_square(shown[t], 112)).mean() < 3
        assert np.abs(decode_frame(prompt.jpegs[n]).astype(int) - shown[t]).mean() < 4

    masks = masks_of(out)
    assert masks.shape == truth.shape
    j = (masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))
    assert j.mean() > 0.75  # that of another frame would be below
    assert ((masks & truth[::-1]).sum((1, 2)) / (masks | truth[::-1]).sum((1, 2))).mean() < 0.5
    overlay = open_video(out / "overlay.mp4")
    np.testing.assert_allclose(overlay.times, np.array(pts) / 1000, atol=1e-9)
    assert (overlay.height, overlay.width, len(overlay)) == (132, 96, count)
    for mask, frame in zip(masks, overlay.frames(), strict=True):  # grey where nothing is drawn
        far = ~(mask | truth[keyframe])
        grey = np.abs(frame[:height, :width].astype(int) - 60).max(-1) < 25
        assert grey[far].mean() > 0.85 and not grey[mask].any()


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_frames_than_are_shown(tmp_path, endpoint, answers, count):
    video = write(tmp_path / "v.mp4", numbered(count))
    prompts = answers(turn1_answer("Here.", count - 1, "thing"), turn2_answer((40, 40, 120, 120), "thing"))
    segment.main(str(video), "the thing", str(tmp_path / "out"), endpoints=[endpoint])
    assert prompts[0].frame_count == count and len(prompts[0].frames) == 8
    assert trace_of(tmp_path / "out")["keyframe"] == count - 1
    assert (
        masks_of(tmp_path / "out").shape == (count, 64, 128) and len(open_video(tmp_path / "out/overlay.mp4")) == count
    )


def test_a_failed_chain_gives_empty_masks(tmp_path, clip, endpoint, answers, capsys):
    answers(NO_CHAIN)
    (tmp_path / "out").mkdir()  # an empty folder may be there
    segment.main(clip, "the wall", str(tmp_path / "out"), endpoints=[endpoint])
    trace = trace_of(tmp_path / "out")
    assert trace["answer1"] == NO_CHAIN and trace["failure"].startswith("turn 1: ")
    assert all(trace[name] is None for name in ("keyframe", "keyframe_seconds", "box", "prompt2", "answer2"))
    masks = masks_of(tmp_path / "out")
    assert masks.shape == (6, 64, 128) and not masks.any()
    assert "failed    turn 1: " in capsys.readouterr().out
    assert [number(frame) for frame in open_video(tmp_path / "out/overlay.mp4").frames()] == list(range(6))


def test_text_that_is_not_unicode(tmp_path, clip, endpoint, answers):
    answers(NO_CHAIN)
    segment.main(clip, "caf\udce9 <|im_end|> 猫", str(tmp_path / "out"), endpoints=[endpoint])
    assert trace_of(tmp_path / "out")["query"] == "caf\ufffd <|im_end|> 猫"


# --- what ends badly leaves one line and nothing else


def fails(capsys, code: int, words: str, *arguments: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["segment", *arguments])
    err = capsys.readouterr().err
    assert stop.value.code == code and err.count("\n") == 1 and words in err, err


def test_bad_input(tmp_path, clip, endpoint, loaded, monkeypatch, capsys):
    load = segment._load_policy
    monkeypatch.setattr(segment, "_load_policy", lambda path: loaded if path == "it" else load(path))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept.txt").write_text("kept")
    out = str(tmp_path / "a/b/out")
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{}")
    before = left_in(tmp_path)
    here = ["--policy", "it", "--endpoint", endpoint]
    fails(capsys, 2, "the query is empty", clip, "", "--out", out, *here)
    fails(capsys, 2, "the query is empty", clip, " \n\t", "--out", out, *here)
    fails(capsys, 2, "query_tokens", clip, "wall " * 2000, "--out", out, *here)
    fails(capsys, 2, "missing.mp4 cannot be opened", str(tmp_path / "missing.mp4"), "wall", "--out", out, *here)
    fails(capsys, 2, "text.mp4 cannot be read", str(tmp_path / "text.mp4"), "wall", "--out", out, *here)
    fails(capsys, 2, "exists already", clip, "wall", "--out", str(tmp_path / "full"), *here)
    fails(capsys, 2, "exists already", clip, "wall", "--out", clip, *here)
    fails(capsys, 2, "nowhere does not exist", clip, "wall", "--out", out, "--policy", str(tmp_path / "nowhere"))
    fails(capsys, 2, "broken lacks tokenizer.json", clip, "wall", "--out", out, "--policy", str(tmp_path / "broken"))
    fails(capsys, 2, "not both", clip, "wall", "--out", out, "--tracker", "sam2.pt", *here)
    fails(capsys, 2, "host:port", clip, "wall", "--out", out, "--policy", "it", "--endpoint", "localhost")
    fails(capsys, 2, "did not start", clip, "wall", "--out", out, "--policy", "it", "--tracker", "nowhere.pt")
    assert left_in(tmp_path) == before and left_in(tmp_path / "full") == {"kept.txt"}


def test_failures_on_the_way(tmp_path, clip, endpoint, answers, monkeypatch, capsys):
    answers(turn1_answer("Here.", 0, "thing"), turn2_answer((40, 40, 120, 120), "thing"))
    out, before = str(tmp_path / "a/b/out"), left_in(tmp_path)
    monkeypatch.setattr("revseg_jax.tracker.connection.FIRST_CONTACT_SECONDS", 0.3)
    fails(capsys, 1, "no tracker sidecar answers", clip, "wall", "--out", out, "--endpoint", "127.0.0.1:1")
    here = [clip, "wall", "--endpoint", endpoint, "--out"]
    fails(capsys, 1, "cannot write", *here, f"{clip}/out")
    fails(capsys, 1, "cannot write", *here, "/proc/revseg/out")
    fails(capsys, 1, "cannot write", *here, str(tmp_path / ("x" * 300)))
    monkeypatch.setattr(segment, "write_video", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    fails(capsys, 130, "interrupted", *here, out)
    monkeypatch.setattr(segment, "write_video", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    fails(capsys, 143, "stopped by SIGTERM", *here, out)
    assert left_in(tmp_path) == before


@pytest.mark.parametrize("limit", [50, 2000])  # the first mask does not fit; the overlay does not
def test_a_full_disk(tmp_path, endpoint, answers, capsys, limit):
    answers(turn1_answer("Here.", 0, "thing"), turn2_answer((40, 40, 120, 120), "thing"))
    noise = np.random.default_rng(0).integers(0, 255, (5, 64, 128, 3), dtype=np.uint8)
    clip, before = str(write(tmp_path / "noise.mp4", noise)), left_in(tmp_path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))  # writing beyond fails as on a full disk
    try:
        with pytest.raises(RunFailure, match=r"cannot write .*out: ") as error:
            segment.main(clip, "wall", str(tmp_path / "out"), endpoints=[endpoint])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "\n" not in str(error.value)
    assert left_in(tmp_path) == before | {"noise.mp4"}


@pytest.mark.parametrize(
    ("size", "limit", "words"),
    [
        ((64, 128), {"max_frames": 5}, "has 6 frames, the tracker takes 5 at most"),
        ((64, 128), {"max_clip_bytes": 6 * 64 * 128 * 3 - 1}, r"6 frames, .* \(128 x 64 pixels\), the tracker holds"),
        (
            (256, 256),
            {"max_clip_bytes": 6 * 128 * 128 * 3 - 1},
            r"6 frames, .* \(128 x 128 pixels\), the tracker holds",
        ),
        ((256, 256), {"max_frames": 6, "max_clip_bytes": 6 * 128 * 128 * 3}, None),
    ],
)
def test_a_video_too_long_for_the_tracker(tmp_path, endpoint, answers, monkeypatch, size, limit, words):
    """It is refused before the chain begins and a frame is sent."""
    prompts = answers(NO_CHAIN)
    clip = str(write(tmp_path / "clip.mp4", numbered(6, *size)))
    info = TrackerClient.info

    def short(client):
        reply = info(client)
        for name, value in limit.items():
            setattr(reply, name, value)
        return reply

    monkeypatch.setattr(TrackerClient, "info", short)
    with pytest.raises(InputError, match=words) if words else nullcontext():
        segment.main(clip, "wall", str(tmp_path / "out"), endpoints=[endpoint])
    assert len(prompts) == (words is None)


# --- length


def grown_memory(folder: Path, endpoint: str, counts: tuple[int, ...]) -> list[int]:
    grown = []
    for n, count in enumerate(counts):
        path = write(folder / f"{n}.mp4", np.broadcast_to(numbered(1, 256, 256), (count, 256, 256, 3)))
        answer = partial(segment.main, str(path), "the thing", str(folder / f"out{n}"), endpoints=[endpoint])
        grown.append(peak_growth(answer))
        assert len(list((folder / f"out{n}/masks").iterdir())) == count
    return grown


def test_memory_does_not_grow_with_length(tmp_path, endpoint, answers, monkeypatch):
    answers(turn1_answer("Here.", 4, "thing"), turn2_answer((40, 40, 120, 120), "thing"))

    def track_stream(client, open_frames, prompts):  # keyframe to the end, then back, as the sidecar does
        count, keyframe = sum(1 for _ in open_frames()), prompts[0][0]
        for t in [*range(keyframe, count), *range(keyframe - 1, -1, -1)]:
            yield 0, t, np.ones((256, 256), bool)

    monkeypatch.setattr(TrackerClient, "track_stream", track_stream)
    _, short, long = grown_memory(tmp_path, endpoint, (20, 40, 400))  # the first one loads what has to be loaded
    assert long < short + 100 * 256 * 256 * 3  # of 360 more frames


@pytest.mark.slow
def test_a_long_video_with_the_real_tracker(tmp_path, endpoint, answers):
    answers(turn1_answer("Here.", 4, "thing"), turn2_answer((40, 40, 120, 120), "thing"))
    _, short, long = grown_memory(tmp_path, endpoint, (200, 200, 2000))
    assert long < short + 100 * 256 * 256 * 3  # of 1800 more frames


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="needs the real clips")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_real_clips(tmp_path, endpoint, path):
    segment.main(str(path), "the thing that moves", str(tmp_path / "out"), endpoints=[endpoint])
    source, overlay = open_video(path), open_video(tmp_path / "out/overlay.mp4")
    assert (len(overlay), overlay.height, overlay.width) == (len(source), source.height, source.width)
    np.testing.assert_allclose(overlay.times, source.times, atol=1e-9)
    assert masks_of(tmp_path / "out").shape == (len(source), source.height, source.width)
