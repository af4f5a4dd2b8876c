"""``--ckpt_path last`` finds the run where its logger really writes, and the same command continues it."""

import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import changed, stepwise, write_images

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
TENSORBOARD, CSV = "lightning.pytorch.loggers.TensorBoardLogger", "lightning.pytorch.loggers.CSVLogger"
OWN = """
import itertools, os, time
from lightning.pytorch.loggers import Logger

class Named(Logger):
    def __init__(self, save_dir: str, name: str = "mine", version: str | None = None):
        super().__init__()
        self._save_dir, self._name, self._version = save_dir, name, version or f"run-{time.time_ns()}"
    name = property(lambda self: self._name)
    version = property(lambda self: self._version)
    save_dir = property(lambda self: self._save_dir)
    def log_metrics(self, metrics, step=None): ...
    def log_hyperparams(self, *arguments): ...

class Unsettable(Named):
    def __init__(self, folder: str):
        super().__init__(folder)

class Pathed(Named):
    @property
    def log_dir(self):
        return os.path.join(os.path.expanduser(self.save_dir), "by_name", self.name, self.version, "logs")

class Homeless(Named):
    def __init__(self, version: int | None = None):
        super().__init__(None, "homeless")
        self._version = len(os.listdir("homeless")) if version is None and os.path.isdir("homeless") else version or 0
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Give each test a home, a scratch disk and a folder of its own, and loggers in a module there."""
    for name in ("HOME", "SCRATCH"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    work = tmp_path / "work"
    work.mkdir()
    write_images(work)
    (work / "own_loggers.py").write_text(OWN)
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(work)
    yield tmp_path
    sys.modules.pop("own_loggers", None)


def logger(path, **arguments):
    return {"class_path": path, "init_args": arguments}


def train(steps, logger, *options, **trainer):
    """Run the same command for so many steps; the logger is left out where it is None."""
    config = changed({"trainer.max_steps": steps} | {f"trainer.{name}": value for name, value in trainer.items()})
    del config["trainer"]["logger"]
    if logger is not None:
        config["trainer"]["logger"] = logger
    stepwise("fit", "--ckpt_path=last", *options, config=config)


def checkpoints(folder):
    """Return the step of each last.ckpt, by the folder of its run."""
    paths = {str(path.parent.parent.relative_to(folder)): path for path in sorted(folder.rglob("last*.ckpt"))}
    return {name: torch.load(path, weights_only=True)["global_step"] for name, path in paths.items()}


PLACES = {
    "a plain folder": (logger(TENSORBOARD, save_dir="runs"), "work/runs/lightning_logs/version_0"),
    "home": (logger(TENSORBOARD, save_dir="~/runs", name="mine"), "home/runs/mine/version_0"),
    "a variable": (logger(TENSORBOARD, save_dir="$SCRATCH/runs", name="mine"), "scratch/runs/mine/version_0"),
    "no name": (logger(TENSORBOARD, save_dir="~/runs", name=""), "home/runs/version_0"),
    "a folder below": (logger(TENSORBOARD, save_dir="runs", name="a", sub_dir="tb"), "work/runs/a/version_0/tb"),
    "a version": (logger(TENSORBOARD, save_dir="~/runs", name="a", version="b"), "home/runs/a/b"),
    "a number": (logger(CSV, save_dir="runs", version=7), "work/runs/lightning_logs/version_7"),
    "csv": (logger(CSV, save_dir="runs", name="deep/er"), "work/runs/deep/er/version_0"),
    "csv, which expands nothing": (logger(CSV, save_dir="~"), "work/~/lightning_logs/version_0"),
    "true": (True, "work/lightning_logs/version_0"),
    "left out": (None, "work/lightning_logs/version_0"),
    "false": (False, "work/stepwise_runs/version_0"),
    "a list": ([logger(CSV, save_dir="a"), logger(TENSORBOARD, save_dir="~/b")], "work/a/lightning_logs/version_0"),
    "a list of none": ([], "work/stepwise_runs/version_0"),
}  # fmt: skip


USUAL = "left out"  # the others are slow
CASES = [pytest.param(*case, id=name, marks=() if name == USUAL else pytest.mark.slow) for name, case in PLACES.items()]


@pytest.mark.parametrize(("logger", "place"), CASES)
def test_the_same_command_continues_in_the_run_s_own_folder(logger, place, home, caplog):
    train(2, logger)
    assert checkpoints(home) == {place: 2}
    train(4, logger)
    train(5, logger)
    assert checkpoints(home) == {place: 5}
    assert sum(" from step " in record.message for record in caplog.records) == 2
    assert {"config.yaml", "config_step_2.yaml", "config_step_4.yaml"} <= set(os.listdir(home / place))


@pytest.mark.parametrize(
    "name", ["Named", pytest.param("Pathed", marks=pytest.mark.slow), pytest.param("Homeless", marks=pytest.mark.slow)]
)
def test_a_logger_of_ones_own_whose_version_can_be_set(name, home):
    own = logger(
        f"own_loggers.{name}", **({} if name == "Homeless" else {"save_dir": "~/runs" if name == "Pathed" else "runs"})
    )
    train(2, own)
    (place,) = checkpoints(home)
    train(4, own)
    assert checkpoints(home) == {place: 4}


def test_a_logger_whose_version_cannot_be_set_gets_a_new_folder_and_one_line_says_so(home, caplog):
    own = logger("own_loggers.Unsettable", folder="runs")
    for steps in (2, 4, 5):
        train(steps, own)
    assert sorted(checkpoints(home).values()) == [2, 4, 5]
    assert sum("in a new folder" in record.message for record in caplog.records) == 2


@pytest.mark.slow
def test_the_default_root_is_where_the_default_logger_writes(home):
    for steps in (2, 4):
        train(steps, True, default_root_dir="~/root")
    assert checkpoints(home) == {"home/root/lightning_logs/version_0": 4}


def test_every_logger_of_a_list_goes_on_in_its_own_folder(home):
    """An evaluation in between takes a version, which has no checkpoint."""
    both = [logger(TENSORBOARD, save_dir="a"), logger(CSV, save_dir="b")]
    train(2, both)
    (home / "work/b/lightning_logs/version_1").mkdir()
    train(4, both)
    assert sorted(os.listdir("b/lightning_logs")) == ["version_0", "version_1"]
    steps = [line.split(",") for line in Path("b/lightning_logs/version_0/metrics.csv").read_text().splitlines()]
    assert len(steps) > 1
    kept = Path("b/lightning_logs/version_0/metrics_to_step_2.csv").read_text()  # what CSVLogger would have deleted
    assert len(kept.splitlines()) > 1


@pytest.mark.slow
def test_the_newest_run_by_number_and_one_that_has_not_been_saved(home):
    train(2, True)
    for number in (2, 10):
        folder = home / f"work/lightning_logs/version_{number}"
        folder.mkdir()
    (home / "work/lightning_logs/version_2/checkpoints").symlink_to("../version_0/checkpoints")
    train(3, True)  # in version 2, as 10 has not begun
    assert set(checkpoints(home)) == {"work/lightning_logs/version_0"}
    assert (home / "work/lightning_logs/version_2/config_step_2.yaml").is_file()


@pytest.mark.slow
def test_a_run_that_is_started_again_before_it_was_saved_is_not_refused(home):
    named = logger(TENSORBOARD, save_dir="runs", version="mine")
    train(2, named)
    for path in home.rglob("*.ckpt"):
        path.unlink()
    train(2, named)
    assert {"config.yaml", "config-v1.yaml", "provenance-v1.json"} <= set(os.listdir("runs/lightning_logs/mine"))


@pytest.mark.slow
def test_evaluations_leave_nothing_that_a_run_could_be_taken_for(home):
    train(2, False)
    for _ in range(2):
        stepwise("validate", config=changed({"trainer.logger": False}))
    assert os.listdir("stepwise_runs") == ["version_0"]  # an evaluation is no run, and leaves nothing
    train(3, False)
    assert checkpoints(home) == {"work/stepwise_runs/version_0": 3}


@pytest.mark.slow
def test_runs_of_the_version_before_which_wrote_to_a_common_folder(home, caplog):
    for own, folder in ((False, "checkpoints"), (logger("own_loggers.Named", save_dir="runs"), "runs/checkpoints")):
        train(2, logger(CSV, save_dir="elsewhere"))
        Path(folder).parent.mkdir(exist_ok=True)
        next(Path("elsewhere").rglob("checkpoints")).rename(folder)
        train(4, own)
        train(5, own)
    assert sum(" from step 2, in a new folder" in record.message for record in caplog.records) == 2
    assert sum(record.message.endswith(" from step 4") for record in caplog.records) == 2


@pytest.mark.slow
def test_what_was_saved_last_by_several_runs_in_one_folder(home):
    """Each writes a file of its own."""
    named = logger(TENSORBOARD, save_dir="runs", version="mine")
    for steps in (4, 2):
        config = changed({"trainer.logger": named, "trainer.max_steps": steps})
        stepwise("fit", config=config)
    train(3, named)
    folder = home / "work/runs/lightning_logs/mine/checkpoints"
    steps = {path.name: torch.load(path, weights_only=True)["global_step"] for path in folder.glob("*.ckpt")}
    assert steps == {"last.ckpt": 4, "last-v1.ckpt": 3}


def test_a_logger_that_cannot_be_made_is_named(capsys, home):
    from tiny_runs import refusal

    Path("broken_loggers.py").write_text(
        OWN + "\nclass Broken(Named):\n    def __init__(self):\n        raise KeyError('k')\n"
    )
    config = changed({"trainer.logger": logger("broken_loggers.Broken")})
    line = refusal(capsys, "fit", "--ckpt_path=last", config=config)
    assert "cannot ask broken_loggers.Broken where its runs lie (KeyError: 'k'): give the path of a checkpoint" in line


def test_fast_dev_run_changes_nothing(home):
    csv = logger(CSV, save_dir="runs")
    train(2, csv)
    before = {path for path in home.rglob("*") if path.is_file() and path.name != "mine.yaml"}
    train(8, csv, fast_dev_run=3)
    after = {path for path in home.rglob("*") if path.is_file() and path.name != "mine.yaml"}
    assert {path for path in after - before if not path.name.startswith(("spectrum", "steps"))} == set()
    assert before <= after and checkpoints(home) == {"work/runs/lightning_logs/version_0": 2}


def test_the_configuration_that_is_kept_names_the_logger_written_out(home):
    train(2, None)
    train(3, None)
    kept = yaml.safe_load((home / "work/lightning_logs/version_0/config_step_2.yaml").read_text())["trainer"]["logger"]
    assert kept["class_path"] == TENSORBOARD and kept["init_args"]["version"] == 0
