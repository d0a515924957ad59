"""The paper's ablations as synthetic miniatures: cells, which are ordinary runs, and the orders the paper reports.

The paper's numbers are J&F (arXiv 2512.02835, its ablation tables). Each table is sized for three seeds in under an
hour on 2 CPU cores.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

# In the words of `configs/demo.yaml`. The answer has room for a box beside the thoughts.
ONE_TURN_PROMPT = (
    'The video lasts {seconds:.1f} seconds, {frames} frames at fps={fps:g}. Question: "{query}"\n'
    "Think in <think></think>, compare candidates, choose the keyframe in which the object is easiest to segment, "
    "detect the object in it and answer in <answer></answer> as JSON with frame_idx and box coordinates."
)
ONE_TURN = ("chain.turns=1", f"chain.one_turn_prompt={json.dumps(ONE_TURN_PROMPT)}", "chain.turn1_tokens=64")


@dataclass(frozen=True)
class Cell:
    """One row of a table.

    Attributes:
      name: as printed
      paper: the paper's J&F on each of the table's benchmarks
      run: the trained run that is evaluated, shared by all cells that name it; "" for the policy as it comes
      overrides: of the run's config, and of the evaluation's
      shown: of the evaluation's alone
    """

    name: str
    paper: tuple[float, ...]
    run: str
    overrides: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Order:
    """What the paper's numbers say: every cell of a rank above every cell of the next. metric: jf | temporal."""

    metric: str
    ranks: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        return f"{METRICS[self.metric]}: " + " > ".join(", ".join(rank) for rank in self.ranks)


@dataclass(frozen=True)
class Table:
    """Attributes:
    benchmarks: of the paper's numbers
    overrides: of all cells' configs
    note: what a reader must know
    """

    title: str
    benchmarks: tuple[str, ...]
    overrides: tuple[str, ...]
    cells: tuple[Cell, ...]
    orders: tuple[Order, ...]
    note: str


METRICS = {"jf": "J&F", "temporal": "keyframe", "spatial": "box"}  # of an Evaluation, as the tables name them

CHAIN = Table(
    title="One-shot grounding against the two-turn chain, each with and without RL",
    benchmarks=("Ref-DAVIS17", "ReasonVOS"),
    overrides=("run.steps=100",),
    cells=(
        Cell("one turn", (4.4, 8.1), "", ONE_TURN),
        Cell("one turn + RL", (5.3, 7.6), "one_turn", ONE_TURN),
        Cell("two turns", (63.0, 41.0), ""),
        Cell("two turns + RL", (80.7, 64.8), "two_turns"),
    ),
    orders=(Order("jf", (("two turns + RL",), ("two turns",), ("one turn", "one turn + RL"))),),
    note="The embedded policy knows conversations of two turns and was never taught to give keyframe and box at once: "
    "its one-turn cells stand for a base model that cannot do it, as the paper's hardly could.",
)

REWARD = Table(
    title="The temporal reward",
    benchmarks=("MeViS", "ReasonVOS"),
    overrides=("run.steps=70", "rewards.mask=0"),
    cells=(
        Cell("none", (54.7, 58.0), "none", ("rewards.temporal_kind=none",)),
        Cell("binary", (57.4, 59.7), "binary", ("rewards.temporal_kind=binary",)),
        Cell("soft", (59.8, 64.8), "soft", ("rewards.temporal_kind=soft",)),
    ),
    orders=tuple(Order(metric, (("soft",), ("binary",), ("none",))) for metric in ("jf", "temporal")),
    note="Trained without the mask reward, which the paper has not either and which would reward good keyframes too.",
)

# Half the paper's 12, 16 and 20 frames.
FEW, SOME, MANY = (f"chain.frames={count}" for count in (6, 8, 10))

FRAMES = Table(
    title="Frames shown in training / in testing",
    benchmarks=("Ref-DAVIS17",),
    overrides=("run.steps=60", "chain.turn1_tokens=64"),
    cells=(
        Cell("6 / 6 (12 / 12)", (80.3,), "frames_6", (FEW,)),
        Cell("8 / 8 (16 / 16)", (80.7,), "frames_8", (SOME,)),
        Cell("10 / 10 (20 / 20)", (80.5,), "frames_10", (MANY,)),
        Cell("8 / 6 (16 / 12)", (80.3,), "frames_8", (SOME,), (FEW,)),
        Cell("8 / 10 (16 / 20)", (80.8,), "frames_8", (SOME,), (MANY,)),
    ),
    orders=(
        Order("jf", (("8 / 8 (16 / 16)",), ("10 / 10 (20 / 20)",), ("6 / 6 (12 / 12)",))),
        Order("jf", (("8 / 10 (16 / 20)",), ("8 / 8 (16 / 16)",), ("8 / 6 (16 / 12)",))),
    ),
    note="The paper's counts, in parentheses, are halved. Its five numbers lie within half a point of each other. The "
    "embedded policy was taught with each of the three counts.",
)

TABLES = {"chain": CHAIN, "reward": REWARD, "frames": FRAMES}
