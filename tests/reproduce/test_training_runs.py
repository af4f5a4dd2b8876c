"""Training runs of the figures: finished runs are reused, interrupted runs resume, damaged runs are trained again."""

import os
import shlex
import shutil
import sys

import pytest

from reproduce import train
from reproduce.__main__ import main
from reproduce.networks import training
from reproduce.networks.runs import Run, trained_runs
from reproduce.networks.training import PROFILES, RunDivergedError, RunFailedError
from reproduce.networks.variants import RATE_FACTORS
from reproduce.options import new_parser
from stepwise_lightning.errors import UserError

# A launcher that replaces training: writes a checkpoint, fails on request, and writes spectra at the end.
TRAINING = """
import pathlib, sys, zipfile
place = dict(word.split("=", 1) for word in sys.argv if word.startswith("--trainer.logger."))
logger = "--trainer.logger.init_args."
folder = pathlib.Path(place[logger + "save_dir"], place[logger + "name"], "version_0")
failure = pathlib.Path(sys.argv[0]).with_name("failure")
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
def save(path):  # NumPy's files and torch's are zip archives
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("array", bytes(1000))
save(folder / "checkpoints" / "last.ckpt")
print("half of the steps")
if failure.exists() and "--ckpt_path=last" not in sys.argv:
    sys.exit(75 if failure.read_text() == "stop" else "stepwise: error: no more time")
save(folder / "spectrum.npz")
"""


@pytest.fixture
def a_run(tmp_path):
    """Return a function that creates a trivial run from command-line options."""
    script, failure = tmp_path / "training.py", tmp_path / "failure"
    script.write_text(TRAINING)
    launcher = shlex.join([sys.executable, "-S", str(script)])

    def make(*arguments, start="small", fails=False, stops=False):
        options = ["--out", str(tmp_path), "--data", "photos", "--launcher", launcher, *arguments]
        if fails or stops:
            failure.write_text("stop" if stops else "fail")
        else:
            failure.unlink(missing_ok=True)
        return Run("vicreg", start, 0, new_parser("test", "", PROFILES).parse_args(options))

    return make


def commands(run):
    return [line for line in (run.directory.parent / "log.txt").read_text().splitlines() if line.startswith("$")]


def test_only_an_interrupted_run_with_the_same_settings_resumes(a_run):
    run = a_run(fails=True)
    with pytest.raises(
        RunFailedError, match=r"vicreg_small_seed0 failed, see .*log.txt: stepwise: error: no more time$"
    ) as error:
        run.train(resume=True)
    assert not isinstance(error.value, RunDivergedError)
    assert not run.is_finished() and "--ckpt_path" not in commands(run)[0]
    run.train(resume=True)
    assert run.is_finished() and len(commands(run)) == 2 and commands(run)[1].endswith("--ckpt_path=last")
    with pytest.raises(RunFailedError):
        run.train()  # starts again without --resume
    assert len(commands(run)) == 1
    with pytest.raises(RunFailedError):
        a_run("--profile", "smoke", fails=True).train(resume=True)  # other settings
    assert len(commands(run)) == 1


def test_divergence_is_distinguished_from_other_failures(tmp_path, monkeypatch):
    monkeypatch.setitem(RATE_FACTORS, "fast", 1e9)
    arguments = ["--out", str(tmp_path), "--data", "photos", "--profile", "smoke"]
    run = Run("barlow_twins", "fast", 0, new_parser("test", "", PROFILES).parse_args(arguments))
    with pytest.raises(RunDivergedError, match="fast_seed0 failed, see .*most likely diverged"):
        run.train()


@pytest.mark.parametrize("way", ["75", "os.kill(os.getpid(), signal.SIGUSR1)"])
def test_stopped_training_stops_the_figure_with_status_75(way, a_run, tmp_path, capsys, monkeypatch):
    (tmp_path / "training.py").write_text("import os, signal\n" + TRAINING.replace("75", way))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    launcher = a_run(stops=True).options.launcher
    arguments = ["--out", str(tmp_path), "--seeds", "0", "--resume", "--launcher", launcher]
    with pytest.raises(SystemExit) as stop:
        main(["three_losses", *arguments])
    assert stop.value.code == 75 and "was stopped: continue with --resume" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["barlow_twins_small_seed0"]
    assert train.main(["barlow_twins", "small", *arguments]) == 0
    assert str(tmp_path / "runs" / "barlow_twins_small_seed0" / "version_0") in capsys.readouterr().out
    assert train.main(["barlow_twins", "small", *arguments]) == 0  # not trained again
    assert len(commands(Run("barlow_twins", "small", 0, new_parser("", "", PROFILES).parse_args(arguments)))) == 2


def test_finished_run_is_found_from_another_working_directory(a_run, tmp_path, monkeypatch):
    a_run().train()
    monkeypatch.chdir(tmp_path)
    assert a_run("--out", ".", "--root", "elsewhere").is_finished()
    assert not a_run("--data", "cifar10").is_finished()


@pytest.mark.parametrize("changed", ["vicreg_photos.yaml", "ordinary.yaml"])
def test_changed_configuration_file_invalidates_a_run(changed, a_run, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CONFIGS", shutil.copytree(training.CONFIGS, tmp_path / "configs"))
    runs = [a_run(start=start) for start in ("small", "ordinary")]
    for run in runs:
        run.train()
    assert all(run.is_finished() for run in runs)
    with (tmp_path / "configs" / changed).open("a") as file:
        print("# changed", file=file)
    assert [run.is_finished() for run in runs] == [changed == "ordinary.yaml", False]


def test_ordinary_initialisation_adds_a_configuration_file(tmp_path):
    options = new_parser("test", "", PROFILES).parse_args(["--out", str(tmp_path)])
    commands = [Run("simclr", start, 0, options).command for start in ("small", "ordinary")]
    configs = [[word for word in command if word.startswith("--config=")] for command in commands]
    assert configs[0] == [f"--config={training.CONFIGS / 'simclr_photos.yaml'}"]
    assert configs[1] == [*configs[0], f"--config={training.CONFIGS / 'ordinary.yaml'}"]


@pytest.mark.parametrize("file", ["settings.json", "version_0/spectrum.npz", "version_0/checkpoints/last.ckpt"])
@pytest.mark.parametrize("damage", ["half", "gone", "changed"])
def test_damaged_run_is_reported_and_trained_again(file, damage, a_run, capsys):
    run = a_run()
    run.train()
    path = run.directory.parent / file
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + (b"?" + content[middle + 1 :] if damage == "changed" else b""))
    if damage == "gone":
        path.unlink()
    assert not run.is_finished()
    error = capsys.readouterr().err
    if file == "settings.json" and damage == "gone":
        assert error == ""
    else:
        assert str(path.parent if damage == "gone" else path) in error
        assert error.startswith("warning: ") and error.endswith("training vicreg_small_seed0 again\n")
        assert error.count("\n") == 1
    run.train(resume=True)
    assert run.is_finished() and capsys.readouterr().err == ""


def test_missing_launcher_is_rejected(tmp_path):
    options = new_parser("test", "", PROFILES).parse_args(["--out", str(tmp_path / "out"), "--launcher", "srunn --x"])
    options.data = "photos"
    with pytest.raises(UserError, match="launcher 'srunn' is not installed: see --launcher"):
        trained_runs(options)
    assert not (tmp_path / "out").exists()


def test_newest_checkpoint_is_used(a_run):
    run = a_run()
    run.train()
    for number in range(3):
        path = run.directory / "checkpoints" / f"{'cab'[number]}.ckpt"
        path.write_text("checkpoint")
        os.utime(path, (2e9 + number, 2e9 + number))
    assert run.checkpoint.name == "b.ckpt"
