"""The command line: combined configurations, and mistakes reported in one line."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from fresh_processes import stepwise

from stepwise_lightning import LastCheckpoint
from stepwise_lightning.__main__ import main

CONFIG = Path(__file__).parent.parent / "configs" / "vicreg_photos.yaml"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["stepwise", *map(str, arguments)])
    main()


MISTAKES = {
    "typo in an option": (["--model.init_args.learning_rat=1"], "'learning_rat' is not accepted; did you mean 'lea"),
    "unknown loss": (["--model=MoCo"], "unknown model 'MoCo'; choose from: BarlowTwins, SimCLR, SpectralContr"),
    "unknown encoder": (["--model.init_args.encoder=ViT"], "unknown encoder 'ViT'; choose from: stepwise_light"),
    "unknown backbone": (["--model.init_args.encoder.init_args.backbone=vgg"], "unknown ResNet 'vgg'; choose from"),
    "no dimensions": (["--model.init_args.encoder.init_args.out_features=0"], "must be at least 1, got (64, 0, "),
    "no number": (["--model.init_args.learning_rate=fast"], 'key "learning_rate": Expected a <class \'float\'>. Got'),
    "batch of one": (["--data.init_args.global_batch_size=1"], "global_batch_size must be at least 2, because the"),
    "batch too large": (["--data.init_args.global_batch_size=9999"], "global_batch_size 9999 is larger than the"),
    "unknown data": (["--data.init_args.data=imagenet"], "data set 'imagenet' is neither one of photos, cifar10"),
    "missing data": (["--data.init_args.data=stl10"], "stepwise download stl10 --root data"),
    "missing file": (["--config=nowhere.yaml"], "File does not exist"),
    "missing checkpoint": (["--ckpt_path=nowhere.ckpt"], "checkpoint file not found: nowhere.ckpt"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_reported_in_one_line(options, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "fit", f"--config={CONFIG}", *options)
    # Python prints a SystemExit's text when it leaves; the parser prints its own.
    text = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    (line,) = text.strip().splitlines()
    assert line.startswith("stepwise") and ": error: " in line and message in line


TYPOS = {
    "model": ("eps: 0.01", "epz: 0.01", "did you mean 'eps'"),
    "trainer": ("max_steps:", "max_step:", "did you mean 'max_steps'"),
    "section": ("trainer:", "trainr:", "did you mean 'trainer'"),
    "callback": ("watch: [encoder.backbone]", "watch: [encoder.bakbone]", "did you mean one of: encoder.backbone"),
}  # fmt: skip


@pytest.mark.parametrize(("right", "wrong", "message"), TYPOS.values(), ids=TYPOS)
def test_typo_in_a_file_is_reported(right, wrong, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    text = CONFIG.read_text()
    assert right in text
    (tmp_path / "mine.yaml").write_text(text.replace(right, wrong))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "fit", "--config=mine.yaml")
    assert message in (stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err)


def test_damaged_checkpoint_and_invalid_interval_are_reported(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs/vicreg_photos/version_3/checkpoints/last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a checkpoint")
    with pytest.raises(SystemExit, match="version_3/checkpoints/last.ckpt is not a readable checkpoint: remove it"):
        run(monkeypatch, "fit", f"--config={CONFIG}", "--ckpt_path=last")
    assert path.read_bytes() == b"half a checkpoint"
    with pytest.raises(ValueError, match="every_n_train_steps must be at least 1, got 0"):
        LastCheckpoint(0)


BORING = "lightning.pytorch.demos.boring_classes."
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*your dataloader is not resumable")
@pytest.mark.parametrize("data", [[], [f"--data={BORING}BoringDataModule"]], ids=["its own data", "a data module"])
def test_any_module_trains_and_resumes(data, monkeypatch, tmp_path):
    """Including a module without hyperparameters."""
    monkeypatch.chdir(tmp_path)
    for steps in (2, 4):
        options = [f"--model={BORING}BoringModel", *data, f"--trainer.max_steps={steps}", "--ckpt_path=last", *QUIET]
        run(monkeypatch, "fit", *options)
    checkpoint = tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4


def test_training_without_data_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    encoder = ["--model.encoder=stepwise_lightning.LinearEncoder", "--model.encoder.in_features=4"]
    options = [*encoder, "--model.encoder.out_features=2", "--model.learning_rate=1", *QUIET]
    with pytest.raises(SystemExit, match="error: data is missing: give --data, one of TwoViewDataModule"):
        run(monkeypatch, "fit", "--model=BarlowTwins", *options)


OWN_MODULE = """
import torch
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from torch.utils.data import DataLoader, IterableDataset

class Stream(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.randn(48), torch.randn(48)

class Pairs(BoringDataModule):
    def train_dataloader(self):
        return DataLoader(Stream(), batch_size=4)

class Mine(BoringModel):
    def __init__(self, width: int = 3):
        super().__init__()
        self.save_hyperparameters()
"""


@pytest.fixture
def script(tmp_path):
    """Return a function that runs the command like a console script: the working directory is not on the path."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/stepwise").write_text("from stepwise_lightning.__main__ import main\n\nmain()\n")
    (tmp_path / "work").mkdir()
    (tmp_path / "work/own_things.py").write_text(OWN_MODULE)

    def launch(*arguments, **variables):
        command = [sys.executable, str(tmp_path / "bin/stepwise"), *arguments, *QUIET]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"} | variables
        return subprocess.run(command, cwd=tmp_path / "work", env=env, capture_output=True, text=True, timeout=120)

    return launch


def last_line(done):
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_modules_in_the_working_directory_are_found(processes, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_things.py").write_text(OWN_MODULE)
    options = ["--model=own_things.Mine", f"--data={BORING}BoringDataModule", "--trainer.max_steps=2", *QUIET]
    processes.run(stepwise, "fit", *options)


@pytest.mark.slow
def test_modules_are_not_found_on_a_safe_path(script):
    module = ["--model=own_things.Mine", f"--data={BORING}BoringDataModule", "--trainer.max_steps=2"]
    assert script("fit", *module).returncode == 0
    done = script("fit", *module, "--model.width=4", "--ckpt_path=last")
    assert done.returncode == 1 and "the checkpoint was trained with width=3, not 4" in last_line(done)
    assert script("fit", *module, PYTHONSAFEPATH="1").returncode == 2  # as python -m would not find it


def simclr(**options):
    given = {"encoder": "stepwise_lightning.LinearEncoder", "encoder.in_features": 48, "encoder.out_features": 3}
    given |= {"learning_rate": 0.1} | options
    return ["--model=SimCLR", *(f"--model.{name}={value}" for name, value in given.items()), "--data=own_things.Pairs"]


REFUSED_BEFORE_TRAINING = {
    "temperature 0": (simclr(temperature=0), "temperature must be finite and above 0, got 0.0"),
    "cosine over a stream": ([*simclr(cosine="true"), "--trainer.max_epochs=2"], "for data without a length max_steps"),
    "a file in the folder's place": (
        [*simclr(), "--trainer.max_steps=2", "--trainer.default_root_dir=own_things.py"],
        "own_things.py",
    ),
    "the same, without a logger": (
        [*simclr(), "--trainer.max_steps=2", "--trainer.logger=false", "--trainer.default_root_dir=own_things.py"],
        "cannot write own_things.py/stepwise_runs: Not a directory",
    ),
    "the same, of a logger": (
        [*simclr(), "--trainer.max_steps=2", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=own_things.py/x"],
        "choose another folder (the logger's save_dir, or trainer.default_root_dir)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED_BEFORE_TRAINING.values(), ids=REFUSED_BEFORE_TRAINING)
def test_invalid_run_is_refused_before_training(options, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_things.py").write_text(OWN_MODULE)
    sys.modules.pop("own_things", None)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "fit", *options, *QUIET)
    (line,) = str(stop.value.code).strip().splitlines()
    assert line.startswith("stepwise: error: ") and message in line
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_port_in_use_is_reported(script):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        ranks = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "NODE_RANK": "0",
        }
        two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=2"]
        done = script("fit", *simclr(), *two, **ranks)
    assert done.returncode == 1 and f"MASTER_PORT {port}): set MASTER_PORT" in last_line(done)
    assert "another program uses the port of this run's process group" in last_line(done)


def test_configurations_combine_and_print_completely(monkeypatch, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(
        "model:\n  init_args:\n    encoder:\n      init_args:\n        alpha: 1.0\ntrainer:\n  max_steps: 7\n"
    )
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "fit", f"--config={CONFIG}", f"--config={tmp_path / 'mine.yaml'}", "--print_config")
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    encoder = config["model"]["init_args"]["encoder"]["init_args"]
    assert encoder["alpha"] == 1.0 and encoder["backbone"] == "resnet_small" and config["trainer"]["max_steps"] == 7


def printed(monkeypatch, capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "fit", *arguments)
    assert stop.value.code == 0
    return capsys.readouterr().out


def callbacks(monkeypatch, capsys, *arguments):
    config = yaml.safe_load(printed(monkeypatch, capsys, f"--config={CONFIG}", *arguments, "--print_config"))
    return {item["class_path"].rpartition(".")[2]: item.get("init_args") for item in config["trainer"]["callbacks"]}


def test_second_configuration_keeps_other_callbacks(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text(
        "trainer:\n  callbacks:\n"
        "    - class_path: LastCheckpoint\n      init_args: {every_n_train_steps: 7}\n"
        "    - class_path: lightning.pytorch.callbacks.LearningRateMonitor\n"
    )
    before = callbacks(monkeypatch, capsys)
    after = callbacks(monkeypatch, capsys, f"--config={tmp_path / 'mine.yaml'}")
    assert after.pop("LearningRateMonitor") is not None
    assert after == before | {"LastCheckpoint": {"every_n_train_steps": 7}}


def test_arguments_of_callbacks_are_options(monkeypatch, capsys):
    before = callbacks(monkeypatch, capsys)
    after = callbacks(monkeypatch, capsys, "--spectrum.num_points", 50, "--checkpoint.every_n_train_steps=9")
    assert before["SpectrumLogger"]["watch"] == ["encoder.backbone"]
    assert after["SpectrumLogger"] == before["SpectrumLogger"] | {"num_points": 50}
    assert after["LastCheckpoint"] == {"every_n_train_steps": 9} and after["OnlineKNN"] == before["OnlineKNN"]


MISPLACED = {
    "of a callback": (["--trainer.callbacks.num_points=5"], "is not accepted; did you mean --spectrum.num_points?"),
    "of a model": (["--learning_rate", "1"], "did you mean --model.learning_rate or --probe.learning_rate?"),
    "of the trainer": (["--max_steps=1"], "did you mean --trainer.max_steps?"),
    "misspelt": (["--spectrum.num_pointz=5"], "did you mean 'num_points'?"),
    "without a value": (["--spectrum.num_points"], "--spectrum.num_points needs a value"),
    "unknown configuration": (["--config", "barlow"], "no configuration 'barlow': give a file, or one of barlow_twins"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), MISPLACED.values(), ids=MISPLACED)
def test_option_in_the_wrong_section_gets_a_suggestion(options, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "fit", f"--config={CONFIG}", *options)
    text = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    (line,) = text.strip().splitlines()
    assert line.startswith("stepwise") and message in line


def test_help_is_short_and_documents_options_with_defaults(monkeypatch, capsys):
    text = printed(monkeypatch, capsys, "--help")
    assert len(text.splitlines()) < 185 and text.index("--model.learning_rate") < text.index("--trainer.max_steps")
    entries = {
        match[1]: " ".join(match[2].split()) for match in re.finditer(r"^  --([\w.]+) (.*(?:\n {8,}.*)*)", text, re.M)
    }
    assert entries["model.momentum"].endswith("(0.0)") and entries["data.seed"].endswith("(null)")
    empty = [name for name, entry in entries.items() if "." in name and not entry.partition("(")[0].strip()]
    assert not empty


def test_configurations_of_the_package_have_names(monkeypatch, capsys, tmp_path):
    by_path = printed(monkeypatch, capsys, f"--config={CONFIG}", "--print_config")
    monkeypatch.chdir(tmp_path)
    assert printed(monkeypatch, capsys, "--config", "vicreg_photos", "--print_config") == by_path
