"""How objects move: straight lines, border bounces, elastic collisions, entering and leaving, and change of size.

Every object (or colliding pair) is anchored at a random moment and integrated from there both forwards and
backwards by laws that hold in both directions. With the final coin toss in `scene.render`, which plays half of the
clips backwards, clips are symmetric in time in distribution: no frame index is a better guess than its mirror image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from revseg_jax.data.synthetic.difficulty import Difficulty

SUBSTEPS = 8  # integration steps a frame


@dataclass(frozen=True)
class Wall:
    """A bar across the whole frame, in front of all objects. Covers start <= x < stop (y when horizontal), pixels."""

    horizontal: bool
    start: int
    stop: int


@dataclass(frozen=True)
class Contact:
    """An elastic collision of two objects; velocities are [2 objects][x, y] in pixels a frame."""

    time: float  # frames
    objects: tuple[int, int]
    before: tuple[tuple[float, float], tuple[float, float]]
    after: tuple[tuple[float, float], tuple[float, float]]

    def reversed(self, frames: int) -> Contact:
        def flip(velocities):
            return tuple((-x, -y) for x, y in velocities)

        return replace(self, time=frames - 1 - self.time, before=flip(self.after), after=flip(self.before))


@dataclass(frozen=True)
class Tracks:
    """The exact state of a scene at its T frames; lengths in pixels, (x, y) with pixel centres at +0.5."""

    centres: np.ndarray  # float64 [T, K, 2]
    radii: np.ndarray  # float64 [T, K]; nominal radius, see drawing.outline for what each shape makes of it
    angles: np.ndarray  # float64 [T, K], radians
    background: np.ndarray  # float64 [T, 2], offset of the background texture
    contacts: tuple[Contact, ...]
    bounces: tuple[tuple[float, int], ...]  # (time in frames, object) of reflections at the border

    def reversed(self) -> Tracks:
        frames = len(self.centres)
        return Tracks(
            self.centres[::-1],
            self.radii[::-1],
            self.angles[::-1],
            self.background[::-1],
            tuple(contact.reversed(frames) for contact in self.contacts[::-1]),
            tuple((frames - 1 - time, index) for time, index in self.bounces[::-1]),
        )


@dataclass
class _Body:
    """One object at its anchor. `bounded` says whether the border reflects it (before, after) the anchor."""

    index: int
    radius: float
    position: list[float]
    before: tuple[float, float]
    after: tuple[float, float]
    bounded: tuple[bool, bool] = (True, True)


def sample_wall(rng: np.random.Generator, difficulty: Difficulty) -> Wall | None:
    present, horizontal = rng.random() < difficulty.wall, rng.random() < 0.5
    thickness, middle = rng.uniform(0.2, 0.34) * difficulty.size, rng.uniform(0.3, 0.7) * difficulty.size
    return Wall(bool(horizontal), round(middle - thickness / 2), round(middle + thickness / 2)) if present else None


def simulate(rng: np.random.Generator, difficulty: Difficulty, frames: int, count: int, wall: Wall | None) -> Tracks:
    """Tracks of `count` objects over `frames` frames."""
    low, high = difficulty.diameter
    base = low * (high / low) ** rng.random(count) / 2
    # A sinusoid with a random phase is stationary: the frame of largest size is equally likely everywhere.
    time = np.arange(frames)[:, None]
    amplitude = rng.uniform(0.32, 0.58, count)
    period = max(frames, 2) * rng.uniform(0.8, 1.8, count)
    phase = rng.uniform(0, 2 * math.pi, count)
    middle = 0.5 * math.log(0.5 * 1.6)

    def radius_at(index: int, moment: float) -> float:
        swing = amplitude[index] * math.cos(2 * math.pi * moment / period[index] + phase[index])
        return base[index] * math.exp(middle + swing)

    radii = base * np.exp(middle + amplitude * np.cos(2 * np.pi * time / period + phase))
    angles = rng.uniform(-0.3, 0.3, count) * (difficulty.spin > 0) + time * rng.uniform(-1, 1, count) * difficulty.spin
    direction, speed = rng.uniform(0, 2 * math.pi), rng.uniform(0, difficulty.background_speed)
    background = time * speed * np.array([math.cos(direction), math.sin(direction)])

    order = [int(index) for index in rng.permutation(count)]
    colliding = count >= 2 and rng.random() < difficulty.collision
    centres, contacts, bounces, taken = np.zeros((frames, count, 2)), [], [], []
    for indices in ([order[:2]] if colliding else []) + [[index] for index in order[2 * colliding :]]:
        if len(indices) == 2:
            anchor = rng.uniform(0.25, 0.75) * (frames - 1)
            bodies = _colliding_pair(rng, difficulty, frames, [(i, radius_at(i, anchor), base[i]) for i in indices])
            velocities = ((bodies[0].before, bodies[1].before), (bodies[0].after, bodies[1].after))
            contacts.append(Contact(anchor, (indices[0], indices[1]), *velocities))
        else:
            anchor, body = _single(rng, difficulty, frames, indices[0], base[indices[0]], radius_at, wall, taken)
            bodies = [body]
        taken += [body.position for body in bodies]
        for forward in (True, False):
            _integrate(bodies, anchor, forward, difficulty.size, radius_at, base, centres, contacts, bounces)
    contacts.sort(key=lambda contact: contact.time)
    return Tracks(centres, radii, angles, background, tuple(contacts), tuple(sorted(bounces)))


def _velocity(rng: np.random.Generator, difficulty: Difficulty, frames: int) -> tuple[float, float]:
    """A random direction; speeds are spread widely so that one object is often clearly the fastest."""
    travel = 0.12 * (0.95 / 0.12) ** rng.random() * math.sqrt(frames / 12)
    speed = min(travel * difficulty.size / frames, 0.07 * difficulty.size)
    direction = rng.uniform(0, 2 * math.pi)
    return speed * math.cos(direction), speed * math.sin(direction)


def _single(rng, difficulty, frames, index, base, radius_at, wall, taken) -> tuple[float, _Body]:
    """(anchor time, body) of an object that rests, roams, comes in from outside or goes out."""
    size, role = difficulty.size, rng.random()
    velocity = _velocity(rng, difficulty, frames)
    if role < 0.22:  # crosses the border at the anchor: enters, or leaves when the two sides are exchanged
        leaving = rng.random() < 0.5
        anchor = (rng.uniform(0.38, 0.85) if leaving else rng.uniform(0.15, 0.62)) * (frames - 1)
        radius = radius_at(index, anchor) * 1.3
        inwards = max(abs(velocity[0]), 2.0 * radius / (0.35 * frames))
        side, along = int(rng.integers(4)), rng.uniform(0.2, 0.8) * size
        axis, sign = side % 2, (1 if side < 2 else -1)
        position, before = [along, along], [velocity[1] * 0.5, velocity[1] * 0.5]
        position[axis] = -radius if sign > 0 else size + radius
        before[axis] = sign * inwards
        bounded = bool(rng.random() < 0.75)
        if leaving:
            before = [-value for value in before]
        return anchor, _Body(
            index, base, position, tuple(before), tuple(before), (leaving and bounded, not leaving and bounded)
        )
    anchor = rng.uniform(0, frames - 1)
    margin = min(0.9 * base / size, 0.4)
    candidates = rng.uniform(margin, 1 - margin, (6, 2)) * size
    if role < 0.46:  # rests
        velocity = (0.0, 0.0)
    elif wall is not None and rng.random() < 0.6:  # is behind the wall at the anchor and moves across it
        axis, fast = int(wall.horizontal), max(abs(velocity[0]), abs(velocity[1]))
        candidates[:, axis] = (wall.start + wall.stop) / 2
        across = [velocity[0] * 0.4, velocity[1] * 0.4]
        across[axis] = math.copysign(fast, velocity[axis])
        velocity = tuple(across)
    gaps = [min([math.dist(candidate, other) for other in taken], default=0.0) for candidate in candidates]
    position = [float(value) for value in candidates[int(np.argmax(gaps))]]
    return anchor, _Body(index, base, position, velocity, velocity)


def _colliding_pair(rng, difficulty, frames, members) -> list[_Body]:
    """Two objects that touch at the anchor; in a third of the pairs the second one rests before."""
    (first, first_radius, first_base), (second, second_radius, second_base) = members
    u, v = _velocity(rng, difficulty, frames), _velocity(rng, difficulty, frames)
    while math.hypot(*u) < min(0.25 / frames, 0.03) * difficulty.size:
        u = _velocity(rng, difficulty, frames)
    if rng.random() < 0.35:
        v = (0.0, 0.0)
    # The normal points from the first to the second, near the direction of approach: never a mere graze.
    direction = math.atan2(u[1] - v[1], u[0] - v[0]) + rng.uniform(-0.8, 0.8)
    normal = (math.cos(direction), math.sin(direction))
    point = rng.uniform(0.35, 0.65, 2) * difficulty.size
    after = _elastic(u, v, normal, first_base**2, second_base**2)
    return [
        _Body(first, first_base, [float(point[i] - normal[i] * first_radius) for i in (0, 1)], u, after[0]),
        _Body(second, second_base, [float(point[i] + normal[i] * second_radius) for i in (0, 1)], v, after[1]),
    ]


def _elastic(u, v, normal, mass_u, mass_v):
    """Velocities after an elastic collision of discs along the unit normal."""
    approach = (u[0] - v[0]) * normal[0] + (u[1] - v[1]) * normal[1]
    impulse = 2 * approach / (mass_u + mass_v)
    return (
        (u[0] - impulse * mass_v * normal[0], u[1] - impulse * mass_v * normal[1]),
        (v[0] + impulse * mass_u * normal[0], v[1] + impulse * mass_u * normal[1]),
    )


def _integrate(bodies, anchor, forward, size, radius_at, base, centres, contacts, bounces) -> None:
    """Fills `centres` from the anchor to one end of the clip; going backwards is going forwards with -velocity."""
    sign = 1 if forward else -1
    states = [(list(b.position), [sign * c for c in (b.after if forward else b.before)]) for b in bodies]
    bounded = [b.bounded[forward] for b in bodies]
    time = anchor
    frame = math.floor(anchor) + 1 if forward else math.floor(anchor)
    while 0 <= frame < len(centres):
        step = abs(frame - time) / SUBSTEPS
        for _ in range(SUBSTEPS):
            time += sign * step
            for body, (position, velocity), inside in zip(bodies, states, bounded, strict=True):
                for axis in (0, 1):
                    position[axis] += velocity[axis] * step
                    margin = 0.9 * base[body.index]
                    outwards = (position[axis] < margin and velocity[axis] < 0) or (
                        position[axis] > size - margin and velocity[axis] > 0
                    )
                    if inside and outwards:
                        velocity[axis] = -velocity[axis]
                        bounces.append((time, body.index))
            if len(bodies) == 2:
                _collide(bodies, states, time, sign, radius_at, base, contacts)
        time = frame
        for body, (position, _) in zip(bodies, states, strict=True):
            centres[frame, body.index] = position
        frame += sign


def _collide(bodies, states, time, sign, radius_at, base, contacts) -> None:
    (p, u), (q, v) = states
    gap = math.dist(p, q)
    if gap == 0 or gap >= sum(radius_at(body.index, time) for body in bodies):
        return
    normal = ((q[0] - p[0]) / gap, (q[1] - p[1]) / gap)
    if (u[0] - v[0]) * normal[0] + (u[1] - v[1]) * normal[1] <= 0:  # already moving apart
        return
    before = (tuple(u), tuple(v))
    after = _elastic(u, v, normal, *(base[body.index] ** 2 for body in bodies))
    u[:], v[:] = after
    contact = Contact(time, (bodies[0].index, bodies[1].index), before, after)
    contacts.append(contact if sign > 0 else replace(contact.reversed(1), time=time))
