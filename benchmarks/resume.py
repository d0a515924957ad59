"""The demo's training killed (kill -9) at random moments against the same training left alone.

    python benchmarks/resume.py [--kills 20] [--steps 40] [--seed 0] [--folder DIR] [key=value ...]

Compares parameters, digests, metrics, traces and how often each example was used, prints one JSON object, and exits
with 1 when anything differs. The clips, both runs and the trainer's words stay in --folder when it is given.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CONFIG = Path(__file__).parents[1] / "configs/demo.yaml"
POLL_SECONDS = 0.002
WALL_TIME = re.compile(r"time|seconds/|speed/|memory/|(reward|data)/wait_fraction")  # metrics that no run repeats


def training(folder: Path, overrides: Sequence[str]) -> list[str]:
    """The command of a training run."""
    command = [sys.executable, "-m", "revseg_jax.cli", "train", "--config", str(CONFIG)]
    return [*command, f"run.dir={folder}", *overrides]


def kill_at_random(command: Sequence[str], folder: Path, kills: int, rng: np.random.Generator) -> list[str]:
    """Starts the command again and again until it has been killed `kills` times; returns when it was, in words.

    Every third kill waits for a checkpoint that is being written, the others for up to 2 more steps and a random part
    of a step. Raises RuntimeError when the command fails, or ends before it is killed.
    """
    history = []
    while len(history) < kills:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            history.append(_wait_for_a_moment(process, folder, len(history) % 3 == 1, rng))
        finally:
            process.kill()
            said, _ = process.communicate()
        if process.returncode != -9:
            raise RuntimeError(f"it ended with {process.returncode} before kill {len(history)}: {said.strip()}")
    return history


def _wait_for_a_moment(process: subprocess.Popen, folder: Path, saving: bool, rng: np.random.Generator) -> str:
    manifest, metrics = folder / "run.json", folder / "metrics.jsonl"

    def until(condition) -> None:
        while not condition() and process.poll() is None:
            time.sleep(POLL_SECONDS)

    def steps() -> int:
        return len(read_lines(metrics))

    def changed(path: Path) -> int:
        try:
            return path.stat().st_ctime_ns
        except FileNotFoundError:
            return 0

    before = changed(manifest)
    until(lambda: changed(manifest) > before)
    begun = changed(manifest)  # what was left half-written by the process before is older
    if saving:
        unfinished = "checkpoints/*orbax-checkpoint-tmp*"
        until(lambda: any(changed(path) > begun for path in folder.glob(unfinished)))
        return f"while a checkpoint was written, {steps()} steps done"
    goal, times = steps() + int(rng.integers(0, 3)), [row["time"] for row in read_lines(metrics)]
    step_seconds = float(np.median(np.diff(times))) if len(times) > 1 else 1.0
    until(lambda: steps() >= goal)
    part = float(rng.random())
    end = time.monotonic() + part * step_seconds
    until(lambda: time.monotonic() >= end)
    return f"{part:.2f} of a step's time after {steps()} steps"


def read_lines(path: Path) -> list[dict]:
    """Complete records of a JSON-lines file that may be in writing."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def differences(one: Path, other: Path) -> list[str]:
    """In what two finished runs of one config differ, in words."""
    found = []
    for name in ("digests.jsonl", "evaluation.jsonl", "metrics.jsonl"):
        rows, others = (_repeatable(read_lines(folder / name)) for folder in (one, other))
        first = next((n for n, pair in enumerate(zip(rows, others, strict=False), 1) if pair[0] != pair[1]), None)
        if first or len(rows) != len(others):
            found.append(f"{name}: {len(rows)} and {len(others)} lines, the first difference in line {first}")
    traces = [{path.name: path.read_text() for path in (folder / "traces").iterdir()} for folder in (one, other)]
    names = traces[0].keys() | traces[1].keys()
    found += [f"traces/{name}" for name in sorted(names) if traces[0].get(name) != traces[1].get(name)]
    if examples_used(one) != examples_used(other):
        found.append("how often examples were used")
    return found


def _repeatable(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not WALL_TIME.match(key)} for row in rows]


def examples_used(folder: Path) -> Counter[tuple[str, str]]:
    """How many rollouts each (video, expression) had; needs `run.traces_every=1`."""
    paths = (folder / "traces").glob("step_*.jsonl")
    return Counter((row["video_id"], row["expression_id"]) for path in paths for row in read_lines(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.folder or Path(temporary)
        straight, killed, clips = (work / name for name in ("straight", "killed", "clips"))
        prepare = [sys.executable, "-m", "revseg_jax.cli", "prepare", "synthetic", "--out", str(clips)]
        subprocess.run([*prepare, "--clips", "100", "8"], check=True, stdout=sys.stderr)
        options = [f"data.train=[{clips}]", f"run.steps={arguments.steps}", "run.checkpoint_every=2"]
        options += ["run.traces_every=1", *arguments.overrides]
        finish = {"stdout": subprocess.PIPE, "text": True, "check": True}
        alone = subprocess.run(training(straight, options), **finish).stdout.strip()
        begin, rng = time.monotonic(), np.random.default_rng(arguments.seed)
        history = kill_at_random(training(killed, options), killed, arguments.kills, rng)
        said = subprocess.run(training(killed, options), **finish).stdout.strip()
        found = differences(straight, killed)
        if said != alone:
            found.append(f"parameters: {said!r} and {alone!r}")
        result = {"command": " ".join(sys.argv), "steps": arguments.steps, "kills": history, "last_line": said}
        result |= {"seconds": round(time.monotonic() - begin, 1), "differences": found}
        print(json.dumps(result, indent=2))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
