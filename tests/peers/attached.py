"""Train third-party modules with and without the spectrum logger, and recompute their spectra with NumPy."""

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

from stepwise_lightning import CollapseMonitor

PACKAGES = {"lightning": lightning, "pytorch_lightning": pytorch_lightning}
# Warnings of pytorch_lightning, which pyproject.toml ignores for lightning.
QUIET = [
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The `srun` command is available"),
]


class LastBatch(lightning.Callback):
    """Stores the last training batch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batch = copy.deepcopy(batch)


def train(package, module, loader, folder, *callbacks, held_out=None, **options):
    """Fit a module, by default without output files and messages."""
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
    """Return the state of the module, the optimizers and the random number generators."""
    return {
        "weights": module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "modes": [part.training for part in module.modules()],
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state(),
    }


def check(package, build, loader, folder, attached, last_step, views=None, frozen=(), **options):
    """Check that loggers do not change training and that their spectra equal spectra computed with NumPy.

    Args:
        package: ``lightning`` or ``pytorch_lightning``.
        build: function that returns the module.
        loader: training data, or a function that returns them.
        folder: folder for the files of the run.
        attached: pairs of a SpectrumLogger and, by watched name (``""`` for the output of the module), a function from
            module and view to the embeddings.
        last_step: expected last step of the records.
        views: the two views, or a function that takes them from a batch.
        frozen: name prefixes of submodules whose batch normalization is in evaluation mode.
        options: passed to :func:`train`.

    """
    traces = []
    for loggers in ([], [logger for logger, _ in attached]):
        lightning.seed_everything(1, verbose=False)
        module, latest = build(), LastBatch()
        watches = [CollapseMonitor()] if loggers else []  # an alarm is a warning, which fails the test
        callbacks = [latest, *watches, *loggers]
        trainer = train(package, module, loader() if callable(loader) else loader, folder, *callbacks, **options)
        traces.append(copy.deepcopy(trace(trainer, module)))
    assert_same(*traces)
    assert trainer.global_step in (last_step, 0)  # 0: Lightning does not count steps without its optimizers
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
            assert values[0] > 0 or matrix.endswith("normalized_covariance")  # zero in one dimension
            np.testing.assert_allclose(actual, values, rtol=1e-8, atol=1e-9 * values[0] + 1e-20, err_msg=matrix)
        first = {matrix: record.eigenvalues(matrix)[0] for matrix in expected}
        assert any(not torch.allclose(first[matrix], record.eigenvalues(matrix)[-1]) for matrix in expected)
        assert saved_arrays(logger)["step"].tolist() == steps
    return trainer, module


def saved_arrays(logger):
    """Return the saved arrays of a run."""
    with np.load(Path(logger.directory) / f"{logger.name}.npz") as file:
        return dict(file)


def with_batch_statistics(module, frozen=()):
    """Set evaluation mode, except for batch normalization that is not frozen."""
    for name, part in module.named_modules():
        part.training = isinstance(part, _BatchNorm) and not any(name.startswith(prefix) for prefix in frozen)


def spectra(embeddings):
    """Return the descending eigenvalues of the three matrices, computed with NumPy."""
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
    """Write crops of a photograph to folders of two classes."""
    photograph = data.astronaut()
    for index in range(count):
        row, column = divmod(index, 4)
        crop = photograph[row * 100 : row * 100 + size, column * 100 : column * 100 + size]
        path = Path(folder) / f"class_{index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crop).save(path)
    return folder
