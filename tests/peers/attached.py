"""Trains modules of others with and without the spectrum logger, and computes their spectra again with numpy."""

import copy
import random
from pathlib import Path

import lightning
import numpy as np
import pytest
import pytorch_lightning
import torch
from PIL import Image
from same_runs import assert_same
from skimage import data
from torch.nn.modules.batchnorm import _BatchNorm

from stepwise_lightning import CollapseWatch

PACKAGES = {"lightning": lightning, "pytorch_lightning": pytorch_lightning}
# What pytorch_lightning warns of, as pyproject.toml has it for lightning.
QUIET = [
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The `srun` command is available"),
]


class LastBatch(lightning.Callback):
    """Keeps the batch that was trained on last."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batch = copy.deepcopy(batch)


def train(package, module, loader, folder, *callbacks, held_out=None, **options):
    """Fit a module; what the test does not say is quiet."""
    options = {"logger": False, "max_epochs": 2, "enable_checkpointing": False} | options
    trainer = package.Trainer(
        accelerator="cpu", callbacks=list(callbacks), default_root_dir=folder, log_every_n_steps=1,
        enable_model_summary=False, enable_progress_bar=False, **options,
    )  # fmt: skip
    if isinstance(loader, package.LightningDataModule):
        trainer.fit(module, datamodule=loader)
    else:
        trainer.fit(module, loader, held_out)
    return trainer


def trace(trainer, module):
    """Return everything that training has changed."""
    return {
        "weights": module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "modes": [part.training for part in module.modules()],
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state(),
    }


def check(package, build, loader, folder, attached, last_step, views=None, frozen=(), **options):
    """Attach loggers to a module, and compare.

    ``attached`` is a list of pairs: a SpectrumLogger, and for each thing that it watches (``""`` is the module's own
    output) a function from module and view to the same embeddings. ``views`` says where they are in a batch, or what
    they are; ``frozen`` names submodules whose batch normalisation does not learn.
    """
    traces = []
    for loggers in ([], [logger for logger, _ in attached]):
        lightning.seed_everything(1, verbose=False)
        module, latest = build(), LastBatch()
        watches = [CollapseWatch()] if loggers else []  # an alarm would be a warning, which fails the test
        callbacks = [latest, *watches, *loggers]
        trainer = train(package, module, loader() if callable(loader) else loader, folder, *callbacks, **options)
        traces.append(copy.deepcopy(trace(trainer, module)))
    assert_same(*traces)
    assert trainer.global_step in (last_step, 0)  # 0: Lightning does not count what a module steps by itself
    batch_views = views(latest.batch) if callable(views) else views
    with_batch_statistics(module, frozen)
    for logger, watched in attached:
        record = logger.record
        steps = record.steps.tolist()
        assert steps[0] == 0 and steps[-1] == last_step and len(steps) > 2
        expected = {}
        for name, embed in watched.items():
            with torch.no_grad():
                embeddings = [copy.deepcopy(embed(module, view)).flatten(1).double().numpy() for view in batch_views]
            expected |= {f"{name}.{matrix}".lstrip("."): values for matrix, values in spectra(embeddings).items()}
        assert set(record.matrices) == set(expected)
        for matrix, values in expected.items():
            actual = record.eigenvalues(matrix)[-1].numpy()
            assert values[0] > 0 or matrix.endswith("normalized_covariance")  # of one dimension there is none
            np.testing.assert_allclose(actual, values, rtol=1e-8, atol=1e-9 * values[0] + 1e-20, err_msg=matrix)
        first = {matrix: record.eigenvalues(matrix)[0] for matrix in expected}
        assert any(not torch.allclose(first[matrix], record.eigenvalues(matrix)[-1]) for matrix in expected)
        assert saved_arrays(logger)["step"].tolist() == steps
    return trainer, module


def saved_arrays(logger):
    """Return what lies in the run's folder, read by numpy."""
    with np.load(Path(logger.directory) / f"{logger.name}.npz") as file:
        return dict(file)


def with_batch_statistics(module, frozen=()):
    """Put all in evaluation mode but batch normalisation that learns."""
    for name, part in module.named_modules():
        part.training = isinstance(part, _BatchNorm) and not any(name.startswith(prefix) for prefix in frozen)


def spectra(embeddings):
    """Return the eigenvalues, descending, of the three matrices, computed by numpy."""
    together = np.concatenate(embeddings)
    unit = together / np.linalg.norm(together, axis=1, keepdims=True).clip(1e-12)
    matrices = {
        "covariance": np.cov(together.T, bias=True),
        "normalized_covariance": np.cov(unit.T, bias=True),
    }
    if len(embeddings) == 2:
        first, second = embeddings
        matrices["cross_correlation"] = (first.T @ second + second.T @ first) / (2 * len(first))
    return {name: np.linalg.eigvalsh(np.atleast_2d(matrix))[::-1] for name, matrix in matrices.items()}


def write_photographs(folder, count=16, size=40):
    """Write crops of a photograph as images in folders of two classes."""
    photograph = data.astronaut()
    for index in range(count):
        row, column = divmod(index, 4)
        crop = photograph[row * 100 : row * 100 + size, column * 100 : column * 100 + size]
        path = Path(folder) / f"class_{index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crop).save(path)
    return folder
