"""Train a wide network and a small ResNet with accelerated gradients."""

from __future__ import annotations

import copy
import math
from typing import Any, get_args

import lightning as L
import torch
from torch import Tensor, nn

from reproduce.figures.acceleration.descent import LEARNED, ConvergenceMonitor, Descent, Setting
from reproduce.networks.labelled import labelled_images
from stepwise_lightning import BarlowTwins, Encoder, TwoViewDataModule
from stepwise_lightning.callbacks.classifiers import knn_scores
from stepwise_lightning.errors import DivergedError
from stepwise_lightning.features import capture
from stepwise_lightning.forecasts.simulate import unseen_batches
from stepwise_lightning.modules.acceleration import AcceleratedBarlowTwins, Acceleration, record_last_inputs
from stepwise_lightning.theory import feature_cross_correlation

MEASURED_EVERY = 2  # steps between two measurements of the ResNet
NEIGHBOURS, TEMPERATURE, MAX_LABELLED = 20, 0.07, 1024
HIDDEN = "encoder.backbone"


def train_wide_network(network: nn.Module, x1: Tensor, x2: Tensor, setting: Setting, max_steps: int) -> Descent:
    """Train a copy of a network on all pairs, (n, …) each view, until all modes are learned, without ``center``."""
    module = _module(copy.deepcopy(network), setting, center=False)
    gamma = float(torch.linalg.eigvalsh(feature_cross_correlation(*last_layer_inputs(network, x1, x2)))[-1])
    rate = setting.rate if setting.rule == "lyapunov" else setting.rate / (4 * gamma)
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=setting.momentum)
    monitor = ConvergenceMonitor(Descent(setting), max_steps)
    while True:
        z1, z2 = module(x1), module(x2)
        if not monitor.update(correlation(z1.detach(), z2.detach(), center=False)):
            monitor.descent.final = torch.cat([z1, z2]).detach().double()
            return monitor.descent
        optimizer.zero_grad()
        module.loss(z1, z2).backward()
        optimizer.step()


def correlation(z1: Tensor, z2: Tensor, center: bool) -> Tensor:
    """Return C, (d, d), float64."""
    z1, z2 = (z.double() - (z.double().mean(0) if center else 0.0) for z in (z1, z2))
    return (z1.T @ z2 + z2.T @ z1) / (2 * len(z1))


def _module(network: nn.Module, setting: Setting, center: bool, rate: float = 1.0) -> BarlowTwins:
    settings: dict[str, Any] = {"center": center, "momentum": setting.momentum}
    if setting.rule in get_args(Acceleration):
        return AcceleratedBarlowTwins(network, rate, setting.rule, **settings)  # type: ignore[arg-type]
    return BarlowTwins(network, rate, off_diagonal_weight=1.0, normalize=False, **settings)


@torch.no_grad()
def last_layer_inputs(network: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs of the last layer for both views, (n, m) each, float64."""
    network = copy.deepcopy(network)  # record_last_inputs leaves hooks in the network
    inputs = record_last_inputs(network)
    network(x1), network(x2)
    return inputs[0].double(), inputs[1].double()


class _ResNetMonitor(L.Callback):
    """Measure eigenvalues and hidden accuracy during training, on training images with separate views."""

    def __init__(self, data: TwoViewDataModule) -> None:
        data.setup()
        self._pairs = [view[: data.hparams["global_batch_size"]] for view in next(iter(unseen_batches(data)))[:2]]
        loaders = data.labelled_train_dataloader(), data.val_dataloader()
        self._labelled = [labelled_images(loader.dataset, MAX_LABELLED) for loader in loaders]
        self.path: dict[int, Tensor] = {}
        self.accuracies: dict[int, float] = {}
        self.embeddings, self._last = torch.zeros(0), math.inf

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % MEASURED_EVERY == 0:
            trainer.should_stop = self._measure(trainer.global_step, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._measure(trainer.global_step, module)

    def _measure(self, step: int, module: L.LightningModule) -> bool:
        """Measure, and return True if 1.5 times the steps to learn all modes have passed."""
        z1, z2 = capture(module, self._pairs, [""])[""]
        self.embeddings = torch.cat([z1 - z1.mean(0), z2 - z2.mean(0)]).double()
        self.path[step] = torch.linalg.eigvalsh(correlation(z1, z2, center=True)).flip(0)
        learned = int((self.path[step] >= LEARNED).sum())
        if learned not in self.accuracies:
            self.accuracies[learned] = self._accuracy(module)
            self._last = 1.5 * step if learned == len(z1.T) else math.inf
        return step >= self._last

    def _accuracy(self, module: L.LightningModule) -> float:
        """Return the k-nearest-neighbour accuracy of the hidden representation on held-out images."""
        (bank, labels), (images, true_labels) = self._labelled
        train_features, test_features = capture(module, [bank, images], [HIDDEN])[HIDDEN]
        num_classes = int(max(labels.max(), true_labels.max())) + 1
        train_features = nn.functional.normalize(train_features)
        scores = knn_scores(test_features, train_features, labels, num_classes, NEIGHBOURS, TEMPERATURE)
        return float((scores.argmax(1) == true_labels).double().mean())


def train_resnet(
    data: TwoViewDataModule, dim: int, seed: int, setting: Setting, max_steps: int
) -> tuple[Descent, dict[int, float]]:
    """Train the small ResNet on batches of new crops.

    Returns:
        Descent, and the k-nearest-neighbour accuracy of the hidden representation by number of learned modes, measured
        when that number is first reached.

    """
    encoder = Encoder(dim, "resnet_small", projector_depth=2, hidden_features=128, alpha=1e-3, seed=seed)
    monitor, descent = _ResNetMonitor(data), Descent(setting)
    trainer = L.Trainer(
        max_steps=max_steps, accelerator="cpu", callbacks=[monitor], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    try:
        trainer.fit(_module(encoder, setting, True, setting.rate), datamodule=data)
    except DivergedError:
        pass  # the measurements before divergence are valid
    descent.path, descent.final = monitor.path, monitor.embeddings
    learned = [step for step, values in descent.path.items() if float(values[-1]) >= LEARNED]
    descent.steps = float(learned[0]) if learned else float("nan")
    return descent, monitor.accuracies
