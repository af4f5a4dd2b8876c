"""Forked processes, parallel experiments and progress output."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from reproduce import processes
from reproduce.networks.runs import trained_runs
from reproduce.networks.training import PROFILES, RunFailedError, TrainingRun
from reproduce.options import new_parser
from reproduce.processes import ForkedProcess, Progress, step_progress
from stepwise_lightning import BarlowTwins, FixedCropPairs, LinearEncoder
from stepwise_lightning.runs.folders import checkpoints_in

ROOT = Path(__file__).parents[2]
# Prints the state of the process.
STATE = """
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
    """Return a function that writes a module and returns its name."""

    def make(text):
        name = f"module_{len(list(tmp_path.glob('*.py')))}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    monkeypatch.syspath_prepend(tmp_path)
    return make


def run_forked(name, *arguments, path):
    with path.open("w") as file:
        return ForkedProcess(name, arguments, file).wait()


@pytest.mark.slow
def test_forked_process_matches_a_fresh_interpreter(module, tmp_path, monkeypatch):
    name = module(STATE)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    logs = [tmp_path / f"{number}.txt" for number in range(3)]
    assert [run_forked(name, "--x=1", "y", path=log) for log in logs[:2]] == [0, 0]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with logs[2].open("w") as file:
        command = [sys.executable, "-m", name, "--x=1", "y"]
        subprocess.run(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment, check=True)
    fresh = logs[2].read_text()
    assert [log.read_text() for log in logs[:2]] == [fresh, fresh]
    assert fresh.startswith("first\n['--x=1', 'y'] __main__ ") and f"{tmp_path}/elsewhere 1 1" in fresh


def test_forked_process_returns_its_exit_status(module, tmp_path):
    log = tmp_path / "log.txt"
    assert run_forked(module("import sys; sys.exit(75)"), path=log) == 75
    assert run_forked(module("import sys; sys.exit('too late')"), path=log) == 1 and log.read_text() == "too late\n"
    assert run_forked(module("print('begin')\n1 / 0"), path=log) == 1
    assert log.read_text().startswith("begin\n") and log.read_text().endswith("ZeroDivisionError: division by zero\n")
    assert run_forked(module("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), path=log) == -signal.SIGKILL
    with log.open("w") as file:
        process = ForkedProcess(module("import time; time.sleep(600)"), [], file)
        process.terminate()
        assert process.wait() == -signal.SIGTERM


@pytest.mark.slow
def test_parallel_forked_runs_match_fresh_processes_bit_for_bit(tmp_path):
    """Two runs in parallel, twice from the same server, and in fresh processes."""
    spectra = {}
    for name, launcher in (("forked", ""), ("again", ""), ("fresh", "env")):
        arguments = ["--out", str(tmp_path / name), "--data", "photos", "--seeds", "0", "1", "--profile", "smoke"]
        options = new_parser("test", "", PROFILES).parse_args([*arguments, "--launcher", launcher])
        for run in trained_runs(options, [("simclr", "small")]):
            with np.load(run.directory / "spectrum.npz") as file:
                state = torch.load(run.checkpoint, weights_only=True)["state_dict"]
                arrays = {key: file[key].tobytes() for key in file} | {k: v.numpy().tobytes() for k, v in state.items()}
                spectra.setdefault(run.name, []).append(arrays)
    assert len(spectra) == 2
    for forked, again, fresh in spectra.values():
        assert forked == again == fresh


def have_started(out, count):
    return len(list(out.glob("runs/*/version_0/checkpoints"))) == count


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_training_saves_a_checkpoint_when_its_parent_ends(number, tmp_path):
    arguments = ["barlow_twins", "small", "--seeds", "0", "1", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "reproduce.train", *arguments]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 600
            while not have_started(tmp_path, 2):
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
    assert len(logs) == 2 and all("stopped by a signal: saved at step" in log for log in logs)
    assert not any("max_steps=600" in log for log in logs)


def alive(group):
    """Return True if a process of the session is running."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == group and state != "Z":
                return True
    return False


def writers(path):
    """Return the processes that write to a file."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/1"):
        with suppress(OSError):
            if link.readlink() == path:
                found.append(int(link.parts[2]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_killed_training_is_reported_and_resumes(has_checkpoint, tmp_path):
    arguments = ["--data", "photos", "--profile", "smoke", "--out"]
    runs = [
        TrainingRun(
            "vicreg", "small", 0, new_parser("test", "", PROFILES).parse_args([*arguments, str(tmp_path / name)])
        )
        for name in ("whole", "killed")
    ]
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(runs[1].train)
        while not checkpoints_in(runs[1].directory):
            assert not training.done()
            time.sleep(0.05)
        (process,) = writers(runs[1].directory.parent / "log.txt")
        os.kill(process, signal.SIGKILL)
        with pytest.raises(RunFailedError, match="vicreg_small_seed0 failed, see "):
            training.result()
    assert not runs[1].is_finished()
    if not has_checkpoint:  # training creates an empty file before it writes the first checkpoint
        os.truncate(runs[1].directory / "checkpoints" / "last.ckpt", 0)
    for run in runs:
        run.train(resume=True)
    spectra = []
    for run in runs:
        with np.load(run.directory / "spectrum.npz") as file:
            spectra.append({key: file[key].tobytes() for key in file})
    assert spectra[0] == spectra[1]
    assert (runs[1].directory.parent / "log.txt").read_text().count("--ckpt_path=last") == has_checkpoint


def test_map_parallel_returns_results_in_order(capsys):
    assert processes.map_parallel(pow, [(2, 3), (3, 2), (5, 2)], "powers") == [8, 9, 25]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "powers: 0 of 3 runs, 0 min 0 s" and lines[-1].startswith("powers: 3 of 3 runs, ")


def test_progress_prints_plain_lines_without_a_terminal(monkeypatch, capsys):
    seconds = iter([0.0, 0.0, 10.0, 25.0, 25.0, 30.0, 62.0])
    monkeypatch.setattr(processes.time, "monotonic", lambda: next(seconds))
    with Progress("kernel_pca", 9, completed=1) as progress:
        progress.update()  # 10 s: no line
        progress.update()  # 25 s
        progress.update(2)  # 30 s: no line
    lines = ["1 of 9 runs, 0 min 0 s", "3 of 9 runs, 0 min 25 s", "5 of 9 runs, 1 min 2 s"]
    assert capsys.readouterr().out.splitlines() == [f"kernel_pca: {line}" for line in lines]


def test_training_prints_its_progress_in_steps(capsys):
    pairs = FixedCropPairs(num_pairs=10, crop_size=4, steps_per_epoch=5)
    trainer = L.Trainer(
        max_steps=5, accelerator="cpu", callbacks=step_progress("linear_model", 5), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(BarlowTwins(LinearEncoder(48, 2), 1e-4), datamodule=pairs)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("linear_model: ")]
    assert [line.split(",")[0] for line in lines] == ["linear_model: 0 of 5 steps", "linear_model: 5 of 5 steps"]


def note_and_wait(folder: str, seconds: int) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(seconds)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: int = 600) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


@pytest.mark.slow
def test_killed_main_process_leaves_no_worker_behind(tmp_path):
    script = (
        "from reproduce.processes import map_parallel\nfrom test_processes import note_and_wait\n"
        f"if __name__ == '__main__':\n    map_parallel(note_and_wait, [({str(tmp_path)!r}, 600)] * 2, 'waiting')\n"
    )
    path = tmp_path.parent / "call.py"
    path.write_text(script)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    with subprocess.Popen([sys.executable, path], env=environment, stderr=subprocess.DEVNULL) as call:
        try:
            assert wait_until(lambda: len(list(tmp_path.iterdir())) == min(2, os.cpu_count() or 1))
        finally:
            call.kill()
    workers = [int(mark.name) for mark in tmp_path.iterdir()]
    assert wait_until(lambda: not any(map(is_running, workers)))
