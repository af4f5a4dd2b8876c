"""Experiments side by side end when the process that has started them does, however that ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def note_and_wait(folder: str, seconds: int) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(seconds)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition, seconds: int = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


@pytest.mark.slow
def test_a_killed_call_leaves_no_process_behind(tmp_path):
    script = (
        "from reproduce.processes import each\nfrom test_processes import note_and_wait\n"
        f"if __name__ == '__main__':\n    each(note_and_wait, [({str(tmp_path)!r}, 600)] * 2, 'waiting')\n"
    )
    path = tmp_path.parent / "call.py"
    path.write_text(script)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    with subprocess.Popen([sys.executable, path], env=environment, stderr=subprocess.DEVNULL) as call:
        try:
            assert until(lambda: len(list(tmp_path.iterdir())) == min(2, os.cpu_count() or 1), 240)
        finally:
            call.kill()
    workers = [int(mark.name) for mark in tmp_path.iterdir()]
    assert until(lambda: not any(map(is_running, workers)), 20)
