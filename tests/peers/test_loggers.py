"""Runs with W&B (offline) and MLflow (local) resume in the same run and overwrite no file."""

import os
import sys

import pytest
import torch
from tiny_runs import changed, stepwise, write_images

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # third-party warnings
    pytest.mark.skipif(sys.platform == "win32", reason="MLflow's file: addresses"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    write_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path


def steps_of_runs(folder):
    paths = {path.parent.parent: path for path in folder.rglob("last*.ckpt")}
    return {run: torch.load(path, weights_only=True)["global_step"] for run, path in paths.items()}


def train(steps, path, **arguments):
    logger = {"class_path": f"lightning.pytorch.loggers.{path}", "init_args": arguments}
    stepwise("fit", "--ckpt_path=last", config=changed({"trainer.logger": logger, "trainer.max_steps": steps}))


@pytest.fixture
def wandb():
    module = pytest.importorskip("wandb")
    yield module
    module.finish()


@pytest.mark.parametrize("version", [{}, {"version": "mine"}, {"id": "mine"}])
def test_resume_continues_the_wandb_run(version, folder, wandb):
    for steps in (2, 4, 5):
        train(steps, "WandbLogger", project="project", save_dir="runs", **version)
        wandb.finish()
    ((run, step),) = steps_of_runs(folder).items()
    assert step == 5 and run.parent == folder / "runs/project"
    assert {"config.yaml", "config_step_2.yaml", "config_step_4.yaml"} <= set(os.listdir(run))
    ids = {path.name.rpartition("-")[2] for path in folder.glob("runs/wandb/offline-run-*")}
    assert ids == {run.name}


def test_another_wandb_project_is_another_run(folder, wandb):
    for project in ("one", "two"):
        train(2, "WandbLogger", project=project, save_dir="runs")
        wandb.finish()
    assert sorted(run.parent.name for run in steps_of_runs(folder)) == ["one", "two"]


@pytest.mark.parametrize("name", [{}, {"experiment_name": "mine"}])
def test_resume_continues_the_mlflow_run(name, folder):
    mlflow = pytest.importorskip("mlflow")
    for steps in (2, 4, 5):
        train(steps, "MLFlowLogger", save_dir=str(folder / "runs"), **name)  # MLflow caches its stores by name
    ((run, step),) = steps_of_runs(folder).items()
    assert step == 5
    client = mlflow.MlflowClient(f"file:{folder / 'runs'}")
    experiment = client.get_experiment_by_name(name.get("experiment_name", "lightning_logs"))
    (only,) = client.search_runs([experiment.experiment_id])
    assert run == folder / "runs" / experiment.experiment_id / only.info.run_id


LOGGERS = {
    "wandb": ("WandbLogger", {"project": "project", "save_dir": "runs"}, "wandb sync "),
    "mlflow": ("MLFlowLogger", {"tracking_uri": "file:runs"}, "mlflow ui --backend-store-uri file:runs"),
    "csv": ("CSVLogger", {"save_dir": "runs"}, None),
}


@pytest.mark.parametrize("kind", LOGGERS)
def test_last_lines_show_the_folder_and_the_watch_command(kind, folder, capsys):
    pytest.importorskip(kind)
    if kind == "wandb":
        sys.modules["wandb"].teardown()  # otherwise its service keeps the folder of an earlier test
    path, arguments, watch = LOGGERS[kind]
    train(12, path, **arguments)
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line]
    end = dict(line for line in lines if line[0] in ("run", "picture", "watch"))
    run = folder / end["run"].partition(",")[0]
    assert {"config.yaml", "spectrum.npz", "trajectories.png", "checkpoints"} <= set(os.listdir(run))
    assert folder / end["picture"] == run / "trajectories.png"
    assert end.get("watch", "").startswith(watch) if watch else "watch" not in end
    if kind == "wandb":
        sys.modules["wandb"].finish()
        assert list((folder / end["watch"].removeprefix("wandb sync ")).glob("*.wandb"))
