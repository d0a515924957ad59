"""Ctrl-C and SIGTERM: a command ends at once, says so in one line, and leaves no process behind."""

import gc
import os
import signal
import subprocess
import sys
import time

import pytest
from child_processes import children, running, wait_for

from revseg_jax.run.interruption import Interrupted, ended_by_sigterm, swallowed_signals_sent_again


@pytest.fixture(autouse=True)
def heard():
    """SIGINT as a terminal's user has it: whoever runs the tests may have turned it off, for the children too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.4])  # as workers start, import, and draw
def test_ctrl_c_reaches_the_command_alone(tmp_path, seconds):
    command = [sys.executable, "-m", "revseg_jax.cli", "prepare", "synthetic", "--workers", "2"]
    command += ["--clips", "20000", "1", "--out", str(tmp_path / "clips")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    wait_for(lambda: len(children(process.pid)) == 3 or process.poll() is not None)  # and the tracker of resources
    workers = children(process.pid)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    try:
        errors = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
    assert process.returncode == 130
    assert [line for line in errors.splitlines() if line.strip()][-1] == "revseg: interrupted"
    assert "Traceback" not in errors and len(workers) == 3
    wait_for(lambda: not any(map(running, workers)), 10)


def test_ctrl_c_in_the_middle_of_a_task_s_start_leaves_nothing_to_wait_for():
    """Of a task that is known as pending and will never run."""
    program = """
from revseg_jax.data.processes import process_pool

def interrupted(*_):
    raise KeyboardInterrupt

if __name__ == "__main__":
    with process_pool(1) as pool:
        pool._work_ids.put = interrupted
        pool.submit(int)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.stderr.splitlines()[-1] == "KeyboardInterrupt"


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Interrupted)])
def test_a_signal_that_comes_while_garbage_is_collected_is_not_lost(number, raised):
    sent = []

    def collecting(phase: str, info: dict) -> None:
        if not sent:
            sent.append(phase)
            signal.raise_signal(number)

    gc.callbacks.append(collecting)
    try:
        with pytest.raises(raised), swallowed_signals_sent_again(), ended_by_sigterm():
            gc.collect()
            wait_for(lambda: False, 10)
    finally:
        gc.callbacks.remove(collecting)
    assert sent


def test_what_else_is_dropped_is_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: shown.append(dropped.exc_type))

    class Failing:
        def __del__(self):
            raise ZeroDivisionError

    with swallowed_signals_sent_again():
        Failing()
    assert shown == [ZeroDivisionError]
