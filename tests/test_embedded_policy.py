"""The policy that ships: what it knows, and that it knows it from looking."""

import numpy as np
import pytest

from revseg_jax.policy.checkpoint import load_policy
from revseg_jax.pretraining.examples import ExampleMaker
from revseg_jax.pretraining.naming import naming_accuracy

CLIPS = 60
KINDS = ("motion", "reasoning", "referring")


@pytest.fixture(scope="module")
def embedded():
    return load_policy("embedded")


@pytest.fixture(scope="module")
def maker(embedded):
    return ExampleMaker(embedded.tokenizer, embedded.policy.config, embedded.chain, "easy", (0, 0, 0, 1), 64, seed=4321)


def test_it_knows_what_queries_mean(embedded, maker):
    right = naming_accuracy(embedded.policy, maker, CLIPS)
    assert set(right) == set(KINDS)
    assert right["referring"] > 0.95 and right["motion"] > 0.45


def test_with_blank_frames_it_guesses(embedded, maker):
    """Three objects in a scene: one in three is right by chance. About 170 questions of a kind: deviation 0.04."""
    right = naming_accuracy(embedded.policy, maker, CLIPS, blank=True)
    assert np.abs(np.array([right["motion"], right["reasoning"]]) - 1 / 3).max() < 0.17
