"""Many callers, few turns: a full sidecar says so, and nobody waits for somebody else's slowness."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import closing
from pathlib import Path

import grpc
import numpy as np
import pytest
from tracker_setup import (
    BOX,
    HEIGHT,
    WIDTH,
    moving_shapes,
    slow_channel,
    some_prompts,
    start_sidecar,
    stored,
    track_request,
    until,
)

from revseg_jax.chain.parsing import Turn1, Turn2
from revseg_jax.config import load_config
from revseg_jax.data.example import make_example, stack
from revseg_jax.data.source import ClipSource
from revseg_jax.data.synthetic_builder import prepare_synthetic
from revseg_jax.evaluation import held_out
from revseg_jax.evaluation.chains import tracking_threads
from revseg_jax.rollout.chains import Rollout
from revseg_jax.rollout.loading import load_engine
from revseg_jax.run.interruption import Interrupted, heed_sigterm
from revseg_jax.tracker import SidecarAway, TrackerClient, connection, tracker_pb2_grpc
from revseg_jax.tracker.clips import Limits
from revseg_jax.tracker.engine import CallerGone
from revseg_jax.tracker.turns import TURNS_BEFORE_OTHERS, Turns
from revseg_jax.tracker.upload import clip_upload
from revseg_jax.tracker.wire import RETRY_KEY

pytest_plugins = ["tracker_fixtures"]


def test_turns_are_taken_in_order_of_arrival():
    turns, order = Turns(), []
    calls = [turns.arrive() for _ in range(4)]
    for _ in range(TURNS_BEFORE_OTHERS):
        with calls[1].turn():
            pass

    def take(n: int) -> None:
        with calls[n].turn():
            order.append(n)

    threads = []
    with turns.arrive().turn():
        for n in (3, 1, 2, 0, 4):
            if n == 4:  # the call that had many turns arrives anew with its next: before what comes from now on
                calls.append(turns.arrive())
            threads.append(threading.Thread(target=take, args=(n,)))
            threads[-1].start()
            until(lambda: len(turns) == len(threads))
        assert not order
    for thread in threads:
        thread.join(300)
    assert order == [0, 2, 3, 1, 4] and len(turns) == 0


def test_a_full_sidecar_says_when_to_come_back(serving, monkeypatch):
    service, port = serving(Limits(max_calls=1))
    hints, asked = [], []
    read = connection.retry_hint
    monkeypatch.setattr(connection, "retry_hint", lambda error: hints.append(read(error)) or hints[-1])
    clip, truth = moving_shapes(2), np.ones((2, HEIGHT, WIDTH), bool)
    with TrackerClient([f"127.0.0.1:{port}"]) as client, TrackerClient([f"127.0.0.1:{port}"]) as second:
        alone = client.score(clip, [(0, BOX)], truth)
        second.score(clip, [(0, BOX)], truth)
        second._connections.patience_seconds = 0.0
        with service.engine.turns.arrive().turn():  # the model is busy for as long as we want
            first = client.score_async(clip, [(0, BOX)], truth)
            until(lambda: service.calls == 1)
            with pytest.raises(SidecarAway, match="has been full"):
                second.score(clip, [(0, BOX)], truth)
            assert hints[-1] == 0.5
            second._connections.patience_seconds = 300.0
            asked.append(second.score_async(clip, [(1, BOX)], truth))
            until(lambda: len(hints) > 4)  # told more than once to come back
            assert second.info().max_calls == 1  # other answers cost no turn
        assert first.result(300).j == alone.j
        assert asked[0].result(300).j.shape == (1,)


class Refusal(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode):
        self.code, self.details = lambda: code, lambda: ""
        self.trailing_metadata = lambda: ((RETRY_KEY, "10"),)


@pytest.mark.parametrize("code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE])
def test_patience_begins_with_the_first_refusal(code):
    """A clip may take longer than that to come, or a call to run until its sidecar is killed."""
    answers = iter([Refusal(code), None])

    def ask(endpoint: connection.Endpoint) -> str:
        if refusal := next(answers):
            time.sleep(0.5)
            raise refusal
        return "done"

    with closing(connection.Connections(["127.0.0.1:1"], 0.4, None, None)) as connections:
        assert connections.call(ask) == "done"


def test_a_full_sidecar_is_left_for_one_that_has_room(serving):
    (full, port), (idle, other_port) = serving(Limits(max_calls=1)), serving()
    clips, truth = [moving_shapes(1, seed=seed) for seed in range(4)], np.ones((1, HEIGHT, WIDTH), bool)
    address = f"127.0.0.1:{port}"
    with TrackerClient([address]) as first, TrackerClient([address, f"127.0.0.1:{other_port}"]) as client:
        first.info()
        client.info()
        with full.engine.turns.arrive().turn():  # for as long as we want
            busy = first.score_async(clips[0], [(0, BOX)], truth)
            until(lambda: full.calls == 1)
            for clip in clips[1:]:  # some of which would go to the full one
                assert client.score(clip, [(0, BOX)], truth).j.shape == (1,)
            assert idle.engine.misses == 3 and full.calls == 1
        busy.result(300)


def test_a_full_sidecar_is_given_time_though_another_is_away(serving, monkeypatch):
    service, port = serving(Limits(max_calls=1))
    monkeypatch.setattr(connection, "LEFT_OUT_SECONDS", 0.1)
    hints, read = [], connection.retry_hint
    monkeypatch.setattr(connection, "retry_hint", lambda error: hints.append(read(error)) or hints[-1])
    clip, truth = moving_shapes(1), np.ones((1, HEIGHT, WIDTH), bool)
    with TrackerClient([f"127.0.0.1:{port}"]) as first:
        first.info()
        with (
            TrackerClient([f"127.0.0.1:{port}", "127.0.0.1:1"], patience_seconds=3.0) as client,
            service.engine.turns.arrive().turn(),
        ):
            busy = first.score_async(clip, [(0, BOX)], truth)
            until(lambda: service.calls == 1)
            with pytest.raises(SidecarAway):
                client.score(clip, [(0, BOX)], truth)
            assert 3 < len(hints) < 40  # refused by either; without a pause it is thousands
        busy.result(300)


def calls(log: Path) -> list[dict]:
    """What a sidecar has logged of the calls it took."""
    lines = map(json.loads, log.read_text().splitlines())
    return [line for line in lines if line["event"] == "call"]


def test_a_sidecar_that_comes_back_is_asked_again(checkpoint, config, tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "LEFT_OUT_SECONDS", 0.1)
    logs = [tmp_path / "first", tmp_path / "second"]

    def start(number: int, port: int = 0):
        with open(logs[number], "a") as log:
            return start_sidecar(checkpoint, config, port, log=log)

    def logged(counts: list[int]) -> None:
        until(lambda: [len(calls(log)) for log in logs] == counts)  # a line follows its answer

    def clips_of(log: Path) -> set[str]:
        return {call["clip"] for call in calls(log)}

    sidecars = [start(number) for number in range(2)]
    try:
        with TrackerClient([f"127.0.0.1:{port}" for _, port in sidecars], patience_seconds=300) as client:
            clips = [moving_shapes(1, seed=seed) for seed in range(4)]
            for clip in clips:  # in turn, each put there, then tracked
                client.track(clip, [(0, BOX)])
            logged([4, 4])
            held = list(map(clips_of, logs))
            assert [len(ids) for ids in held] == [2, 2] and not held[0] & held[1]
            for clip in reversed(clips):  # and where they went before
                client.track(clip, [(0, BOX)])
            logged([6, 6])
            assert list(map(clips_of, logs)) == held
            mine = next(clip for clip in clips if clip_upload(clip, 128).header.clip_id in held[0])
            expected = client.track(mine, [(0, BOX)])
            logged([7, 6])
            process, port = sidecars[0]
            process.kill()
            process.wait()
            np.testing.assert_array_equal(client.track(mine, [(0, BOX)]), expected)
            logged([7, 8])
            assert [call["method"] for call in calls(logs[1])[-2:]] == ["PutClip", "Track"]
            sidecars[0] = start(0, port)
            until(lambda: (client.track(mine, [(0, BOX)]) == expected).all() and len(calls(logs[0])) > 7)
    finally:
        for process, _ in sidecars:
            process.kill()
            process.wait()


def test_what_fails_at_one_sidecar_is_tried_once_at_another(serving, monkeypatch):
    """Out of memory, say, or too slow for the deadline. When the other fails as well, training is to save and stop."""
    (one, port), (other, other_port) = serving(), serving()
    endpoints, tried = [f"127.0.0.1:{port}", f"127.0.0.1:{other_port}"], []
    clip, truth = moving_shapes(1), np.ones((1, HEIGHT, WIDTH), bool)
    for service in (one, other):
        service.watchers = [lambda call, service=service: tried.append((call.method, service))]

    def out_of_memory(*_):
        raise RuntimeError("CUDA out of memory")

    with TrackerClient(endpoints) as client, TrackerClient(endpoints[:1]) as alone:
        expected = client.track(clip, [(0, BOX)])
        home, another = (one, other) if one.engine.misses else (other, one)
        monkeypatch.setattr(home.engine, "track", out_of_memory)
        np.testing.assert_array_equal(client.track(clip, [(0, BOX)]), expected)
        monkeypatch.setattr(another.engine, "track", out_of_memory)
        del tried[:]
        with pytest.raises(SidecarAway, match="failed: INTERNAL RuntimeError: CUDA out of memory"):
            client.score(clip, [(0, BOX)], truth)
        assert sorted(service is home for method, service in tried if method == "Score") == [False, True]
        with pytest.raises(SidecarAway, match="failed: INTERNAL RuntimeError: CUDA out of memory"):
            alone.track(clip, [(0, BOX)])
        monkeypatch.undo()
        client._deadline = 1.0
        with one.engine.turns.arrive().turn(), other.engine.turns.arrive().turn():
            with pytest.raises(SidecarAway, match="did not answer in time"):
                client.track(clip, [(0, BOX)])
            assert one.calls == other.calls == 1
        client._deadline = 120.0
        np.testing.assert_array_equal(client.track(clip, [(0, BOX)]), expected)


def test_slow_callers_keep_nobody_waiting(serving):
    """One stops in the middle of sending a clip, one takes no masks; a third gets its answers."""
    service, port = serving()
    clip, prompts = moving_shapes(11), some_prompts(12, 11)
    upload = clip_upload(clip, service.engine.image_size)
    with TrackerClient([f"127.0.0.1:{port}"]) as client:
        expected = client.track(clip, prompts[:1])
        with slow_channel(f"127.0.0.1:{port}") as slow:
            stub, go_on = tracker_pb2_grpc.TrackerStub(slow), threading.Event()

            def half_a_clip():
                messages = list(upload.messages())
                yield from messages[:5]
                go_on.wait()
                yield from messages[5:]

            sending = stub.PutClip.future(half_a_clip())
            masks = stub.Track(track_request(upload, prompts))
            until(lambda: service.calls == 2)
            until(lambda: len(service.engine.turns) == 0)
            np.testing.assert_array_equal(client.track(clip, prompts[:1]), expected)
            assert service.calls == 2  # both are still there
            go_on.set()
            assert sending.result(300).clip_held
            assert sum(len(reply.masks) for reply in masks) == 12 * 11
    until(lambda: service.calls == 0)


def test_a_caller_that_has_gone_costs_no_further_step(serving):
    """Nor when a long clip's last frame is asked for, and no mask is sent for a long time."""
    service, port = serving()
    clip, asked, endings = moving_shapes(300, 8, 8), [], []
    service.watchers = [lambda call: endings.append((call.method, call.code))]
    with pytest.raises(CallerGone):
        for _ in service.engine.track(stored(clip), [(0, BOX)], [299], lambda: asked.append(0) or len(asked) < 3):
            pass
    assert len(asked) == 3
    encoded, upload = service.engine.misses, clip_upload(clip, service.engine.image_size)
    request = track_request(upload, [(0, (1.0, 1.0, 7.0, 7.0))])
    request.frames.append(299)
    with TrackerClient([f"127.0.0.1:{port}"]) as client:
        endpoint = client._connections.endpoints[0]
        endpoint.put(upload, 60.0)
        with service.engine.turns.arrive().turn():
            calls = [endpoint.stub.Track(request), endpoint.stub.Track(request)]
            until(lambda: len(service.engine.turns) == 2)
            for call in calls:
                call.cancel()
        until(lambda: len(endings) == 3)
    assert service.engine.misses < encoded + 284
    assert endings[1:] == [("Track", "CANCELLED")] * 2


def test_all_sidecars_are_kept_busy(serving):
    (one, port), (other, other_port) = serving(), serving()
    clips, truth = [moving_shapes(1, seed=seed) for seed in range(8)], np.ones((1, HEIGHT, WIDTH), bool)
    with TrackerClient([f"127.0.0.1:{port}", f"127.0.0.1:{other_port}"]) as client:
        client.info()
        with one.engine.turns.arrive().turn(), other.engine.turns.arrive().turn():
            scores = [client.score_async(clip, [(0, BOX)], truth) for clip in clips]
            until(lambda: [len(service.engine.turns) for service in (one, other)] == [4, 4])
        assert all(score.result(300).j.shape == (1,) for score in scores)
        clips = [moving_shapes(1, seed=seed) for seed in range(8, 12)]  # new ones, which go to the sidecars in turn
        with one.engine.turns.arrive().turn(), other.engine.turns.arrive().turn(), tracking_threads(client) as pool:
            masks = pool.map(lambda clip: client.track(clip, [(0, BOX)]), clips)
            until(lambda: [len(service.engine.turns) for service in (one, other)] == [2, 2])
        assert len(list(masks)) == 4


def test_threads_that_are_left_early_begin_nothing_new():
    begun, go_on = [], threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        go_on.wait(5)

    with pytest.raises(KeyError), tracking_threads(None) as pool:
        pool.map(work, range(4))
        until(lambda: len(begun) == 2)
        raise KeyError
    assert begun == [0, 1]
    go_on.set()


class Ended(TrackerClient):
    """Notes how many of its calls have ended."""

    calls = 0

    def track(self, *arguments):
        try:
            return super().track(*arguments)
        finally:
            self.calls += 1


def test_an_evaluation_that_is_left_waits_for_no_tracker(serving, tmp_path, monkeypatch):
    """SIGTERM while the model is busy with somebody else."""
    service, port = serving()
    prepare_synthetic(tmp_path / "clips", "easy", 0, 6, seed=1, progress=False)
    source = ClipSource([tmp_path / "clips"], "test")
    config = load_config(Path(__file__).parents[1] / "configs/demo.yaml", ["run.dir=.", "data.test_clips=6"])
    turn1, turn2 = Turn1(True, 0, "it", 1.0, ""), Turn2(True, BOX, 1.0, "")

    def answers(engine, params, source, chosen, chain):  # what a policy would say
        clips = [source[int(i)] for i in chosen]
        batch = stack([make_example(clip, i, chain) for i, clip in zip(chosen, clips, strict=True)])
        yield clips, batch, [Rollout("", "", turn1, turn2, (5.0, 5.0, 50.0, 50.0), False, 9)] * len(clips)

    def terminate() -> None:
        until(lambda: len(service.engine.turns) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(held_out, "answers", answers)
    loaded = load_engine(config)
    with Ended([f"127.0.0.1:{port}"], deadline_seconds=10) as client, heed_sigterm() as interruption:
        with service.engine.turns.arrive().turn():
            threading.Thread(target=terminate).start()
            with pytest.raises(Interrupted), interruption.at_once():
                held_out.evaluate_policy(loaded.greedy, None, source, config, client, "it")
            assert client.calls == 0
