"""Values that are not finite, collapsed embeddings, identical images, and files damaged during training."""

import csv
import math
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from PIL import Image
from tiny_runs import changed, refusal, stepwise, write_images
from tiny_sets import noise
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stepwise_lightning import BarlowTwins, LinearEncoder, SpectrumLogger
from stepwise_lightning import losses as loss_functions
from stepwise_lightning.spectrum import (
    cross_correlation_eigenvalues,
    detect_steps,
    effective_rank,
    embedding_eigenvalues,
    participation_ratio,
    rankme,
)
from stepwise_lightning.theory import (
    ContrastiveKernelPCA,
    LinearBarlowTwins,
    feature_cross_correlation,
    linear_kernel,
    subspace_alignment,
)

NOT_FINITE = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
LOSSES = [loss_functions.barlow_twins_loss, loss_functions.simclr_loss, loss_functions.vicreg_loss]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with images."""
    write_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@NOT_FINITE
def test_theory_and_spectra_refuse_values_that_are_not_finite(value):
    clean = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spoilt = clean.clone()
    spoilt[2, 1] = value
    machine = ContrastiveKernelPCA(linear_kernel, 2).fit(clean, clean)
    gamma = feature_cross_correlation(clean, clean)
    for call in (
        lambda: feature_cross_correlation(clean, spoilt),
        lambda: LinearBarlowTwins(gamma, spoilt[:3]),
        lambda: LinearBarlowTwins(spoilt[:3], clean[:2]),
        lambda: ContrastiveKernelPCA(linear_kernel, 2).fit(spoilt, clean),
        lambda: ContrastiveKernelPCA(lambda x, y: value * linear_kernel(x, y), 2).fit(clean, clean),
        lambda: machine.initial_singular_values(spoilt, clean),
        lambda: machine.step_times(torch.tensor([0.1, value if value != math.inf else math.nan])),
        lambda: embedding_eigenvalues(spoilt),
        lambda: cross_correlation_eigenvalues(clean, spoilt),
        lambda: rankme(spoilt),
        lambda: detect_steps(torch.arange(8), spoilt),
        lambda: subspace_alignment(clean, spoilt),
    ):
        with pytest.raises(ValueError) as refusal:
            call()
        assert "\n" not in str(refusal.value)


def fit(x1: torch.Tensor, x2: torch.Tensor, encoder: nn.Module, **settings) -> None:
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip
    trainer.fit(BarlowTwins(encoder, 1e-3), DataLoader(TensorDataset(x1, x2), 4))


@NOT_FINITE
def test_training_stops_at_values_that_are_not_finite(value):
    x = torch.randn(16, 6)
    x[10] = value
    with pytest.raises(
        FloatingPointError, match="the loss at step 2 is nan; the batch contains values that are not finite"
    ):
        fit(x, torch.randn(16, 6), LinearEncoder(6, 2))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_collapsed_embedding_has_finite_loss_and_gradient(loss, level):
    z1, z2 = (torch.full((6, 3), level, requires_grad=True) for _ in range(2))
    value = loss(z1, z2)
    value.backward()
    assert value.isfinite() and z1.grad.isfinite().all() and z2.grad.isfinite().all()


def test_collapsed_embedding_has_zero_spectrum():
    for z in (torch.zeros(6, 3), torch.full((6, 3), 7.0)):
        eigenvalues = embedding_eigenvalues(z)
        assert eigenvalues.tolist() == [0, 0, 0] and float(effective_rank(eigenvalues)) == 0
        assert float(participation_ratio(eigenvalues)) == 0
    assert float(rankme(torch.zeros(6, 3))) == 0
    steps = detect_steps(torch.arange(5), torch.zeros(5, 3))
    assert steps.num_distinct == 0 and steps.step_times.isnan().all() and steps.num_learned.tolist() == [0] * 5


@pytest.mark.parametrize("logger", [pytest.param("CSVLogger", marks=pytest.mark.slow), "TensorBoardLogger"])
def test_collapsed_model_trains_and_is_measured(logger, folder, rendered_figures):
    """All weights are zero: no value can be plotted on a logarithmic axis."""
    path = "model.init_args.encoder.init_args.init_std"
    changes = {path: 0.0, "trainer.max_steps": 6, "trainer.logger.class_path": f"lightning.pytorch.loggers.{logger}"}
    stepwise("fit", config=changed(changes))
    (spectrum,) = folder.glob("runs/*/*/spectrum.csv")
    with spectrum.open(newline="") as file:
        values = {float(row["value"]) for row in csv.DictReader(file) if row["quantity"] == "eigenvalue"}
    assert values == {0.0}


def test_identical_images_train(folder):
    first, *others = sorted(folder.glob("images/*/*.png"))
    for other in others:
        shutil.copy(first, other)
    stepwise("fit")
    assert list(folder.glob("runs/*/*/checkpoints/*.ckpt"))
    views = torch.randn(1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(8, 5)
    assert ContrastiveKernelPCA(linear_kernel, 1).fit(views, views).eigenvalues_ > 0
    with pytest.raises(ValueError, match="n_components must be 1 to 1, the number of positive modes .*, got 2"):
        ContrastiveKernelPCA(linear_kernel, 2).fit(views, views)


@pytest.mark.parametrize("workers", [0, 1])
def test_image_damaged_during_training_is_reported_in_one_line(workers, folder, capsys):
    """Images of different sizes are read on demand, by the main process or by a worker."""
    paths = sorted(folder.glob("images/*/*.png"))
    Image.fromarray(noise(5, 6, 3)).save(paths[0])

    config = changed({"data.init_args.image_size": 4, "data.init_args.num_workers": workers, "trainer.max_steps": 8})
    config["trainer"]["callbacks"].append({"class_path": "spoil.Spoil"})
    (folder / "spoil.py").write_text(
        "import lightning as L\nfrom pathlib import Path\n\n\nclass Spoil(L.Callback):\n"
        "    def on_train_start(self, trainer, pl_module):\n"
        "        for path in Path('images').glob('*/*.png'):\n            path.write_bytes(b'no image')\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        line = refusal(capsys, "fit", config=config)
    assert ".png' cannot be read as an image (cannot identify image file" in line and "remove or repair it" in line


def test_diverging_loss_stops_training_and_saves_no_checkpoint(folder, capsys):
    line = refusal(capsys, "fit", "--model.init_args.learning_rate=1e30", "--model.init_args.normalize=false",
                   "--trainer.max_steps=20")  # fmt: skip
    assert "most likely diverged" in line and "lower" in line and not list(folder.rglob("*.ckpt"))
    assert list(folder.glob("runs/*/*/spectrum.npz"))  # of the measurements before


def test_measuring_values_that_are_not_finite_stops_training(tmp_path):
    with pytest.raises(
        FloatingPointError, match="the output of BarlowTwins at step 0 is not finite: the samples contain"
    ):
        fit(torch.randn(16, 6), torch.randn(16, 6), LinearEncoder(6, 2), default_root_dir=tmp_path,
            callbacks=[SpectrumLogger(probe=torch.full((4, 6), math.nan))])  # fmt: skip
