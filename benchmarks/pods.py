"""The smallest TPU slice that holds a training step of each published size, and what `revseg compile` predicts there.

    python benchmarks/pods.py --models 7B --chips v5p v6e

Nothing here needs a TPU; every compilation takes minutes of processor time. Prints a Markdown row as soon as it is
known and one JSON object with all of them as the last line.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import jax

from revseg_jax.compilation.programs import make_programs
from revseg_jax.compilation.roofline import CHIPS
from revseg_jax.config import load_config
from revseg_jax.parallel.sharding import make_placement
from revseg_jax.policy.config import PUBLISHED

CONFIG = str(Path(__file__).parents[1] / "configs/revseg_7b.yaml")
MODELS = {name.split("-")[2]: name for name in PUBLISHED}
SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SLICES = {"v5e": SQUARES, "v6e": SQUARES, "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")}
PROMPTS = 128
SAMPLER_SHARE = 0.4  # of a chip's memory that the sampler's copy of the parameters may take
PROGRAMS = "update,score,prefill,decode,turn2,decode2"  # what needs the most memory first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--chips", nargs="+", choices=SLICES, default=list(SLICES))
    parser.add_argument("--programs", default=PROGRAMS)
    parser.add_argument("--remat", default="full", help="what the backward pass keeps, by policy.remat's names")
    options = parser.parse_args()
    rows = []
    print("| model | slice | tensor | GiB a chip | update, s | MFU | step, s | paper's step, s |\n" + "|---" * 8 + "|")
    for model in options.models:
        for chip in options.chips:
            row = smallest(MODELS[model], chip, options.programs, options.remat)
            rows.append(row)
            print(line(model, chip, row), flush=True)
    print(json.dumps(rows))


def smallest(model: str, chip: str, programs: str, remat: str) -> dict | None:
    """What was found for the smallest slice that fits; None when none of them does."""
    for size in SLICES[chip]:
        torus = [int(part) for part in size.split("x")]
        chips, data = math.prod(torus), data_parts(torus)
        tensor = tensor_parts(model, chip, chips)
        if tensor is None:
            continue
        parts = chips // tensor
        overrides = [f"policy.path={model}", f"policy.remat={remat}", f"mesh.tensor={tensor}", f"mesh.data={data}"]
        overrides += [f"rollout.prompts_per_batch={parts}", f"learner.prompts_per_microbatch={parts}"]
        command = [sys.executable, "-m", "revseg_jax.cli", "compile", "--config", CONFIG]
        command += ["--topology", f"{chip}:{size}", "--programs", programs, "--json", *overrides]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        if done.returncode != 1:
            raise SystemExit(done.stderr)
        print(done.stderr.splitlines()[-1], file=sys.stderr, flush=True)
    return None


def tensor_parts(model: str, chip: str, chips: int) -> int | None:
    """The fewest parts of the tensor axis with which the sampler's copy fits and every part has a prompt; None where
    the state alone is too large."""
    sizes = PUBLISHED[model].text
    parameters = parameter_count(model)
    if parameters * (4 + 8 + 4) / chips > CHIPS[chip].hbm:  # parameters, moments and gradients in float32
        return None
    for tensor in (1, 2, 4, 8):
        divides = sizes.num_kv_heads % tensor == 0 and chips % tensor == 0 and PROMPTS % (chips // tensor) == 0
        if divides and 2 * parameters / tensor <= SAMPLER_SHARE * CHIPS[chip].hbm:
            return tensor
    return None


def data_parts(torus: list[int]) -> int:
    """Of the data axis. Where a group spans a whole 3-D torus of rings, the compiler gathers parameters by all-reduces,
    which move twice the bytes; in a plane of it, it gathers them."""
    return min(torus) if len(torus) == 3 and min(torus) > 2 else 1


def parameter_count(model: str) -> int:
    config = load_config(CONFIG, ["run.dir=.", f"policy.path={model}"])
    _, trained, frozen = make_programs(config, make_placement(config.mesh)).parts
    return sum(leaf.size for leaf in jax.tree.leaves((trained, frozen)))


def line(model: str, chip: str, row: dict | None) -> str:
    if row is None:
        return f"| {model} | {chip}: none of {SLICES[chip][0]} to {SLICES[chip][-1]} |||||||"
    update, step = row["programs"].get("update"), row.get("step_seconds")
    cells = [model, row["topology"], row["mesh"]["tensor"], f"{row['memory']['peak'] / 2**30:.1f}"]
    cells += [f"{update['seconds']:.2f}", f"{row['mfu']:.0%}"] if update else ["", ""]
    cells += [f"{step:.1f}" if step else "", 725]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
