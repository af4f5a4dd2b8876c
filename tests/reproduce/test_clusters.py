"""SLURM scripts, executed with a stub of Python that records its arguments."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from reproduce import train
from reproduce.figures import FIGURES, LONG
from reproduce.networks.runs import Run
from reproduce.networks.training import PROFILES
from reproduce.networks.variants import LOSS_SETTINGS
from reproduce.options import new_parser

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "reproduce" / "slurm").glob("*.sbatch"))
NO_NETWORKS = ("linear_model", "start_scale", "kernel_pca", "kernel_mlp", "faster_modes", "any_loss")


def directives(script: Path) -> dict[str, str]:
    lines = [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("#SBATCH")]
    return dict(re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line).groups(default="") for line in lines)


@pytest.fixture
def submit(tmp_path):
    """Return a function that runs a script and returns the arguments of Python, or the error."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for folder in ("stl10_binary", "cifar-10-batches-py"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {shlex.quote(str(tmp_path))}/command\n")
    python.chmod(0o755)

    def run(name, *arguments, **environment):
        script = ROOT / "reproduce" / "slurm" / f"{name}.sbatch"
        places = {"VENV": str(tmp_path / "venv"), "DATA": str(tmp_path / "data"), "SLURM_SUBMIT_DIR": str(ROOT)}
        done = subprocess.run(
            ["bash", str(script), *arguments], capture_output=True, text=True, cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin"} | places | environment,
        )  # fmt: skip
        if done.returncode:
            return done.stderr
        return (tmp_path / "command").read_text().split("\n")[:-1]

    return run


def runs_of(command: list[str], monkeypatch) -> list[Run]:
    """Return the runs that a call of reproduce.train trains."""
    assert command[:2] == ["-m", "reproduce.train"]
    runs: list[Run] = []

    def trained_runs(options, kinds):
        runs.extend(Run(*kind, seed, options) for kind in kinds for seed in options.seeds)
        return runs

    monkeypatch.setattr(train, "trained_runs", trained_runs)
    assert train.main(command[2:]) == 0
    return runs


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_name_no_partition_and_allow_requeueing(script):
    subprocess.run(["bash", "-n", script], check=True)
    options = directives(script)
    assert not {"partition", "account", "qos"} & set(options)
    assert options["requeue"] == "" and options["open-mode"] == "append" and options["job-name"] == script.stem
    assert ("signal" in options) == ("gpus-per-node" in options) == (script.stem != "cpu")


@pytest.mark.parametrize("name", [*(name for name in FIGURES if name not in LONG), "all"])
def test_figure_scripts_pass_valid_options(name, submit, tmp_path):
    command = submit("cpu" if name in NO_NETWORKS else "gpu", name, "--seeds", "0", "1", "--out", "else where")
    assert command[:3] == ["-m", "reproduce", name]
    options = new_parser(name, "", PROFILES).parse_args(command[3:])  # exits for an unknown option
    assert options.profile == "full" and options.resume and options.root == str(tmp_path / "data")
    assert options.seeds == [0, 1] and options.out == "else where"
    assert options.launcher.startswith("srun") == (name not in NO_NETWORKS)


@pytest.mark.parametrize("start", ["small", "ordinary"])
def test_job_array_trains_every_loss_and_seed_once(start, submit, monkeypatch):
    first, last = map(int, directives(ROOT / "reproduce" / "slurm" / "train.sbatch")["array"].split("-"))
    arguments = [] if start == "small" else [start]
    runs = []
    for task in range(first, last + 1):
        runs += runs_of(submit("train", *arguments, SLURM_ARRAY_TASK_ID=str(task)), monkeypatch)
    names = [run.name for run in runs]
    assert len(names) == 9 and set(names) == {
        f"{loss}_{start}_seed{seed}" for loss in LOSS_SETTINGS for seed in range(3)
    }
    assert all("stl10" in run.configs[0].stem and path.is_file() for run in runs for path in run.configs)


@pytest.mark.parametrize("options", [["--profile", "smoke"], ["--profile=cpu"], ["--data", "folder"]], ids=" ".join)
@pytest.mark.parametrize("script", ["train", "gpu three_losses", "cpu linear_model"])
def test_other_profiles_and_data_do_not_require_the_default_data_set(script, options, submit, tmp_path):
    for folder in (tmp_path / "data").iterdir():
        folder.rmdir()
    command = submit(*script.split(), *options, SLURM_ARRAY_TASK_ID="0")
    assert isinstance(command, list) and set(options) < set(command)


def test_figures_reuse_the_runs_of_the_job_array(submit, monkeypatch, tmp_path):
    (run,) = runs_of(submit("train", "--out", "here", SLURM_ARRAY_TASK_ID="4"), monkeypatch)
    options = new_parser("all", "", PROFILES).parse_args(submit("gpu", "all", "--out", "here")[3:])
    options.data = PROFILES["full"]["data"]
    drawn = Run("vicreg", "small", 1, options)
    assert run.directory == drawn.directory and run.settings() == drawn.settings() and run.command == drawn.command
    assert run.command[0] == "srun" and f"--data.init_args.root={tmp_path}/data" in run.command
    assert submit("train", LAUNCHER="", SLURM_ARRAY_TASK_ID="4")[-4:-2] == ["--launcher", ""]


@pytest.mark.parametrize(
    ("command", "environment", "message"),
    [
        ("train", {"VENV": "nowhere"}, "no Python in 'nowhere': create it with"),
        ("train", {"DATA": "nowhere"}, "no STL-10 in 'nowhere': download it"),
        ("gpu three_losses", {"DATA": "nowhere"}, "no STL-10 in 'nowhere': download it"),
        ("cpu kernel_mlp", {"DATA": "nowhere"}, "no CIFAR-10 in 'nowhere': download it"),
        ("train", {"SLURM_ARRAY_TASK_ID": ""}, "submit this script with sbatch"),
        ("train", {"SLURM_SUBMIT_DIR": "/"}, "submit this from the root of the repository, not from /"),
        ("cpu", {}, "invalid figure ''; choose from: linear_model start_scale kernel_pca kernel_mlp faster"),
        ("cpu three_losses", {}, "invalid figure 'three_losses'; choose from: linear_model"),
        ("gpu kernel_pca", {}, "invalid figure 'kernel_pca'; choose from: resnet_barlow_twins"),
        ("gpu --seeds 0", {}, "invalid figure '--seeds'; choose from: resnet_barlow_twins"),
    ],
)
def test_missing_requirements_are_reported_in_one_line(command, environment, message, submit):
    error = submit(*command.split(), **environment)
    assert isinstance(error, str) and error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("status", "environment", "requeued"),
    [
        (75, {"SLURM_JOB_ID": "12"}, ["requeue", "12"]),
        (75, {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}, ["requeue", "9_3"]),
        (75, {}, None),
        (1, {"SLURM_JOB_ID": "12"}, None),
        (0, {"SLURM_JOB_ID": "12"}, None),
    ],
)
def test_job_is_requeued_after_training_saved_a_checkpoint(status, environment, requeued, submit, tmp_path):
    for name, code in (("python", status), ("scontrol", 0)):
        stub = tmp_path / "venv" / "bin" / name
        stub.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {shlex.quote(str(tmp_path))}/{name}\nexit {code}\n")
        stub.chmod(0o755)
    (tmp_path / "command").touch()
    submit("gpu", "three_losses", PATH=f"{tmp_path}/venv/bin:/usr/bin:/bin", **environment)
    done = tmp_path / "scontrol"
    assert (done.read_text().split() if done.exists() else None) == requeued
