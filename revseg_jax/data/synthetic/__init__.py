"""The synthetic benchmark: coloured shapes that move, bounce, collide, hide, enter and leave; queries about them."""

from revseg_jax.data.synthetic.difficulty import COLOURS, DIFFICULTIES, HELD_OUT, SHAPES, VERSION, Difficulty
from revseg_jax.data.synthetic.queries import Expression
from revseg_jax.data.synthetic.scene import Scene, SceneObject, render

__all__ = [
    "COLOURS",
    "DIFFICULTIES",
    "HELD_OUT",
    "SHAPES",
    "VERSION",
    "Difficulty",
    "Expression",
    "Scene",
    "SceneObject",
    "render",
]
