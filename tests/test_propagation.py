"""Prompts tracked together, against the sam2 package's own predictor, and the features behind them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sam2
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from sam2.modeling.position_encoding import PositionEmbeddingSine
from tracker_setup import (
    BOX,
    FRAMES,
    HEIGHT,
    WIDTH,
    assert_same,
    jpegs,
    moving_shapes,
    some_prompts,
    stock_logits,
    stored,
    tracked,
)

from revseg_jax.errors import InputError
from revseg_jax.tracker.engine import Engine
from revseg_jax.tracker.model import build_tracker
from revseg_jax.tracker.propagation import Chain, plan, propagate

pytest_plugins = ["tracker_fixtures"]


@settings(deadline=None)
@given(total=st.integers(1, 30), data=st.data(), reach=st.integers(0, 8))
def test_a_chain_visits_each_frame_once_and_remembers_what_sam2_looks_up(total, data, reach):
    keyframe = data.draw(st.integers(0, total - 1))
    chain = Chain(keyframe, total - 1 - keyframe, keyframe)
    assert [chain.frame(s) for s in range(len(chain))] == [*range(keyframe, total), *range(keyframe - 1, -1, -1)]
    visited: dict[int, int] = {}  # frame -> step, without the keyframe, as in sam2's non_cond_frame_outputs
    asked = set()
    for step in range(len(chain)):
        frame = chain.frame(step)
        direction = -1 if step > chain.forward else 1
        if step:
            behind = ((d, frame - direction * d) for d in range(reach, 0, -1))
            expected = [(d, visited[f]) for d, f in behind if f in visited]
            assert chain.sources(step, reach) == expected
            asked |= {0, *(source for _, source in expected)}
            visited[frame] = step
    assert [chain.asked_for(s, reach) for s in range(len(chain))] == [s in asked for s in range(len(chain))]


@settings(deadline=None)
@given(total=st.integers(1, 40), data=st.data())
def test_a_chain_for_some_frames_has_the_memories_of_the_whole(model, total, data):
    keyframe = data.draw(st.integers(0, total - 1))
    wanted = data.draw(st.sets(st.integers(0, total - 1), min_size=1))
    short, whole = plan(model, total, keyframe, sorted(wanted)), plan(model, total, keyframe)
    assert len(whole) == total
    visits = {short.frame(s): s for s in range(len(short))}
    assert wanted <= visits.keys()
    for frame in wanted - {keyframe}:
        full_step = next(s for s in range(len(whole)) if whole.frame(s) == frame)
        for reach in (model.num_maskmem - 1, min(total, model.max_obj_ptrs_in_encoder) - 1):
            remembered = [(d, short.frame(s)) for d, s in short.sources(visits[frame], reach)]
            assert remembered == [(d, whole.frame(s)) for d, s in whole.sources(full_step, reach)]


def test_logits_are_those_of_the_stock_predictor(model, tmp_path):
    frames, prompts = jpegs(moving_shapes(FRAMES, seed=3)), some_prompts(5, FRAMES, seed=3)
    clip, engine = stored(frames), Engine(model)
    found = np.zeros((5, FRAMES, HEIGHT, WIDTH), np.float32)
    size = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    boxes = torch.tensor([box for _, box in prompts]) / size * model.image_size
    chains = [plan(model, FRAMES, keyframe) for keyframe, _ in prompts]
    for rows, at, logits in propagate(model, FRAMES, lambda f: engine._look_up(clip, f), chains, boxes):
        found[rows, at] = torch.nn.functional.interpolate(logits, (HEIGHT, WIDTH), mode="bilinear")[:, 0]
    expected = stock_logits(model, tmp_path, frames, prompts)
    np.testing.assert_allclose(found, expected, atol=3e-5, rtol=0)


def test_the_embedded_tracker_equals_the_stock_predictor(tmp_path):
    model, frames = build_tracker(), jpegs(moving_shapes(FRAMES))
    prompts = [
        (0, (2.0, 32.0, 38.0, 68.0)),
        (5, (47.0, 32.0, 83.0, 68.0)),
        (10, (92.0, 32.0, 128.0, 68.0)),
        *some_prompts(2, FRAMES),
    ]
    expected = stock_logits(model, tmp_path, frames, prompts)
    masks = tracked(Engine(model), stored(frames), prompts)
    assert_same(masks, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sam2", "sam2.1"])  # they differ in what is remembered, and how
def test_published_architectures_equal_the_stock_predictor(family, tmp_path):
    tree = OmegaConf.load(Path(sam2.__file__).parent / f"configs/{family}/{family}_hiera_t.yaml")
    tree.model.image_size = 128
    OmegaConf.save(tree, tmp_path / "config.yaml")
    torch.manual_seed(0)
    model, frames = build_tracker(tmp_path / "config.yaml", None), jpegs(moving_shapes(8))
    with torch.no_grad():
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias += 1  # present, or there is nothing to compare
        model.maskmem_tpos_enc *= 20
    prompts = [(0, BOX), (6, (40.0, 10.0, 99.0, 80.0))]
    expected = stock_logits(model, tmp_path, frames, prompts)
    masks = tracked(Engine(model), stored(frames), prompts)
    assert_same(masks, expected)
    assert 0.01 < masks.mean() < 0.99


def test_large_batches_are_split(model):
    """More prompts than go through the model together give what they give alone."""
    clip, prompts, engine = stored(moving_shapes(4)), some_prompts(7, 4), Engine(model)
    whole = tracked(engine, clip, prompts)
    engine.prompts_together = 3
    assert max(len(which) for which, *_ in engine.track(clip, prompts)) == 3
    assert (tracked(engine, clip, prompts) != whole).sum() <= 3


def test_features_are_computed_once_a_frame_within_the_limit(model, monkeypatch):
    clip, seen = stored(moving_shapes(12)), []
    forward = model.forward_image
    monkeypatch.setattr(model, "forward_image", lambda images: seen.append(len(images)) or forward(images))
    engine = Engine(model)
    first = [masks for *_, masks in engine.track(clip, some_prompts(2, 12))]
    assert sum(seen) == 12
    list(engine.track(clip, some_prompts(3, 12, seed=9)))
    assert sum(seen) == 12
    a_frame = engine.features.device_bytes // 12
    small = Engine(model, feature_bytes=4 * a_frame)
    small.frames_together = 2
    again = []
    for *_, masks in small.track(clip, some_prompts(2, 12)):
        again.append(masks)
        assert small.features.device_bytes <= 4 * a_frame
    assert sum(seen) > 12 + 12
    assert all((a != b).sum() <= 3 for a, b in zip(first, again, strict=True))


def test_features_that_leave_the_device_come_back_from_the_host(model, monkeypatch):
    clip, prompts, seen = stored(moving_shapes(12)), some_prompts(2, 12), []
    forward = model.forward_image
    monkeypatch.setattr(model, "forward_image", lambda images: seen.append(len(images)) or forward(images))
    engine = Engine(model)
    whole = tracked(engine, clip, prompts)
    a_frame = engine.features.device_bytes // 12
    engine, seen[:] = Engine(model, feature_bytes=2 * a_frame, host_feature_bytes=10 * a_frame), []
    engine.frames_together = 2
    for _ in range(2):
        assert (tracked(engine, clip, prompts) != whole).sum() <= 3
        assert (engine.features.device_bytes, engine.features.host_bytes) == (2 * a_frame, 10 * a_frame)
    assert sum(seen) == 12 and engine.misses == 12
    engine = Engine(model, feature_bytes=2 * a_frame, host_feature_bytes=3 * a_frame)
    engine.frames_together = 2
    tracked(engine, clip, prompts)
    assert engine.features.host_bytes == 3 * a_frame and engine.misses > 12  # too few for the way back


def test_bfloat16_and_a_compiled_encoder_give_nearly_the_same(model, monkeypatch):
    """As on a GPU, but on the CPU and through the compiler's front half only."""
    clip, prompts, compile_ = stored(moving_shapes(5)), some_prompts(3, 5), torch.compile
    whole, shapes, graphs = tracked(Engine(model), clip, prompts), [], []
    monkeypatch.setattr(model.image_encoder, "forward", model.image_encoder.forward)  # put back afterwards

    def compile_front(function, **options):
        encode = compile_(function, backend=lambda graph, _: graphs.append(graph) or graph.forward, **options)
        return lambda images: shapes.append(tuple(images.shape)) or encode(images)

    monkeypatch.setattr(torch, "compile", compile_front)
    engine = Engine(model, compiled=True)
    engine.frames_together = 4
    for module in model.modules():
        if isinstance(module, PositionEmbeddingSine):
            module.cache.clear()  # as it is where no image came yet
    engine.warm_up()
    warm = len(graphs)
    assert (tracked(engine, clip, prompts) != whole).sum() <= 3 and len(graphs) == warm > 0
    assert len(shapes) == 4 and set(shapes) == {(4, 3, 128, 128)}  # also for the last frame, alone in its block

    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda images: 1 / 0)
    engine = Engine(model, compiled=True)
    assert engine.warm_up() == "division by zero" and not engine.compiled  # as where no C compiler is
    assert (tracked(engine, clip, prompts) != whole).sum() <= 3

    engine = Engine(model)
    engine.half = True
    rough = tracked(engine, clip, prompts)
    assert next(iter(engine.features._here.held.values()))[0].dtype == torch.bfloat16
    assert 0 < (rough != whole).mean() < 0.05 and (rough & whole).sum() > 0.8 * (rough | whole).sum()


def test_a_config_that_tracks_otherwise_is_refused(model, monkeypatch):
    monkeypatch.setattr(model, "memory_temporal_stride_for_eval", 2)
    with pytest.raises(InputError, match="memory_temporal_stride_for_eval"):
        Engine(model)
