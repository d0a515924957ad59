"""The policy that ships: what it knows, and that it knows it from looking."""

import pytest

from revseg_jax.policy.checkpoint import load_policy
from revseg_jax.pretraining.choices import biggest_accuracy, naming_accuracy
from revseg_jax.pretraining.examples import ExampleMaker

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


def test_it_tells_the_frame_in_which_an_object_is_biggest(embedded, maker):
    """One in eight is right by chance, a few more where two frames show it equally large."""
    assert biggest_accuracy(embedded.policy, maker, 24) > 0.7
