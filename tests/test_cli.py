"""The command line: configurations combine, and every mistake is answered in one line."""

import sys
from pathlib import Path

import pytest
import yaml

from stepwise_lightning import LastCheckpoint
from stepwise_lightning.cli import main

CONFIG = Path(__file__).parent.parent / "configs" / "vicreg_photos.yaml"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["stepwise", *map(str, arguments)])
    main()


MISTAKES = {
    "typo in an option": (["--model.init_args.learning_rat=1"], "'learning_rat' is not accepted; did you mean 'lea"),
    "unknown loss": (["--model=MoCo"], "unknown model 'MoCo'; choose from: BarlowTwins, SimCLR, VICReg"),
    "unknown encoder": (["--model.init_args.encoder=ViT"], "unknown encoder 'ViT'; choose from: stepwise_light"),
    "unknown backbone": (["--model.init_args.encoder.init_args.backbone=vgg"], "unknown ResNet 'vgg'; choose from"),
    "no dimensions": (["--model.init_args.encoder.init_args.out_features=0"], "at least 1, got in_features=64, out"),
    "no number": (["--model.init_args.learning_rate=fast"], 'key "learning_rate": Expected a <class \'float\'>. Got'),
    "batch of one": (["--data.init_args.global_batch_size=1"], "global_batch_size must be at least 2, since the"),
    "batch too large": (["--data.init_args.global_batch_size=9999"], "global_batch_size 9999 is larger than the"),
    "unknown data": (["--data.init_args.data=imagenet"], "data set 'imagenet' is neither one of photos, cifar10"),
    "missing data": (["--data.init_args.data=stl10"], "STL10('data', download=True)"),
    "missing file": (["--config=nowhere.yaml"], "File does not exist"),
    "missing checkpoint": (["--ckpt_path=nowhere.ckpt"], "Checkpoint file not found: "),
    "divergence": (["--model.init_args.learning_rate=1e9"], "training has most likely diverged"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_get_one_clear_line(options, message, monkeypatch, tmp_path, capsys):
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
def test_typos_in_a_file_are_named(right, wrong, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    text = CONFIG.read_text()
    assert right in text
    (tmp_path / "mine.yaml").write_text(text.replace(right, wrong))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "fit", "--config=mine.yaml")
    assert message in (stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err)


def test_errors_in_the_user_s_own_code_keep_their_traceback(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_losses.py").write_text(
        "from stepwise_lightning import VICReg\n\n"
        "class Mine(VICReg):\n    def loss_terms(self, z1, z2):\n        raise ValueError('my own mistake')\n"
    )
    (tmp_path / "mine.yaml").write_text(CONFIG.read_text().replace("stepwise_lightning.VICReg", "my_losses.Mine"))
    with pytest.raises(ValueError, match="my own mistake"):
        run(monkeypatch, "fit", "--config=mine.yaml")


def test_a_damaged_checkpoint_and_a_bad_interval_are_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs/vicreg_photos/version_3/checkpoints/last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a checkpoint")
    with pytest.raises(
        SystemExit, match="version_3/checkpoints/last.ckpt is no checkpoint that can be read: remove it"
    ):
        run(monkeypatch, "fit", f"--config={CONFIG}", "--ckpt_path=last")
    assert path.read_bytes() == b"half a checkpoint"
    with pytest.raises(ValueError, match="every_n_train_steps must be at least 1, got 0"):
        LastCheckpoint(0)


def test_configurations_combine_and_print_whole(monkeypatch, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(
        "model:\n  init_args:\n    encoder:\n      init_args:\n        alpha: 1.0\ntrainer:\n  max_steps: 7\n"
    )
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "fit", f"--config={CONFIG}", f"--config={tmp_path / 'mine.yaml'}", "--print_config")
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    encoder = config["model"]["init_args"]["encoder"]["init_args"]
    assert encoder["alpha"] == 1.0 and encoder["backbone"] == "resnet_small" and config["trainer"]["max_steps"] == 7
