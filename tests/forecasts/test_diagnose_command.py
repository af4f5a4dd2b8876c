"""``stepwise diagnose``: runs, files of losses and bad arguments."""

import contextlib
import re

import pytest
import torch
import yaml
from small_forecasts import ANALYTICAL
from small_records import STEPS, decaying, record_of, rising
from tiny_runs import changed, stepwise, write_images

from stepwise_lightning.commands import diagnose as command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run of 60 steps whose learning rate is too low."""
    folder = tmp_path_factory.mktemp("diagnose")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_images(folder)
        settings = {f"model.init_args.{name}": value for name, value in ANALYTICAL.items()}
        settings |= {"model.init_args.learning_rate": 1e-6, "trainer.max_steps": 60}
        config = changed(settings)
        config["trainer"]["callbacks"][0]["init_args"] = {"num_points": 20, "matrices": ["cross_correlation"]}
        stepwise("fit", config=config)
        yield folder / "runs" / "lightning_logs" / "version_0"


@pytest.mark.slow
def test_command_diagnoses_a_run(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parents[2])
    command.main([str(run), "--pairs=32"])
    text = capsys.readouterr().out
    assert text.startswith("The model is stuck at step 60: none of 3 modes are learned.")
    assert "Cause: the learning rate is too low" in text and re.search(r"about step \d+", text)


@pytest.mark.slow
def test_command_diagnoses_a_run_without_checkpoint_or_data(run, monkeypatch, capsys, tmp_path):
    for name in ("spectrum.npz", "config.yaml"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    monkeypatch.chdir(run.parents[2])
    command.main([str(tmp_path), "--pairs=32"])
    assert "Cause: the learning rate is too low" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    command.main([str(tmp_path)])
    assert "Growth rates are not known (" in capsys.readouterr().out
    (tmp_path / "config.yaml").unlink()
    command.main([str(tmp_path / "spectrum.npz")])
    assert "Growth rates are not known (" in capsys.readouterr().out


def test_command_uses_the_configuration_if_the_data_is_missing(monkeypatch, capsys, tmp_path):
    config = changed({"model.class_path": "stepwise_lightning.VICReg", "model.init_args.eps": 0.01})
    config["data"]["init_args"]["data"] = "nowhere"
    config["trainer"]["max_steps"] = 401
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"damaged")
    modes = rising(100), decaying(0), decaying(0, 1e-9)
    losses = torch.full((len(STEPS),), 22.0)
    record_of(*modes, matrix="covariance", losses=losses).save(tmp_path / "spectrum.npz")
    command.main([str(tmp_path)])
    text = capsys.readouterr().out
    assert "1 of 3 modes is learned" in text and "0.5 below 22.5" in text and "data set 'nowhere'" in text
    assert "last.ckpt' cannot be read" in text
    command.main([str(tmp_path), "--settings", "eps=0.0", "--max-steps", "400"])
    text = capsys.readouterr().out
    assert text.startswith("Training is finished") and "below 25" in text
    for loss, message in (("supcon", "below 1.9459, its value"), ("nosuch", "loss must be one of")):
        with contextlib.nullcontext() if loss == "supcon" else pytest.raises(ValueError, match=message):
            command.main([str(tmp_path), f"--loss={loss}"])
            assert "plateaus of the loss" not in capsys.readouterr().out
    (tmp_path / "log.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"give a folder of a run, .* or a \.csv"):
        command.main([str(tmp_path / "log.txt")])


STEP_LOSSES = [(0, 4.852), (50, 4.852), (75, ""), (100, 4.852)]


def test_command_reads_losses(tmp_path, capsys):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train/loss\n" + "".join(f"0,{step},4.852\n,{step},\n" for step in range(9)))
    command.main([str(path), "--loss=clip", "--batch-size=128"])
    assert "The loss is 4.852, 3" in capsys.readouterr().out
    path.write_text("4.9\n4.852\n4.852\n")
    command.main([str(path), "--loss=clip", "--batch-size=128"])
    assert "on a plateau at step 2" in capsys.readouterr().out
    for header in ("Step,val_loss,train_loss_epoch,lr", "step,wall,Value,lr", "step,loss_scale,Loss,lr"):
        path.write_text(f"{header}\n" + "".join(f"{step},9,{loss},9\n" for step, loss in STEP_LOSSES))
        command.main([str(path), "--loss=clip", "--batch-size=128", "--max-steps=101"])
        assert "stuck at step 100: no modes are learned. The loss is 4.852" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "has no column 'loss', but a, b: rename"),
        ("loss\n1\nx\n", "line 3 of .* has the loss 'x': give a number"),
        ("loss\n1\n", "at least two losses"),
    ],
)
def test_bad_file_of_losses(content, message, tmp_path):
    path = tmp_path / "losses.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        command.main([str(path)])


@pytest.mark.parametrize("arguments", [[], ["runs/x", "--value=1"], ["nowhere"]])
def test_command_needs_a_run_or_a_loss(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, FileNotFoundError)):
        command.main(arguments)
