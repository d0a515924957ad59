"""Expressions about a scene. Each template looks for its one target in the exact tracks and asks only when it is clear.

A template is a function (facts) -> list of (target, mentioned object or None). It returns nothing when the target
is not unique or wins by less than a clear margin: a query with two defensible answers is never asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from revseg_jax.data.sampling import sample_frames
from revseg_jax.data.synthetic.motion import Tracks

MARGIN = 1.5  # the winner of a comparison beats the second by this factor (in area: its square, for sizes)
SIZE_MARGIN = 1.25  # on radii, so 1.56 in area
HIDDEN = 0.9  # share of an object that the wall must cover for it to count as hidden; up to 0.3 it is in full view
TURN = math.radians(40)  # smallest visible change of direction
SHOWN = 8  # a target must be clear in LEAST_CLEAR of this many uniformly sampled frames
LEAST_CLEAR = 3
CLEAR = 0.7  # visible pixels in units of the squared radius; a whole object has 2.2 to 3.3


@dataclass(frozen=True)
class Expression:
    query: str
    kind: str  # referring | motion | reasoning
    template: str
    target: int  # index of the object
    mentions: int | None = None  # index of the object that the query names beside the target


@dataclass(frozen=True)
class Facts:
    """What templates look at; K objects, T frames, pixels and frames as units."""

    names: tuple[tuple[str, str], ...]  # (colour, shape)
    tracks: Tracks
    size: int
    inside: np.ndarray  # bool [T, K], some part of the object is inside the frame (hidden or not)
    visible: np.ndarray  # bool [T, K], at least one pixel can be seen
    clear: np.ndarray  # bool [T, K], a good part of the object can be seen
    behind_wall: np.ndarray  # float64 [T, K]
    speeds: np.ndarray  # float64 [K], mean over the frames inside
    net: np.ndarray  # float64 [K, 2], displacement between the first and the last frame inside
    peak: np.ndarray  # float64 [K], largest radius among the frames inside
    typical: np.ndarray  # float64 [K], mean radius over the frames inside


def gather_facts(names, tracks: Tracks, size: int, footprint, masks, behind_wall) -> Facts:
    """`footprint` int [T, K], `masks` bool [T, K, H, W], `behind_wall` float [T, K] as drawing.Drawing has them."""
    inside = footprint > 0
    count = len(names)
    speeds, net, peak, typical = np.zeros(count), np.zeros((count, 2)), np.zeros(count), np.zeros(count)
    for k in range(count):
        frames = np.flatnonzero(inside[:, k])
        if len(frames) < 2:
            continue
        path = tracks.centres[frames[0] : frames[-1] + 1, k]
        speeds[k] = np.sqrt((np.diff(path, axis=0) ** 2).sum(1)).mean()
        net[k] = path[-1] - path[0]
        peak[k], typical[k] = tracks.radii[frames, k].max(), tracks.radii[frames, k].mean()
    pixels = masks.sum((2, 3))
    clear = pixels > CLEAR * tracks.radii**2
    return Facts(names, tracks, size, inside, pixels > 0, clear, behind_wall, speeds, net, peak, typical)


# --- motion ----------------------------------------------------------------------------------------------------------


def _best(values, margin: float) -> list[tuple[int, None]]:
    """The largest of the values when it is at least `margin` times the second."""
    order = np.argsort(values)
    if len(values) < 2 or values[order[-1]] < margin * max(values[order[-2]], 1e-9):
        return []
    return [(int(order[-1]), None)]


def fastest(facts: Facts):
    return _best(facts.speeds, MARGIN) if facts.speeds.max() > 0.012 * facts.size else []


def slowest_mover(facts: Facts):
    """Everything moves, one thing much more slowly than the rest."""
    if facts.speeds.min() < 0.004 * facts.size:
        return []
    return _best(1 / facts.speeds, MARGIN)


def never_moves(facts: Facts):
    still = facts.speeds == 0
    others_move = (facts.speeds[~still] > 0.006 * facts.size).all()
    return [(int(np.argmax(still)), None)] if still.sum() == 1 and others_move and facts.inside.all(0)[still] else []


def _entries(facts: Facts) -> np.ndarray:
    """First frame inside for each object, 0 for those there from the start; the wall does not count."""
    return np.where(facts.inside.any(0), facts.inside.argmax(0), 0)


def _exits(facts: Facts) -> np.ndarray:
    """Frames between the last frame inside and the end of the clip, for each object."""
    return np.where(facts.inside.any(0), facts.inside[::-1].argmax(0), 0)


def _latest(times: np.ndarray, total: int) -> list[tuple[int, None]]:
    order = np.argsort(times)
    gap = times[order[-1]] - times[order[-2]]
    return [(int(order[-1]), None)] if len(times) > 1 and gap >= max(2, total / 8) else []


def _earliest(times: np.ndarray, total: int) -> list[tuple[int, None]]:
    """First among at least two that happen at all (time > 0)."""
    happening = np.flatnonzero(times > 0)
    if len(happening) < 2:
        return []
    order = happening[np.argsort(times[happening])]
    return [(int(order[0]), None)] if times[order[1]] - times[order[0]] >= max(2, total / 8) else []


def enters_last(facts: Facts):
    return _latest(_entries(facts), len(facts.inside))


def enters_first(facts: Facts):
    return _earliest(_entries(facts), len(facts.inside))


def leaves_first(facts: Facts):
    return _latest(_exits(facts), len(facts.inside))


def leaves_last(facts: Facts):
    """Last to leave among at least two that leave."""
    return _earliest(_exits(facts), len(facts.inside))


def bounces(facts: Facts):
    """Exactly one object is reflected by the border, well inside the clip and at a visible speed."""
    total = len(facts.inside)
    who = {index for _, index in facts.tracks.bounces}
    if len(who) != 1:
        return []
    target = who.pop()
    clear = any(0.15 * total < time < 0.8 * total for time, _ in facts.tracks.bounces)
    return [(target, None)] if clear and facts.speeds[target] > 0.015 * facts.size else []


def _moves_towards(axis: int, sign: int):
    def template(facts: Facts):
        along, aside = sign * facts.net[:, axis], np.abs(facts.net[:, 1 - axis])
        order = np.argsort(along)
        clear = along[order[-1]] > 0.22 * facts.size and along[order[-2]] < 0.08 * facts.size
        return [(int(order[-1]), None)] if clear and aside[order[-1]] < 0.7 * along[order[-1]] else []

    return template


def _ends_larger(sign: int):
    def template(facts: Facts):
        if not facts.inside[[0, -1]].all():
            return []
        change = sign * np.log(facts.tracks.radii[-1] / facts.tracks.radii[0])
        order = np.argsort(change)
        clear = change[order[-1]] > math.log(1.5) and change[order[-2]] < math.log(1.1)
        return [(int(order[-1]), None)] if clear else []

    return template


# --- reasoning -------------------------------------------------------------------------------------------------------


def _collisions(facts: Facts):
    """(contact, struck object 0/1 of it) for collisions that are the only ones, seen, and well inside the clip."""
    contacts, total = facts.tracks.contacts, len(facts.inside)
    if len(contacts) != 1:
        return
    frame = math.floor(contacts[0].time + 0.5)
    seen = facts.visible[max(frame - 1, 0) : frame + 2, list(contacts[0].objects)].all()
    if seen and 0.15 * total < contacts[0].time < 0.8 * total:
        yield from ((contacts[0], struck) for struck in (0, 1))


def _angle(u, v) -> float:
    return abs(math.remainder(math.atan2(u[1], u[0]) - math.atan2(v[1], v[0]), 2 * math.pi))


def turns(facts: Facts):
    """What makes the mentioned object change direction: both moved before, and the mentioned one turns clearly."""
    bounced = {index for _, index in facts.tracks.bounces}
    for contact, struck in _collisions(facts):
        before, after = contact.before[struck], contact.after[struck]
        fast = min(math.hypot(*before), math.hypot(*after)) > 0.008 * facts.size
        if fast and _angle(before, after) > TURN and contact.objects[struck] not in bounced:
            yield contact.objects[1 - struck], contact.objects[struck]


def sets_moving(facts: Facts):
    """What pushes the mentioned object, which rested until then."""
    for contact, struck in _collisions(facts):
        if contact.before[struck] == (0.0, 0.0) and math.hypot(*contact.after[struck]) > 0.01 * facts.size:
            yield contact.objects[1 - struck], contact.objects[struck]


def is_pushed(facts: Facts):
    """What the mentioned object sets in motion."""
    return [(pushed, pusher) for pusher, pushed in sets_moving(facts)]


def stops(facts: Facts):
    """What brings the mentioned object to rest (a push played backwards)."""
    for contact, struck in _collisions(facts):
        if contact.after[struck] == (0.0, 0.0) and math.hypot(*contact.before[struck]) > 0.01 * facts.size:
            yield contact.objects[1 - struck], contact.objects[struck]


def _largest_of(facts: Facts, members: np.ndarray, rivals: np.ndarray):
    """The largest of the members, in its largest moment and on the whole; rivals may or may not belong: all smaller."""
    members = np.flatnonzero(members)
    if len(members) < 2:
        return []
    best = members[np.argmax(facts.peak[members])]
    others = [k for k in np.flatnonzero(rivals) if k != best]
    clear = all(values[best] >= SIZE_MARGIN * values[others].max() for values in (facts.peak, facts.typical))
    return [(int(best), None)] if clear else []


def hidden_alone(facts: Facts):
    """One thing passes behind the wall; the others stay clear of it."""
    cover = facts.behind_wall.max(0)
    return [(int(cover.argmax()), None)] if (cover > HIDDEN).sum() == 1 and (cover > 0.3).sum() == 1 else []


def hidden_largest(facts: Facts):
    cover = facts.behind_wall.max(0)
    return _largest_of(facts, cover > HIDDEN, cover > 0.3)


def moving_largest(facts: Facts):
    """Something rests and at least two things move: the size of the resting one does not matter."""
    moving = facts.speeds > 0.008 * facts.size
    return _largest_of(facts, moving, facts.speeds > 0) if (facts.speeds == 0).any() else []


def moving_smallest(facts: Facts):
    moving = facts.speeds > 0.008 * facts.size
    if not (facts.speeds == 0).any() or moving.sum() < 2 or (moving != (facts.speeds > 0)).any():
        return []
    order = np.flatnonzero(moving)
    order = order[np.argsort(facts.peak[order])]
    clear = all(v[order[1:]].min() >= SIZE_MARGIN * v[order[0]] for v in (facts.peak, facts.typical))
    return [(int(order[0]), None)] if clear else []


# template name: (kind, finder, phrasings); {other} is the mentioned object.
TEMPLATES = {
    "fastest": (
        "motion",
        fastest,
        ("the one that moves fastest", "the fastest object", "which thing moves the fastest?"),
    ),
    "slowest_mover": ("motion", slowest_mover, ("the one that moves slowest", "the slowest object")),
    "never_moves": (
        "motion",
        never_moves,
        ("the one that never moves", "the object that stays still", "what does not move?"),
    ),
    "enters_last": ("motion", enters_last, ("the one that enters last", "the last object to come into view")),
    "enters_first": ("motion", enters_first, ("the one that enters first", "the first object to come into view")),
    "leaves_first": ("motion", leaves_first, ("the one that leaves first", "the first object to go out of view")),
    "leaves_last": ("motion", leaves_last, ("the one that leaves last", "the last object to go out of view")),
    "bounces": (
        "motion",
        bounces,
        ("the one that bounces off the border", "what bounces off the edge of the picture?"),
    ),
    "moves_left": ("motion", _moves_towards(0, -1), ("the one that moves to the left", "the object going left")),
    "moves_right": ("motion", _moves_towards(0, 1), ("the one that moves to the right", "the object going right")),
    "moves_up": ("motion", _moves_towards(1, -1), ("the one that moves up", "the object going up")),
    "moves_down": ("motion", _moves_towards(1, 1), ("the one that moves down", "the object going down")),
    "grows": ("motion", _ends_larger(1), ("the one that ends larger than it begins", "which object grows?")),
    "shrinks": ("motion", _ends_larger(-1), ("the one that ends smaller than it begins", "which object shrinks?")),
    "turns": (
        "reasoning",
        turns,
        ("which object makes the {other} change direction?", "what does the {other} bounce off?"),
    ),
    "sets_moving": ("reasoning", sets_moving, ("which object makes the {other} move?", "what pushes the {other}?")),
    "is_pushed": (
        "reasoning",
        is_pushed,
        ("which object does the {other} push?", "what does the {other} set in motion?"),
    ),
    "stops": ("reasoning", stops, ("which object makes the {other} stop?", "what brings the {other} to rest?")),
    "hidden_alone": (
        "reasoning",
        hidden_alone,
        ("the thing hidden by the wall at some time", "which object passes behind the wall?"),
    ),
    "hidden_largest": (
        "reasoning",
        hidden_largest,
        ("the largest thing hidden by the wall at some time", "the biggest object that passes behind the wall"),
    ),
    "moving_largest": (
        "reasoning",
        moving_largest,
        ("the largest thing that moves", "the biggest of the moving objects"),
    ),
    "moving_smallest": (
        "reasoning",
        moving_smallest,
        ("the smallest thing that moves", "the smallest of the moving objects"),
    ),
}
REFERRING = ("the {colour} {shape}", "the {shape} that is {colour}", "find the {colour} {shape}")
BY_COLOUR = ("the {colour} object", "the thing that is {colour}")
BY_SHAPE = ("the {shape}", "the only {shape}")


def ask(rng: np.random.Generator, facts: Facts) -> tuple[Expression, ...]:
    """All expressions of a scene whose targets are clear and visible often enough."""
    wanted = facts.clear[sample_frames(len(facts.clear), SHOWN)].sum(0) >= LEAST_CLEAR
    expressions = []
    for k, (colour, shape) in enumerate(facts.names):
        choices = [("referring", REFERRING)]
        if sum(colour == other for other, _ in facts.names) == 1:
            choices.append(("referring_colour", BY_COLOUR))
        if sum(shape == other for _, other in facts.names) == 1:
            choices.append(("referring_shape", BY_SHAPE))
        template, phrasings = choices[rng.integers(len(choices))]
        query = phrasings[rng.integers(len(phrasings))].format(colour=colour, shape=shape)
        if wanted[k]:
            expressions.append(Expression(query, "referring", template, k))
    for template, (kind, find, phrasings) in TEMPLATES.items():
        for target, other in find(facts):
            query = phrasings[rng.integers(len(phrasings))]
            if other is not None:
                query = query.format(other=" ".join(facts.names[other]))
            if wanted[target]:
                expressions.append(Expression(query, kind, template, int(target), other))
    return tuple(expressions)
