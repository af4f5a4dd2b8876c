"""Spectra of modules of stable-pretraining, with a forward function and dictionaries as batches.

``make test-peers`` does not install it: its entry point adds more than ten callbacks to every Trainer of ``lightning``,
including callbacks that write files. These tests run where it is installed, with these callbacks.
"""

import pytest
import torch
from attached import PACKAGES, QUIET, check, train
from torch import nn
from torch.utils.data import DataLoader

from stepwise_lightning import PlateauMonitor, SpectrumLogger

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection"),
]
COUNT, SIZE, WIDTH, OUT = 24, 16, 12, 8


@pytest.fixture(scope="module")
def spt():
    package = pytest.importorskip("stable_pretraining")
    pytest.importorskip("stable_pretraining.forward")
    return package


def backbone():
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, stride=2), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def projector():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, OUT))


def loader(num_views):
    """Return a loader of labelled images with one view, or a list of two views, of each."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(COUNT, 2, 3, SIZE, SIZE, generator=generator)
    pictures[:, 1] = pictures[:, 0] + 0.3 * pictures[:, 1]
    pairs = [[{"image": view, "label": index % 3} for view in pair] for index, pair in enumerate(pictures)]
    samples = [pair[0] if num_views == 1 else {"views": pair} for pair in pairs]
    return lambda: DataLoader(samples, batch_size=8, shuffle=True)


def both(batch):
    return [view["image"] for view in batch["views"]]


def embed(module, view):
    return module.backbone(view)


def project(module, view):
    return module.projector(module.backbone(view))


METHODS = {
    "simclr": lambda losses: {"simclr_loss": losses.NTXEntLoss(temperature=0.5)},
    "barlow_twins": lambda losses: {"barlow_loss": losses.BarlowTwinsLoss(0.0051)},
    "vicreg": lambda losses: {"vicreg_loss": losses.VICRegLoss()},
}


def two_views(spt, method):
    return spt.Module(
        forward=getattr(spt.forward, method), backbone=backbone(), projector=projector(),
        optim={"optimizer": {"type": "SGD", "lr": 0.05}, "scheduler": {"type": "ConstantLR", "factor": 1.0}},
        **METHODS[method](spt.losses),
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_method_of_two_views(method, spt, tmp_path):
    watched = {"backbone": embed, "project": project}
    logger = SpectrumLogger(watch=["backbone", project], output=False, views=both)
    check(PACKAGES["lightning"], lambda: two_views(spt, method), loader(2), tmp_path, [(logger, watched)], 6, both)
    assert not logger.record.losses[:-1].isnan().any()
    assert float(logger.record.times[-1]) == pytest.approx(0.3, rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_monitor_does_not_warn_of_a_run_that_learns(method, spt, tmp_path, recwarn):
    torch.manual_seed(0)
    logger = SpectrumLogger(watch=[project], output=False, views=both, num_points=40)
    module = two_views(spt, method)
    train(PACKAGES["lightning"], module, loader(2)(), tmp_path, logger, PlateauMonitor(), max_epochs=100)
    assert logger.record.losses[-2] < 0.5 * logger.record.losses[0]
    assert not [each for each in recwarn if "learned since" in str(each.message)]


def test_supervised_module_of_one_view(spt, tmp_path):
    def build():
        return spt.Module(
            forward=spt.forward.supervised, backbone=backbone(), classifier=nn.Linear(WIDTH, 3),
            supervised_loss=nn.CrossEntropyLoss(), optim={"optimizer": {"type": "AdamW", "lr": 0.01}},
        )  # fmt: skip

    logger = SpectrumLogger(watch=["backbone"], output=False)
    attached = [(logger, {"backbone": embed})]
    check(PACKAGES["lightning"], build, loader(1), tmp_path, attached, 6, lambda batch: [batch["image"]])
