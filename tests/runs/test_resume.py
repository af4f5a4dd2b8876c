"""Runs that are killed at any moment and resumed are bit-identical to uninterrupted runs."""

import csv
import random

import pytest
import yaml
from same_runs import assert_same_run, scalars
from survival import STEPS, job, log_of, newest, run_jobs, write_config, write_images

LOSSES = ("BarlowTwins", "VICReg", "SimCLR")
MOMENTS = ("batch_start", "backward", "batch_end", "saved")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def assert_exact(directory, images, plan):
    """Compare an uninterrupted run of each (loss, workers) in ``plan`` with runs that are killed and resumed.

    Returns the folders of the uninterrupted runs.
    """
    jobs, folders = [], {}
    for (loss, workers), kills in plan.items():
        folder = folders[loss, workers] = directory / f"{loss}_{workers}"
        folder.mkdir()
        config = write_config(folder / "config.yaml", images, loss, workers)
        jobs.append(job(folder / "whole", config))
        for kill in kills:
            jobs += [job(folder / kill.replace(":", "_"), config, kill), job(folder / kill.replace(":", "_"), config)]
    for done, each in zip(run_jobs(jobs), jobs, strict=True):
        assert done["statuses"] == [-9 if each["when"] else 0], (each, log_of(each))
    for key, kills in plan.items():
        whole = newest(folders[key] / "whole")
        for kill in kills:
            try:
                assert_same_run(newest(folders[key] / kill.replace(":", "_")), whole)
            except AssertionError as error:
                raise AssertionError(f"{key} killed at {kill}: {error}") from error
    return [newest(folder / "whole") for folder in folders.values()]


def assert_complete(run):
    """Check that the reference run has every row once."""
    logged = scalars(run)
    assert [step for step, _ in logged["train/loss"]] == list(range(1, STEPS, 2))
    assert [step for step, _ in logged["train/probe_loss"]] == list(range(1, STEPS, 2))
    assert [step for step, _ in logged["val/probe_top1"]] == [9, 19, 29] == [step for step, _ in logged["val/knn_top1"]]
    with (run / "spectrum.csv").open(newline="") as file:
        rows = [(row["step"], row["matrix"], row["quantity"], row["mode"]) for row in csv.DictReader(file)]
    assert len(rows) == len(set(rows))
    steps = [step for step, _ in logged["covariance/eig_000"]]
    assert steps == sorted({int(row[0]) for row in rows}) and steps[-1] == STEPS and steps[0] == 0


@pytest.mark.slow
def test_kill_after_a_checkpoint_before_logging(images, tmp_path):
    (whole,) = assert_exact(tmp_path, images, {("VICReg", 2): ["saved:14"]})
    assert_complete(whole)


@pytest.mark.slow
def test_runs_are_bit_identical_for_any_number_of_workers(images, tmp_path):
    configs = [write_config(tmp_path / f"{workers}.yaml", images, "VICReg", workers) for workers in (0, 0, 2)]
    jobs = [job(tmp_path / f"run_{index}", config) for index, config in enumerate(configs)]
    assert [done["statuses"] for done in run_jobs(jobs)] == [[0], [0], [0]], [log_of(each) for each in jobs]
    first, again, with_workers = (newest(tmp_path / f"run_{index}") for index in range(3))
    assert_same_run(again, first)
    assert_same_run(with_workers, first)


@pytest.mark.slow
def test_kill_at_the_end_of_an_epoch(images, tmp_path):
    plan = {
        ("BarlowTwins", 0): ["saved:14", "validation:30"],
        ("VICReg", 2): ["backward:12"],
        ("SimCLR", 0): ["epoch_end:20"],
    }
    for whole in assert_exact(tmp_path, images, plan):
        assert_complete(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["batch_start:9", "backward:16", "saved:21", "batch_end:30"])
def test_kill_with_two_spectrum_loggers_sub_dir_and_accumulation(kill, images, tmp_path):
    path = write_config(tmp_path / "config.yaml", images, "VICReg", 0, accumulate_grad_batches=2)
    config = yaml.safe_load(path.read_text())
    config["trainer"]["logger"]["init_args"]["sub_dir"] = "below"
    second = {"class_path": "stepwise_lightning.SpectrumLogger", "init_args": {"probe": "batch", "num_points": 30}}
    config["trainer"]["callbacks"].append(second)
    path.write_text(yaml.safe_dump(config))
    jobs = [job(tmp_path / "whole", path), job(tmp_path / "killed", path, kill), job(tmp_path / "killed", path)]
    assert [done["statuses"] for done in run_jobs(jobs)] == [[0], [-9], [0]], [log_of(each) for each in jobs]
    killed, whole = (newest(tmp_path / name) / "below" for name in ("killed", "whole"))
    assert_same_run(killed, whole)
    for name in ("spectrum_1.csv", "steps.json", "spectrum_1.npz"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes() or name.endswith("npz"), name


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_ten_random_kills(loss, workers, images, tmp_path):
    draw = random.Random(f"{loss} {workers}")
    kills = [f"{moment}:{step}" for step in draw.sample(range(1, STEPS), 10) for moment in draw.sample(MOMENTS, 1)]
    assert_exact(tmp_path, images, {(loss, workers): kills})
