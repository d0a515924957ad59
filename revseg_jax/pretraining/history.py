"""What a scene's objects have done so far, and which questions each of them answers: labels for the visual tokens.

Without them a decoder of this size does not learn within an hour what "the one that moves fastest" means: the words are
too few to teach it to follow things over time.
"""

from __future__ import annotations

import numpy as np

from revseg_jax.data.synthetic.queries import TEMPLATES
from revseg_jax.pretraining.primitives import View

FACTS = 8  # of `track_facts`
SPEED_UNIT = 0.1  # speeds are told in this share of the image's side a frame


def track_facts(seen: View) -> np.ndarray:
    """float64 [N, K, FACTS] at each sampled frame, of the clip up to it, for attention is causal: velocity x, y;
    displacement x, y since the first frame inside, as shares of the image's side; mean speed; the first frame inside as
    a share of the clip; logarithm of the growth since then; largest share that the wall has hidden."""
    tracks, total = seen.scene.tracks, len(seen.scene.frames)
    inside = seen.scene.drawing.footprint > 0
    first = np.where(inside.any(0), inside.argmax(0), 0)  # [K]
    objects, times = np.arange(len(first)), np.arange(total)[:, None]
    steps = np.diff(tracks.centres, axis=0, prepend=tracks.centres[:1]) / seen.size / SPEED_UNIT  # [T, K, 2]
    travelled = (np.sqrt((steps**2).sum(-1)) * (times > first)).cumsum(0)
    facts = [
        *np.moveaxis(steps, -1, 0),
        *np.moveaxis((tracks.centres - tracks.centres[first, objects]) / seen.size, -1, 0),
        travelled / np.maximum(times - first, 1),
        np.broadcast_to(first / total, inside.shape),
        np.log(tracks.radii / tracks.radii[first, objects]),
        np.maximum.accumulate(seen.scene.drawing.behind_wall, axis=0),
    ]
    return np.stack(facts, -1)[seen.sampled]


def template_answers(seen: View) -> np.ndarray:
    """int [K, templates]: 1 where a template's query means the object, 0 where another one, -1 where it is not asked.

    Templates that mention a second object are never asked: their answer depends on what is mentioned.
    """
    answers, columns = np.full((len(seen.names), len(TEMPLATES)), -1), list(TEMPLATES)
    for expression in seen.scene.expressions:
        if expression.template in TEMPLATES and expression.mentions is None:
            answers[:, columns.index(expression.template)] = np.arange(len(seen.names)) == expression.target
    return answers
