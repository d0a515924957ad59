"""The policy that ships: what it knows, and that it knows it from looking."""

from dataclasses import replace
from pathlib import Path

import pytest

from revseg_jax.config import load_config
from revseg_jax.data.source import ClipSource
from revseg_jax.data.synthetic_builder import prepare_synthetic
from revseg_jax.evaluation.held_out import evaluate_policy
from revseg_jax.policy.checkpoint import load_policy
from revseg_jax.pretraining.choices import biggest_accuracy, naming_accuracy
from revseg_jax.pretraining.examples import ExampleMaker
from revseg_jax.rollout.loading import load_engine

pytestmark = pytest.mark.usefixtures("optimised")
CLIPS = 60


@pytest.fixture(scope="module")
def embedded():
    return load_policy("embedded")


@pytest.fixture(scope="module")
def maker(embedded):
    return ExampleMaker(embedded.tokenizer, embedded.policy.config, embedded.chain, "easy", (0, 0, 0, 1), 64, seed=4321)


@pytest.fixture(scope="module")
def sighted(embedded, maker):
    return naming_accuracy(embedded.policy, maker, CLIPS)


def test_it_knows_what_queries_mean(sighted):
    assert set(sighted) == {"motion", "reasoning", "referring"}
    assert sighted["motion"] > 0.8 and sighted["reasoning"] > 0.7 and sighted["referring"] > 0.9


def test_with_blank_frames_it_guesses(embedded, maker, sighted):
    """Three objects in a scene: one in three is right by chance. Some 600 questions about motion: deviation 0.02.
    Reasoning often names one of the three in the question, so that two are left; some 140 questions: 0.04."""
    blank = naming_accuracy(embedded.policy, maker, 4 * CLIPS, blank=True)
    assert blank["motion"] == pytest.approx(1 / 3, abs=0.12)
    assert blank["reasoning"] < 0.55
    assert all(blank[kind] < sighted[kind] - 0.2 for kind in ("motion", "reasoning"))


@pytest.mark.parametrize("frames", [6, 8, 10])
def test_it_tells_the_frame_in_which_an_object_is_biggest(embedded, maker, frames):
    """One in `frames` is right by chance, a few more where two frames show it equally large."""
    maker = replace(maker, chain=replace(maker.chain, frames=frames))
    assert biggest_accuracy(embedded.policy, maker, 24) > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("frames", [6, 10])
def test_it_keeps_the_format_with_another_number_of_frames(tmp_path, frames):
    demo = Path(__file__).parents[1] / "configs" / "demo.yaml"
    config = load_config(demo, [f"chain.frames={frames}", "chain.turn1_tokens=64", f"run.dir={tmp_path}"])
    prepare_synthetic(tmp_path / "clips", "easy", 0, 16, seed=4321, progress=False)
    loaded, source = load_engine(config), ClipSource([tmp_path / "clips"], "test")
    evaluation, _ = evaluate_policy(loaded.greedy, (loaded.trained, loaded.frozen), source, config, None, "policy")
    assert evaluation.format > 0.9 and evaluation.turns > 1.9
