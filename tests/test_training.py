"""Training with Lightning: definition of a step, logged values, and output files."""

import csv
import math

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stepwise_lightning import BarlowTwins, FixedCropPairs, LinearEncoder, SpectrumLogger, barlow_twins_loss
from stepwise_lightning.spectrum import cross_correlation_eigenvalues, embedding_eigenvalues
from stepwise_lightning.spectrum.schedule import Schedule, log_spaced_steps
from stepwise_lightning.theory import LinearBarlowTwins, feature_cross_correlation

RATE, STEPS = 1e-3, 60


def train(directory, steps=STEPS, callbacks=(), **trainer):
    pairs = FixedCropPairs(num_pairs=32, crop_size=6, steps_per_epoch=25)
    encoder = LinearEncoder(108, 5, init_std=1e-2)
    module = BarlowTwins(encoder, learning_rate=RATE, off_diagonal_weight=1.0, normalize=False)
    start = encoder.weight.detach().clone()
    logger = TensorBoardLogger(directory, name="run")
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=logger, callbacks=list(callbacks), log_every_n_steps=10,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, **trainer,
    )  # fmt: skip
    trainer.fit(module, datamodule=pairs)
    return pairs, start, encoder.weight.detach(), logger


def gradient_descent(pairs, weights, steps):
    """Return weights and loss after each of 0 … ``steps`` steps of gradient descent, without Lightning."""
    weights = weights.clone().requires_grad_()
    x1, x2 = pairs.x1.flatten(1), pairs.x2.flatten(1)
    history = []
    for _ in range(steps + 1):
        loss = barlow_twins_loss(x1 @ weights.T, x2 @ weights.T, off_diagonal_weight=1.0, normalize=False)
        history.append((weights.detach(), loss.item()))
        (gradient,) = torch.autograd.grad(loss, weights)
        weights = (weights - RATE * gradient).detach().requires_grad_()
    return history


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    spectra = SpectrumLogger(num_points=20)
    pairs, start, end, logger = train(tmp_path_factory.mktemp("logs"), callbacks=[spectra])
    return spectra, gradient_descent(pairs, start, STEPS), pairs, end, logger


def test_step_k_is_measured_after_k_optimiser_steps(run):
    spectra, history, pairs, end, _ = run
    steps = spectra.record.steps.tolist()
    assert steps[0] == 0 and steps[-2:] == [STEPS - 1, STEPS]
    torch.testing.assert_close(end, history[-1][0], rtol=1e-4, atol=1e-7)
    for row, step in enumerate(steps):
        weights, loss = history[step]
        z1, z2 = pairs.x1.flatten(1) @ weights.T, pairs.x2.flatten(1) @ weights.T
        torch.testing.assert_close(
            spectra.record.eigenvalues()[row], cross_correlation_eigenvalues(z1, z2), rtol=1e-3, atol=1e-8
        )
        torch.testing.assert_close(
            spectra.record.eigenvalues("covariance")[row],
            embedding_eigenvalues(torch.cat([z1, z2])),
            rtol=1e-3,
            atol=1e-8,
        )
        assert spectra.record.times[row] == RATE * step
        if step < STEPS:
            assert float(spectra.record.losses[row]) == pytest.approx(loss, rel=1e-4)
    assert math.isnan(spectra.record.losses[-1])


def test_tensorboard_event_file_contains_the_record(run):
    spectra, history, _, _, logger = run
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"])
    for matrix, group in (("cross_correlation", "C"), ("covariance", "covariance")):
        for mode in range(5):
            scalars = events.Scalars(f"{group}/eig_{mode:03d}")
            assert [s.step for s in scalars] == spectra.record.steps.tolist()
            expected = spectra.record.eigenvalues(matrix)[:, mode]
            np.testing.assert_allclose([s.value for s in scalars], expected, rtol=1e-5)
        assert {f"{group}/num_grown", f"{group}/effective_rank"} <= tags
    grown = [s.value for s in events.Scalars("C/num_grown")]
    assert grown[0] == 0 and grown[-1] >= 1
    assert [s.value for s in events.Scalars("At a glance/num_grown")] == grown  # Barlow Twins drives C
    losses = [s.value for s in events.Scalars("At a glance/loss")]
    np.testing.assert_allclose(losses, spectra.record.losses[:-1], rtol=1e-6)
    assert [s.value for s in events.Scalars("steps/num_distinct")] == [spectra.record.detect_steps().num_distinct]
    for scalar in events.Scalars("train/loss"):
        assert scalar.value == pytest.approx(history[scalar.step][1], rel=1e-4)


def test_csv_and_npz_files_contain_the_record(run):
    spectra, _, _, _, logger = run
    with open(f"{logger.log_dir}/spectrum.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "time", "matrix", "quantity", "mode", "value"]
    eigenvalues = [float(r["value"]) for r in rows if r["matrix"] == "covariance" and r["quantity"] == "eigenvalue"]
    expected = spectra.record.eigenvalues("covariance")
    np.testing.assert_array_equal(np.reshape(eigenvalues, expected.shape), expected)
    losses = {int(r["step"]): float(r["value"]) for r in rows if r["quantity"] == "loss"}
    assert losses == dict(zip(spectra.record.steps.tolist()[:-1], spectra.record.losses.tolist()[:-1], strict=True))
    with np.load(f"{logger.log_dir}/spectrum.npz") as saved:
        np.testing.assert_array_equal(saved["step"], spectra.record.steps)
        np.testing.assert_array_equal(saved["time"], spectra.record.times)
        np.testing.assert_array_equal(saved["loss"], spectra.record.losses)
        np.testing.assert_array_equal(saved["covariance"], expected)


def test_training_is_bit_identical_with_and_without_the_logger(tmp_path, run):
    assert torch.equal(train(tmp_path)[2], run[3])


def test_interrupted_run_keeps_its_measurements(tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 30:
                raise RuntimeError("interrupted")

    spectra = SpectrumLogger(num_points=20)
    with pytest.raises(RuntimeError, match="interrupted"):
        train(tmp_path, callbacks=[spectra, Stop()])
    with np.load(spectra.directory / "spectrum.npz") as saved:
        assert saved["step"].tolist() == spectra.record.steps.tolist() and 0 < saved["step"][-1] < 30


def test_schedule_is_log_spaced():
    steps = log_spaced_steps(10_000, 50)
    assert steps[:4] == [0, 1, 2, 3] and steps[-2:] == [9_999, 10_000] and steps == sorted(set(steps))
    ratios = np.divide(steps[20:-2], steps[19:-3])
    assert ratios.max() < 1.35 * ratios.min()
    assert log_spaced_steps(1, 2) == [0, 1]
    with pytest.raises(ValueError, match="last_step ≥ 1"):
        log_spaced_steps(0, 5)


def test_run_without_a_last_step_is_measured_to_its_end_in_units_of_time(tmp_path):
    """Time is the sum of learning rates."""

    class HalveAndStop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 20:
                trainer.optimizers[0].param_groups[0]["lr"] /= 2
            trainer.should_stop = trainer.global_step == 120

    spectra = SpectrumLogger(num_points=20)
    train(tmp_path, steps=-1, callbacks=[spectra, HalveAndStop()], max_epochs=-1)
    steps = spectra.record.steps.tolist()
    assert steps[:3] == [0, 1, 2] and steps[-1] == 120 and 8 <= len(steps) <= 20
    expected = [RATE * min(k, 20) + RATE / 2 * max(k - 20, 0) for k in steps]
    np.testing.assert_allclose(spectra.record.times, expected, rtol=1e-12)


def test_schedule_continues_log_spaced_beyond_the_expected_end():
    schedule = Schedule(100, 20)
    measured = [step for step in range(1000) if schedule.is_due(step)]
    assert measured[:3] == [0, 1, 2] and {99, 100} < set(measured)
    late = [step for step in measured if step > 100]
    assert len(late) == 9 and 1.2 < late[1] / late[0] < 1.35
    jumping = Schedule(100, 20)
    assert [step for step in range(0, 60, 7) if jumping.is_due(step)][:3] == [0, 7, 14]


def test_prediction_is_saved_with_the_measurements(tmp_path):
    pairs = FixedCropPairs(num_pairs=32, crop_size=6)
    pairs.setup()
    weights = LinearEncoder(108, 5, init_std=1e-2).weight.detach()
    theory = LinearBarlowTwins(feature_cross_correlation(pairs.x1, pairs.x2), weights, learning_rate=RATE)
    spectra = SpectrumLogger(num_points=20, prediction=theory.embedding_eigenvalues)
    train(tmp_path, callbacks=[spectra])
    with np.load(spectra.directory / "spectrum.npz") as saved:
        expected = theory.embedding_eigenvalues(torch.tensor(saved["time"])).numpy()
        np.testing.assert_allclose(saved["cross_correlation/predicted"], expected, rtol=1e-10, atol=1e-15)
        # Agreement is approximate, because the initialisation is not small.
        assert np.abs(saved["cross_correlation"] - expected).max() < 0.1
    with (spectra.directory / "spectrum.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["quantity"] == "predicted_eigenvalue"]
    assert {row["matrix"] for row in rows} == {"cross_correlation"} and len(rows) == 5 * len(spectra.record)
    assert float(rows[-1]["value"]) == pytest.approx(expected[-1, -1], rel=1e-10)
    # The prediction is a separate TensorBoard run, shown in the same chart in another colour.
    measured, theory = (
        EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for folder in (spectra.directory, spectra.directory / "theory")
    )
    np.testing.assert_allclose([s.value for s in theory.Scalars("C/eig_000")], expected[:, 0], rtol=1e-6)
    assert [s.step for s in measured.Scalars("C/eig_000")] == [s.step for s in theory.Scalars("C/eig_000")]
    assert not [tag for tag in measured.Tags()["scalars"] if "predicted" in tag]
