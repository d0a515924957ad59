"""Zips for the benchmarks' servers, and a check of what lies in them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from revseg_jax.data.source import ClipSource
from revseg_jax.data.writer import PROBLEMS
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.evaluation.benchmarks import Benchmark, left_out
from revseg_jax.evaluation.predictions import prediction_folder, predictions_root, read_mask
from revseg_jax.paths import whole_file


def check_submission(benchmark: Benchmark, data: Path, predictions: Path) -> tuple[dict[Path, str], list[str]]:
    """The expected files, with their names in the zip, and what is wrong with them: missing, of another size, not grey
    or not only 0 and 255."""
    source = ClipSource([data], benchmark.split)
    root = predictions_root(predictions, source.ids())
    files, wrong = {}, []
    for number in range(source.videos):
        video = source.video(number)
        for expression in video.expressions:
            for name in video.frame_names:
                path = prediction_folder(root, video.video_id, expression.id) / f"{name}.png"
                files[path] = f"{benchmark.server}{path.relative_to(root).as_posix()}"
                try:
                    pixels, mode = read_mask(path, video.height, video.width)
                except InputError as error:
                    wrong.append(str(error))
                    continue
                if mode != "L" or not np.isin(pixels, (0, 255)).all():
                    wrong.append(f"{path} must be grey with the values 0 and 255 only")
    return files, wrong


def write_submission(benchmark: Benchmark, data: Path, predictions: Path, out: Path) -> int:
    """Writes the zip and returns its number of files. Raises InputError when a file is missing or wrong, or when the
    prepared split is not whole."""
    if benchmark.server is None:
        raise InputError(f"{benchmark.title} has no server: its truth is public, so `revseg score` scores it")
    if lacking := left_out(data, benchmark.split):
        advice = f"mend them ({data / PROBLEMS} names them) and prepare the dataset anew"
        raise InputError(f"no submission can be made: {lacking}: {advice}")
    files, wrong = check_submission(benchmark, data, predictions)
    if wrong:
        more = f" (and {len(wrong) - 1} more problems)" if len(wrong) > 1 else ""
        raise InputError(f"no submission can be made: {wrong[0]}{more}")
    try:
        # Stored: PNGs are compressed already.
        with whole_file(out) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for path, name in files.items():
                archive.write(path, name)
    except OSError as error:
        raise RunFailure(f"cannot write {out}: {error.strerror or error}") from None
    return len(files)
