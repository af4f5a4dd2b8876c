"""Base class of callbacks that evaluate a representation on labelled images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from stepwise_lightning.distributed import all_gather
from stepwise_lightning.errors import UserError
from stepwise_lightning.features import capture, check_watched


class Evaluation(L.Callback):
    """Accuracy on labelled validation and test batches (x, label). A subclass defines ``_scores(features)``.

    Negative labels mean unknown and are ignored. Accuracies cover all ranks; if their number does not divide the number
    of images, Lightning counts a few images twice.
    """

    tag: str

    def __init__(self, watch: str, num_classes: int | None) -> None:
        if num_classes is not None and num_classes < 2:
            raise UserError(f"num_classes must be at least 2, got {num_classes}")
        self.watch, self.num_classes = watch, num_classes
        self._accuracies: dict[str, MulticlassAccuracy] = {}
        self._num_labels = 0

    @property
    def state_key(self) -> str:
        """Key of this callback in checkpoints, which may hold several probes."""
        return self._generate_state_key(watch=self.watch)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the name of the submodule and find the number of classes."""
        check_watched(pl_module, [self.watch])
        if self.num_classes is None:
            self.num_classes = len(getattr(getattr(trainer, "datamodule", None), "class_names", ()))
        if self.num_classes < 2:
            raise UserError(
                f"{type(self).__name__} found {self.num_classes} classes in the data: use a data set with labels (a "
                "folder with a subfolder for each class), or set num_classes"
            )
        ranks = [1, 5] if self.num_classes > 5 else [1]
        self._accuracies = {
            f"{self.tag}_top{k}": MulticlassAccuracy(self.num_classes, top_k=k, average="micro") for k in ranks
        }

    def _start(self, pl_module: L.LightningModule) -> None:
        self._num_labels = 0
        for accuracy in self._accuracies.values():
            accuracy.to(pl_module.device).reset()

    def _update(self, pl_module: L.LightningModule, batch: Sequence[Tensor]) -> None:
        known = self._known(batch[1])
        number = int(known.sum())
        # Without labels one image, because the ranks of a sharded module must run it equally often.
        features = self._features(pl_module, batch[0][known] if number else batch[0][:1])
        if number:
            self._num_labels += number
            scores = self._scores(features)
            for accuracy in self._accuracies.values():
                accuracy.update(scores, batch[1][known])

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stage = "test" if trainer.testing else "val"
        if not all_gather(torch.tensor(self._num_labels, device=pl_module.device)).any():
            raise UserError(
                f"{type(self).__name__} needs labelled images, but no {stage} image has a label of at least 0: use "
                "labelled data"
            )
        for name, accuracy in self._accuracies.items():
            with warnings.catch_warnings():  # of a rank without labels
                warnings.filterwarnings("ignore", "The ``compute`` method of metric MulticlassAccuracy was called befo")
                value = accuracy.compute()
            # already computed over all ranks; sync_dist avoids a warning of Lightning
            pl_module.log(f"{stage}/{name}", value, prog_bar=name.endswith("1"), sync_dist=True)

    def _known(self, labels: Tensor) -> Tensor:
        if len(labels) and labels.max() >= (self.num_classes or 0):
            raise UserError(
                f"{type(self).__name__} got the label {int(labels.max())}, but there are {self.num_classes} classes, "
                "counted from 0: correct num_classes"
            )
        return labels >= 0

    def _features(self, pl_module: L.LightningModule, x: Tensor) -> Tensor:
        watched = capture(pl_module, [x], [self.watch], running_statistics=True, training_precision=True)
        return watched[self.watch][0].float()

    def _scores(self, features: Tensor) -> Tensor:
        raise NotImplementedError

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the accuracies."""
        if not trainer.sanity_checking:
            self._start(pl_module)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the accuracies with one batch (x, label)."""
        if not trainer.sanity_checking:
            self._update(pl_module, batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the accuracies."""
        if not trainer.sanity_checking:
            self._finish(trainer, pl_module)

    # Testing is the same on other images.
    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
