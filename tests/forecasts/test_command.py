"""``stepwise forecast``: table, figure, and mistakes reported in one line."""

import re
from pathlib import Path

import pytest
from tiny_runs import changed, refusal, stepwise, write_images

NO_CHECKPOINT = "no checkpoint in runs/lightning_logs yet: train first, or leave --ckpt_path out"
MISTAKES = {
    "another model": ({"model.class_path": "lightning.pytorch.demos.boring_classes.BoringModel", "model.init_args": {}},
                      [], "the model must be a JointEmbedding such as BarlowTwins, got BoringModel"),
    "no data": ({"data": None}, [], "data is missing"),
    "no end": ({"trainer.max_steps": -1}, [], "set trainer.max_steps"),
    "no run": ({}, ["--ckpt_path=last"], NO_CHECKPOINT),
    "no checkpoint": ({}, ["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path)


@pytest.mark.parametrize(("changes", "options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_reported_in_one_line(changes, options, message, capsys):
    assert message in refusal(capsys, "forecast", *options, config=changed(changes))


def test_forecast_prints_table_and_writes_figure(capsys, rendered_figures):
    config = changed({"trainer.accelerator": "gpu", "trainer.max_steps": 300, "model.init_args.learning_rate": 0.002})
    stepwise("forecast", "--pairs=16", config=config)
    table = capsys.readouterr().out
    assert "Barlow Twins, learning rate 0.002, momentum 0, 16 pairs, from step 0 to 300" in table
    assert "16 pairs are few for 48 features" in table and "suggested" in table
    assert Path("forecast.png").stat().st_size > 5000
    assert not Path("runs").exists()  # no other output


@pytest.mark.parametrize(
    ("model", "options", "title"),
    [
        ("stepwise_lightning.JointEmbedding", [], "dcl_loss, learning rate 0.001, momentum 0"),
        ("own_modules.Mine", ["--loss=simclr"], "SimCLR, learning rate 0.07, momentum 0.5"),
        ("own_modules.Mine", ["--loss=reproduce.losses.dcl_loss"], "dcl_loss, learning rate 0.07, momentum 0.5"),
    ],
)
def test_forecast_of_another_loss_or_module(model, options, title, capsys):
    config = changed({"model.class_path": model, "model.init_args.loss": "reproduce.losses.dcl_loss"})
    if options:
        config["model"].pop("init_args")
    stepwise("forecast", "--pairs=16", *options, config=config)
    table = capsys.readouterr().out
    assert title in table and "no small start" in table


@pytest.mark.slow
def test_forecast_from_the_last_checkpoint(capsys):
    analytical = {"normalize": False, "center": True, "off_diagonal_weight": 1.0, "momentum": 0.9}
    config = changed({f"model.init_args.{name}": value for name, value in analytical.items()})
    config["trainer"]["max_steps"] = 30
    stepwise("fit", config=config)
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    capsys.readouterr()
    stepwise("forecast", "--ckpt_path=last", "--trainer.max_steps=500", config=config)
    assert "from step 30 to 500" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before
    assert "raise max_steps" in refusal(capsys, "forecast", "--ckpt_path=last", config=config)


@pytest.mark.slow
def test_forecast_from_a_checkpoint_corrects_for_the_plateau(capsys, monkeypatch):
    analytical = {"normalize": False, "center": True, "off_diagonal_weight": 1.0, "learning_rate": 0.005}
    config = changed({f"model.init_args.{name}": value for name, value in analytical.items()})
    config["trainer"]["max_steps"] = 330
    config["trainer"]["callbacks"][0]["init_args"] = {"center": True, "probe": "batch"}
    stepwise("fit", config=config)

    def due():
        capsys.readouterr()
        stepwise("forecast", "--ckpt_path=last", "--trainer.max_steps=2000", "--pairs=400", config=config)
        mode, step = re.search(r"mode (\d) is due at step (\d+)", capsys.readouterr().out).groups()
        return int(mode), int(step)

    mode, step = due()
    assert mode > 1
    monkeypatch.setattr("stepwise_lightning.forecasts.forecast._FEATURE_LEARNING_CORRECTION", {})
    assert due()[0] == mode and due()[1] > step
