"""`revseg score`: anybody's predictions on a benchmark, or their zip for its server."""

from __future__ import annotations

from collections.abc import Sequence

from revseg_jax.evaluation.benchmarks import find_data, get_benchmark, left_out
from revseg_jax.evaluation.protocols import rows_of
from revseg_jax.evaluation.scoring import score_benchmark
from revseg_jax.evaluation.submission import write_submission
from revseg_jax.evaluation.table import terminal
from revseg_jax.paths import local_only


def main(
    predictions: str, benchmark: str, data: Sequence[str], submission: str | None = None, workers: int = 0
) -> None:
    """Scores the folder `predictions`, <video>/<expression>/<frame>.png, and prints the table; with `submission`,
    checks every file and writes that zip instead. data: as for `find_data`. workers: processes, 0 takes all cores."""
    chosen = get_benchmark(benchmark)
    path = find_data(list(data), [benchmark])[benchmark]
    if submission is not None:
        count = write_submission(chosen, path, local_only(predictions), local_only(submission))
        print(f"{submission}: {count} files, all there, of the right size and grey")
        return
    scores = score_benchmark(chosen, path, local_only(predictions), workers)
    print(terminal(rows_of(chosen, scores, left_out(path, chosen.split))))
