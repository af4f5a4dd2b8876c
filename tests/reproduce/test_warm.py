"""Processes that are forked from a warm one are what a process that was started anew would be."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from reproduce.forkserver import WarmProcess
from reproduce.networks.runs import trained_runs
from reproduce.networks.training import PROFILES, RunFailedError, TrainingRun
from reproduce.options import new_parser

ROOT = Path(__file__).parents[2]
# Prints what an experiment could notice of how it was started.
LOOK = """
import multiprocessing, os, random, signal, sys
import numpy, torch
sys.stderr.write("first\\n")
print(sys.argv[1:], __name__, os.getcwd(), torch.get_num_threads(), os.environ["OMP_NUM_THREADS"])
print(multiprocessing.get_start_method(), multiprocessing.active_children(), torch.initial_seed() < 2**64)
print(*(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)))
print(signal.pthread_sigmask(signal.SIG_BLOCK, []), torch.is_grad_enabled(), torch.get_default_dtype())
print(sys.stdin.read(), [sys.modules["__main__"].__spec__.name, sys.flags.optimize])
torch.manual_seed(3)
print((torch.randn(300, 300) @ torch.randn(300, 300)).double().sum().item().hex())
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function from the text of a module to its name."""

    def make(text):
        name = f"module_{len(list(tmp_path.glob('*.py')))}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    monkeypatch.syspath_prepend(tmp_path)
    return make


def warm(name, *arguments, path):
    with path.open("w") as file:
        return WarmProcess(name, arguments, file).wait()


def test_a_warm_process_is_like_one_that_was_started_anew(module, tmp_path, monkeypatch):
    name = module(LOOK)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    logs = [tmp_path / f"{number}.txt" for number in range(3)]
    assert [warm(name, "--x=1", "y", path=log) for log in logs[:2]] == [0, 0]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with logs[2].open("w") as file:
        command = [sys.executable, "-m", name, "--x=1", "y"]
        subprocess.run(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment, check=True)
    anew = logs[2].read_text()
    assert [log.read_text() for log in logs[:2]] == [anew, anew]
    assert anew.startswith("first\n['--x=1', 'y'] __main__ ") and f"{tmp_path}/elsewhere 1 1" in anew


def test_how_a_warm_process_ends_is_told(module, tmp_path):
    log = tmp_path / "log.txt"
    assert warm(module("import sys; sys.exit(75)"), path=log) == 75
    assert warm(module("import sys; sys.exit('it is late')"), path=log) == 1 and log.read_text() == "it is late\n"
    assert warm(module("print('so far')\n1 / 0"), path=log) == 1
    assert log.read_text().startswith("so far\n") and log.read_text().endswith("ZeroDivisionError: division by zero\n")
    assert warm(module("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), path=log) == -signal.SIGKILL
    with log.open("w") as file:
        process = WarmProcess(module("import time; time.sleep(600)"), [], file)
        process.terminate()
        assert process.wait() == -signal.SIGTERM


@pytest.mark.slow
def test_runs_beside_and_after_others_are_bit_for_bit_those_of_processes_of_their_own(tmp_path):
    """Two at once, and the second pair in processes forked from where the first pair was."""
    spectra = {}
    for name, launcher in (("forked", ""), ("again", ""), ("anew", "env")):
        arguments = ["--out", str(tmp_path / name), "--data", "photos", "--seeds", "0", "1", "--profile", "smoke"]
        options = new_parser("test", "", PROFILES).parse_args([*arguments, "--launcher", launcher])
        for run in trained_runs(options, [("simclr", "small")]):
            with np.load(run.directory / "spectrum.npz") as file:
                state = torch.load(run.checkpoint, weights_only=True)["state_dict"]
                arrays = {key: file[key].tobytes() for key in file} | {k: v.numpy().tobytes() for k, v in state.items()}
                spectra.setdefault(run.name, []).append(arrays)
    assert len(spectra) == 2
    for forked, again, anew in spectra.values():
        assert forked == again == anew


def begun(out, count):
    return len(list(out.glob("runs/*/version_0/checkpoints"))) == count


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_training_saves_itself_and_ends_when_the_process_that_has_begun_it_ends(number, tmp_path):
    arguments = ["barlow_twins", "small", "--seeds", "0", "1", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "reproduce.train", *arguments]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 120
            while not begun(tmp_path, 2):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(number)
            assert process.wait() == -number
            while len(list(tmp_path.glob("runs/*/version_0/checkpoints/last.ckpt"))) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            while alive(process.pid):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    logs = [path.read_text() for path in tmp_path.glob("runs/*/log.txt")]
    assert len(logs) == 2 and all("told to stop: saved at step" in log for log in logs)
    assert not any("max_steps=600" in log for log in logs)


def alive(group):
    """Tell whether a process of a session is left."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == group and state != "Z":
                return True
    return False


def writers(path):
    """Return the processes whose output goes to a file."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/1"):
        with suppress(OSError):
            if link.readlink() == path:
                found.append(int(link.parts[2]))
    return found


@pytest.mark.slow
def test_training_that_is_killed_is_reported_and_goes_on(tmp_path):
    arguments = ["--data", "photos", "--profile", "smoke", "--out"]
    runs = [
        TrainingRun(
            "vicreg", "small", 0, new_parser("test", "", PROFILES).parse_args([*arguments, str(tmp_path / name)])
        )
        for name in ("whole", "killed")
    ]
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(runs[1].train)
        while not (runs[1].directory / "checkpoints" / "last.ckpt").exists():
            assert not training.done()
            time.sleep(0.05)
        (process,) = writers(runs[1].directory.parent / "log.txt")
        os.kill(process, signal.SIGKILL)
        with pytest.raises(RunFailedError, match="vicreg_small_seed0 failed, see "):
            training.result()
    assert not runs[1].is_finished()
    for run in runs:
        run.train(resume=True)
    spectra = []
    for run in runs:
        with np.load(run.directory / "spectrum.npz") as file:
            spectra.append({key: file[key].tobytes() for key in file})
    assert spectra[0] == spectra[1]
    assert (runs[1].directory.parent / "log.txt").read_text().count("--ckpt_path=last") == 1
