"""``--ckpt_path last`` resumes the latest run of a configuration, in its folder and as the same run of its loggers."""

import csv
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import instantiate_class
from tiny_runs import changed, stepwise, write_images

from stepwise_lightning.runs.latest import newest_checkpoint, pointer_file, resume_latest, write_pointer
from stepwise_lightning.runs.loggers import folder_of, logger_kind

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
TENSORBOARD, CSV = "lightning.pytorch.loggers.TensorBoardLogger", "lightning.pytorch.loggers.CSVLogger"
OWN = """
import os
from lightning.pytorch.loggers import Logger

class Named(Logger):
    def __init__(self, save_dir: str, name: str = "mine", version: str | None = None):
        super().__init__()
        self._save_dir, self._name, self._version = save_dir, name, version or "run-1"
    name = property(lambda self: self._name)
    version = property(lambda self: self._version)
    save_dir = property(lambda self: self._save_dir)
    def log_metrics(self, metrics, step=None): ...
    def log_hyperparams(self, *arguments): ...

class WithoutVersion(Named):
    def __init__(self, folder: str):
        super().__init__(folder)

class WithLogDir(Named):
    @property
    def log_dir(self):
        return os.path.join(os.path.expanduser(self.save_dir), "by_name", self.name, self.version, "logs")
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Set the home, a scratch folder and the working directory, which has a module of loggers."""
    for name in ("HOME", "SCRATCH"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    (work := tmp_path / "work").mkdir()
    (work / "own_loggers.py").write_text(OWN)
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(work)
    yield tmp_path
    sys.modules.pop("own_loggers", None)


def spec(path, **arguments):
    """Return a configured logger as the parser returns it, with the default of each argument."""
    default = {"name": "lightning_logs", "version": None}
    defaults = {TENSORBOARD: {**default, "sub_dir": None}, CSV: default}
    return Namespace(class_path=path, init_args=Namespace(defaults.get(path, {}) | arguments))


def configuration(logger, root=None, fast_dev_run=False):
    trainer = Namespace(logger=logger, default_root_dir=root, fast_dev_run=fast_dev_run)
    return Namespace(trainer=trainer, ckpt_path="last")


def instance(logger):
    return instantiate_class((), {"class_path": logger.class_path, "init_args": logger.init_args.as_dict()})


def save(run, step=5, name="last"):
    path = Path(run, "checkpoints", f"{name}.ckpt")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step}, path)
    return path


def start_run(config, step=5):
    """Create the pointer file of a run, and a checkpoint if ``step`` is given; return the folders of its loggers."""
    instances = list(map(instance, config.trainer.logger))
    folders = [folder_of(each, ".") for each in instances] or [Path("stepwise_runs/version_0")]
    for folder in folders:
        (folder / "checkpoints").mkdir(parents=True)
    if step is not None:
        save(folders[0], step)
    write_pointer(pointer_file(config), folders[0], instances)
    return folders


LOGGERS = {
    "TensorBoard": [spec(TENSORBOARD, save_dir="runs")],
    "home": [spec(TENSORBOARD, save_dir="~/runs", name="mine")],
    "environment variable": [spec(TENSORBOARD, save_dir="$SCRATCH/runs", name="mine")],
    "empty name": [spec(TENSORBOARD, save_dir="runs", name="")],
    "sub_dir": [spec(TENSORBOARD, save_dir="runs", name="a", sub_dir="tb")],
    "configured version": [spec(TENSORBOARD, save_dir="runs", name="a", version="b")],
    "configured number": [spec(CSV, save_dir="runs", version=7)],
    "nested name": [spec(CSV, save_dir="runs", name="deep/er")],
    "CSV, which expands nothing": [spec(CSV, save_dir="~")],
    "two loggers": [spec(CSV, save_dir="a"), spec(TENSORBOARD, save_dir="~/b")],
    "no logger": [],
    "own logger": [spec("own_loggers.Named", save_dir="runs", name="x", version=None)],
    "own logger with a log_dir": [spec("own_loggers.WithLogDir", save_dir="~/runs", name="x", version=None)],
}


@pytest.mark.parametrize("loggers", LOGGERS.values(), ids=LOGGERS)
def test_resume_sets_checkpoint_and_logger_versions(loggers):
    config = configuration([logger.clone() for logger in loggers])
    folders = start_run(config)
    checkpoint = str((folders[0] / "checkpoints/last.ckpt").absolute())
    assert newest_checkpoint(config) == checkpoint
    assert resume_latest(config) == 5 and config.ckpt_path == checkpoint
    resumed = [instance(logger) for logger in config.trainer.logger]
    assert [folder_of(logger, ".") for logger in resumed] == (folders if loggers else [])


@pytest.mark.parametrize("logger", [None, True])
def test_resume_writes_out_the_default_logger(logger):
    config = configuration(logger, root="~/root")
    folder = Path("~/root/lightning_logs/version_3").expanduser()
    save(folder)
    write_pointer(pointer_file(config), folder, [SimpleNamespace(version=3)])
    assert resume_latest(config) == 5
    assert folder_of(instance(config.trainer.logger), ".") == folder


def test_logger_without_version_argument_continues_in_new_folder(caplog):
    config = configuration([spec("own_loggers.WithoutVersion", folder="runs")])
    start_run(config)
    assert resume_latest(config) == 5
    assert "in a new folder: own_loggers.WithoutVersion takes no version" in caplog.text


def test_run_without_checkpoint_starts_a_new_run(caplog):
    config = configuration([spec(CSV, save_dir="runs")])
    start_run(config, step=None)
    with pytest.raises(ValueError, match="no checkpoint in .*version_0 yet: train first, or leave --ckpt_path out"):
        newest_checkpoint(config)
    assert resume_latest(config) is None and config.ckpt_path is None
    assert config.trainer.logger[0].init_args.version is None
    assert "no checkpoint in runs/lightning_logs/version_0 yet: starting a new run" in caplog.text


def test_pointer_is_found_by_save_dir_name_and_class():
    config = configuration([spec(CSV, save_dir="runs", name="a")])
    start_run(config)
    for other in (
        spec(CSV, save_dir="runs", name="b"),
        spec(CSV, save_dir="elsewhere", name="a"),
        spec(CSV, save_dir="runs", name="a", version=4),
        spec("own_loggers.Named", save_dir="runs", name="c", version=None),
    ):
        assert resume_latest(configuration([other])) is None
    assert resume_latest(configuration([spec(CSV, save_dir="runs", name="a", flush_logs_every_n_steps=1)])) == 5


def test_pointer_is_relative_to_the_folder_of_the_runs():
    start_run(configuration([spec(CSV, save_dir="runs")]))
    shutil.copytree("runs", "copy")
    shutil.rmtree("runs")
    config = configuration([spec(CSV, save_dir="copy")])
    assert resume_latest(config) == 5
    assert config.ckpt_path.endswith("copy/lightning_logs/version_0/checkpoints/last.ckpt")


@pytest.mark.parametrize("damage", ["delete", "damage"])
def test_run_is_found_by_number_without_a_valid_pointer(damage):
    config = configuration([spec(TENSORBOARD, save_dir="runs", name="a")])
    for number, step in ((0, 3), (2, 4), (10, 5)):
        save(f"runs/a/version_{number}", step)
    Path("runs/a/version_11/checkpoints").mkdir(parents=True)  # not yet saved
    Path("runs/a/version_12").mkdir()  # an evaluation
    if damage == "damage":
        pointer_file(config).write_text("{")
    else:
        write_pointer(pointer_file(config), Path("runs/a/version_13"), [SimpleNamespace(version=13)])
    assert resume_latest(config) == 5 and config.trainer.logger[0].init_args.version == 10


def test_configured_version_selects_another_run():
    start_run(configuration([spec(TENSORBOARD, save_dir="runs")]))
    save("runs/lightning_logs/version_3", step=8)
    config = configuration([spec(TENSORBOARD, save_dir="runs", version=3)])
    assert resume_latest(config) == 8 and "version_3" in config.ckpt_path


def test_runs_of_earlier_versions_are_resumed(home):
    """Earlier versions wrote no pointer file."""
    save("stepwise_runs/version_1")
    assert resume_latest(configuration(False)) == 5
    save(home / "home/runs/a/version_1/tb")
    config = configuration([spec(TENSORBOARD, save_dir="~/runs", name="a", sub_dir="tb"), spec(CSV, save_dir="b")])
    assert resume_latest(config) == 5 and [each.init_args.version for each in config.trainer.logger] == [1, None]


def test_runs_of_earlier_versions_with_another_logger_are_refused():
    save("runs/mine/run-7")
    message = r"give --ckpt_path runs/mine/run-7/checkpoints/last.ckpt \(its run is run-7\)"
    with pytest.raises(ValueError, match=message):
        resume_latest(configuration([spec("own_loggers.Named", save_dir="runs", name="mine", version=None)]))


def test_last_checkpoint_of_several_runs_in_one_folder():
    config = configuration([spec(TENSORBOARD, save_dir="runs", version="mine")])
    for second, (name, step) in enumerate({"last": 9, "last-v1": 4, "step=20": 20}.items()):
        os.utime(save("runs/lightning_logs/mine", step, name), (second, second))
    assert resume_latest(config) == 4 and config.ckpt_path.endswith("last-v1.ckpt")


@pytest.mark.parametrize("fast_dev_run", [False, 3])
def test_metrics_of_resumed_csv_logger_are_kept(fast_dev_run):
    """CSVLogger deletes ``metrics.csv`` when it starts; fast_dev_run writes nothing."""
    config = configuration([spec(TENSORBOARD, save_dir="a"), spec(CSV, save_dir="b")], fast_dev_run=fast_dev_run)
    folder = start_run(config)[1]
    for name in ("metrics", "metrics_to_step_5"):
        (folder / f"{name}.csv").write_text(name)
    resume_latest(config)
    files = {path.name for path in folder.glob("*.csv")}
    assert files == {"metrics.csv" if fast_dev_run else "metrics_to_step_5-v1.csv", "metrics_to_step_5.csv"}


def test_damaged_checkpoint_is_refused():
    config = configuration([spec(CSV, save_dir="runs")])
    path = save("runs/lightning_logs/version_3")
    path.write_bytes(b"half a checkpoint")
    with pytest.raises(ValueError, match="version_3/checkpoints/last.ckpt is not a readable checkpoint: remove it"):
        resume_latest(config)
    assert path.read_bytes() == b"half a checkpoint"


def test_logger_kind_of_instances_and_classes():
    assert logger_kind(instance(spec(CSV, save_dir="runs"))) == "CSVLogger"
    derived = type("Derived", (type(instance(spec(TENSORBOARD, save_dir="runs"))),), {})
    assert logger_kind(derived) == "TensorBoardLogger" and logger_kind(object()) == ""


def train(steps, logger, *options, **trainer):
    """Train for ``steps`` steps with ``--ckpt_path last``; without a configured logger if ``logger`` is None."""
    config = changed({"trainer.max_steps": steps} | {f"trainer.{name}": value for name, value in trainer.items()})
    del config["trainer"]["logger"]
    if logger is not None:
        config["trainer"]["logger"] = [
            {"class_path": each.class_path, "init_args": each.init_args.as_dict()} for each in logger
        ]
    stepwise("fit", "--ckpt_path=last", *options, config=config)


def saved_steps(folder):
    """Return the step of each checkpoint, by the folder of its run."""
    paths = {str(path.parent.parent.relative_to(folder)): path for path in sorted(folder.rglob("last*.ckpt"))}
    return {name: torch.load(path, weights_only=True)["global_step"] for name, path in paths.items()}


def test_the_same_command_continues_in_the_folders_of_its_run(home):
    """With two loggers, after another run of the second logger."""
    write_images(home / "work")
    both = [spec(TENSORBOARD, save_dir="a"), spec(CSV, save_dir="b")]
    train(2, both)
    Path("b/lightning_logs/version_1").mkdir()
    train(4, both)
    assert saved_steps(home) == {"work/a/lightning_logs/version_0": 4}
    files = set(os.listdir("a/lightning_logs/version_0"))
    assert {"config.yaml", "config_step_2.yaml", "provenance_step_2.json"} <= files
    assert sorted(os.listdir("b/lightning_logs")) == ["version_0", "version_1"]
    for name, last in (("metrics_to_step_2", 1), ("metrics", 3)):
        with Path(f"b/lightning_logs/version_0/{name}.csv").open(newline="") as file:
            assert max(int(row["step"]) for row in csv.DictReader(file)) >= last
    before = {path for path in home.rglob("*") if path.is_file()}
    train(8, both, fast_dev_run=3)
    assert {path for path in home.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("loggers", [None, [], [spec("own_loggers.Named", save_dir="runs", name="x", version=None)]])
def test_the_same_command_continues_with_other_loggers(loggers, home):
    write_images(home / "work")
    for steps in (2, 4, 5):
        train(steps, loggers)
        stepwise("validate", config=changed({"trainer.logger": False}))  # leaves nothing that could be resumed
    ((folder, step),) = saved_steps(home).items()
    assert step == 5
    assert yaml.safe_load((home / folder / "config_step_4.yaml").read_text())["trainer"]["logger"] is not None


@pytest.mark.slow
def test_a_run_started_again_before_its_first_checkpoint_keeps_its_configuration(home):
    write_images(home / "work")
    named = [spec(TENSORBOARD, save_dir="runs", version="mine")]
    train(2, named)
    for path in home.rglob("*.ckpt"):
        path.unlink()
    train(2, named)
    assert {"config.yaml", "config-v1.yaml", "provenance-v1.json"} <= set(os.listdir("runs/lightning_logs/mine"))
