"""Networks that are trained with accelerated gradients, by the module that everybody has: a wide one, and a ResNet."""

from __future__ import annotations

import copy
import math
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from reproduce.figures.acceleration.descent import LEARNED, Descent, Setting, Watch
from stepwise_lightning import BarlowTwins, Encoder, TwoViewDataModule
from stepwise_lightning.acceleration import last_inputs
from stepwise_lightning.classifiers import knn_scores
from stepwise_lightning.errors import DivergedError
from stepwise_lightning.features import capture
from stepwise_lightning.forecasts.simulate import unseen_batches
from stepwise_lightning.theory import feature_cross_correlation

EVERY = 2  # steps between two looks at the ResNet
NEIGHBOURS, TEMPERATURE, MOST_LABELLED = 20, 0.07, 1024
HIDDEN = "encoder.backbone"


def wide_descent(network: nn.Module, x1: Tensor, x2: Tensor, setting: Setting, most: int) -> Descent:
    """Train a copy of a network on all pairs, (n, …) each view, until all modes are learned, without ``center``."""
    module = _module(copy.deepcopy(network), setting, center=False)
    gamma = float(torch.linalg.eigvalsh(feature_cross_correlation(*features(network, x1, x2)))[-1])
    rate = setting.rate if setting.rule == "lyapunov" else setting.rate / (4 * gamma)
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=setting.momentum)
    watch = Watch(Descent(setting), most)
    while True:
        z1, z2 = module(x1), module(x2)
        if not watch.goes_on(correlation(z1.detach(), z2.detach(), center=False)):
            watch.descent.final = torch.cat([z1, z2]).detach().double()
            return watch.descent
        optimizer.zero_grad()
        module.loss(z1, z2).backward()
        optimizer.step()


def correlation(z1: Tensor, z2: Tensor, center: bool) -> Tensor:
    """Return C, (d, d), float64."""
    z1, z2 = (z.double() - (z.double().mean(0) if center else 0.0) for z in (z1, z2))
    return (z1.T @ z2 + z2.T @ z1) / (2 * len(z1))


def _module(network: nn.Module, setting: Setting, center: bool, rate: float = 1.0) -> BarlowTwins:
    acceleration: Any = setting.rule if setting.rule in ("gate", "lyapunov") else None
    return BarlowTwins(
        network, rate, off_diagonal_weight=1.0, normalize=False, center=center, acceleration=acceleration,
        momentum=setting.momentum,
    )  # fmt: skip


@torch.no_grad()
def features(network: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """Return what enters the last layer, (n, m) of either view, float64."""
    network = copy.deepcopy(network)  # the hooks that look there stay
    inputs = last_inputs(network)
    network(x1), network(x2)
    return inputs[0].double(), inputs[1].double()


class _Watching(L.Callback):
    """Looks at a ResNet every few steps, on pairs of training images with views of their own."""

    def __init__(self, data: TwoViewDataModule) -> None:
        data.setup()
        self._pairs = [view[: data.hparams["global_batch_size"]] for view in next(iter(unseen_batches(data)))[:2]]
        self._labelled = [_labelled(loader) for loader in (data.labelled_train_dataloader(), data.val_dataloader())]
        self.path: dict[int, Tensor] = {}
        self.accuracies: dict[int, float] = {}
        self.embeddings, self._last = torch.zeros(0), math.inf

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % EVERY == 0:
            trainer.should_stop = self._look(trainer.global_step, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._look(trainer.global_step, module)

    def _look(self, step: int, module: L.LightningModule) -> bool:
        """Measure, and return whether all modes have been learned for half as many steps again."""
        z1, z2 = capture(module, self._pairs, [""])[""]
        self.embeddings = torch.cat([z1 - z1.mean(0), z2 - z2.mean(0)]).double()
        self.path[step] = torch.linalg.eigvalsh(correlation(z1, z2, center=True)).flip(0)
        learned = int((self.path[step] >= LEARNED).sum())
        if learned not in self.accuracies:
            self.accuracies[learned] = self._accuracy(module)
            self._last = 1.5 * step if learned == len(z1.T) else math.inf
        return step >= self._last

    def _accuracy(self, module: L.LightningModule) -> float:
        """Return the share of held-out images that their neighbours in the hidden representation classify right."""
        (bank, labels), (images, truth) = self._labelled
        known, asked = capture(module, [bank, images], [HIDDEN])[HIDDEN]
        known, count = nn.functional.normalize(known), int(max(labels.max(), truth.max())) + 1
        scores = knn_scores(asked, known, labels, count, NEIGHBOURS, TEMPERATURE)
        return float((scores.argmax(1) == truth).double().mean())


def _labelled(loader: Any) -> tuple[Tensor, Tensor]:
    """Return the first labelled images of a loader, and their labels; those without one are of no class."""
    batches = list(islice(loader, max(1, MOST_LABELLED // max(1, loader.batch_size or 1))))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return images[labels >= 0], labels[labels >= 0]


def resnet_descent(
    data: TwoViewDataModule, dim: int, seed: int, setting: Setting, steps: int
) -> tuple[Descent, dict[int, float]]:
    """Train the small ResNet for at most so many steps on batches of fresh crops; return it, and hidden accuracies.

    The descent's ``steps`` are those until all modes are learned, NaN where they are not by the end; an accuracy is
    that of k nearest neighbours in the hidden representation when first so many modes were learned.
    """
    encoder = Encoder(dim, "resnet_small", projector_depth=2, hidden_features=128, alpha=1e-3, seed=seed)
    watching, descent = _Watching(data), Descent(setting)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=[watching], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    try:
        trainer.fit(_module(encoder, setting, True, setting.rate), datamodule=data)
    except DivergedError:
        pass  # what it had learned until then is kept
    descent.path, descent.final = watching.path, watching.embeddings
    learned = [step for step, values in descent.path.items() if float(values[-1]) >= LEARNED]
    descent.steps = float(learned[0]) if learned else float("nan")
    return descent, watching.accuracies
