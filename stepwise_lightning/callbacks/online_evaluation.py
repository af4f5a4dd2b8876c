"""What a representation is good for, measured while it is learned: a linear probe and k nearest neighbours.

Both are callbacks for any LightningModule whose batches carry labels. They look at the output of one submodule, with
the network in evaluation mode and without gradients; training is bit-identical with and without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from stepwise_lightning.classifiers import LinearProbe, knn_scores
from stepwise_lightning.distributed import all_gather
from stepwise_lightning.errors import UserError
from stepwise_lightning.features import capture, check_watched

__all__ = ["OnlineKNN", "OnlineLinearProbe"]

# The submodule that the shipped encoders' hidden representation is the output of.
REPRESENTATION = "encoder.backbone"


class _Evaluation(L.Callback):
    """Accuracy on labelled validation and test batches (x, label); a subclass adds ``_scores(features)``.

    Labels below 0 mean unknown and are left out. Accuracies are of all processes together; where these do not divide
    the number of images, Lightning counts a few twice.
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
        """Tell apart the states of several probes in one checkpoint."""
        return self._generate_state_key(watch=self.watch)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the submodule's name and find the number of classes."""
        check_watched(pl_module, [self.watch])
        if self.num_classes is None:
            self.num_classes = len(getattr(getattr(trainer, "datamodule", None), "class_names", ()))
        if self.num_classes < 2:
            raise UserError(
                f"{type(self).__name__} found {self.num_classes} classes in the data: use a data set with labels (a "
                "folder with a subfolder for each class), or give num_classes"
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
        if known.any():
            self._num_labels += int(known.sum())
            scores = self._scores(self._features(pl_module, batch[0][known]))
            for accuracy in self._accuracies.values():
                accuracy.update(scores, batch[1][known])

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stage = "test" if trainer.testing else "val"
        if not all_gather(torch.tensor(self._num_labels, device=pl_module.device)).any():
            raise UserError(
                f"{type(self).__name__} cannot be right or wrong: no {stage} image has a label of at least 0"
            )
        for name, accuracy in self._accuracies.items():
            # computed over all processes already; sync_dist only tells Lightning so
            pl_module.log(f"{stage}/{name}", accuracy.compute(), prog_bar=name.endswith("1"), sync_dist=True)

    def _known(self, labels: Tensor) -> Tensor:
        if len(labels) and labels.max() >= (self.num_classes or 0):
            raise UserError(
                f"{type(self).__name__} got the label {int(labels.max())}, but there are {self.num_classes} classes, "
                "counted from 0: give the right num_classes"
            )
        return labels >= 0

    def _features(self, pl_module: L.LightningModule, x: Tensor) -> Tensor:
        return capture(pl_module, [x], [self.watch], running_statistics=True)[self.watch][0].float()

    def _scores(self, features: Tensor) -> Tensor:
        raise NotImplementedError

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a new measurement."""
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
        """Count the right answers of one batch (x, label)."""
        if not trainer.sanity_checking:
            self._update(pl_module, batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the accuracies."""
        if not trainer.sanity_checking:
            self._finish(trainer, pl_module)

    # Testing is the same measurement on other images.
    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


class OnlineLinearProbe(_Evaluation):
    """Train a linear classifier on a representation while that is being learned; log its accuracy.

    After each training step the network, in evaluation mode, embeds the first view of the batch once more (one
    forward pass on half of the views), and the classifier takes one step of Adam on the cross-entropy. The features are
    standardised with running statistics first, since those of a small initialisation have any scale. Several processes
    train it on the global batch, and hold equal copies. It is kept in the checkpoint, so that resuming, and
    ``stepwise validate --ckpt_path``, go on with it.

    Logged: ``train/probe_loss``; ``val/probe_top1`` and, with more than five classes, ``val/probe_top5``; ``test/…``.

    Args:
        watch: name of the submodule whose output, flattened, is the representation.
        num_classes: None for the number of ``trainer.datamodule.class_names``.
        learning_rate: of Adam.

    Raises (when training or evaluation starts, the last three while it runs):
        ValueError: unknown submodule, no classes, a checkpoint of other classes, no labels in the training batches, an
            evaluation without a trained probe or without labels, or labels beyond the classes.

    """

    tag = "probe"

    def __init__(
        self, watch: str = REPRESENTATION, num_classes: int | None = None, learning_rate: float = 1e-3
    ) -> None:
        super().__init__(watch, num_classes)
        if not 0 <= learning_rate < float("inf"):
            raise UserError(f"learning_rate must be finite and at least 0, got {learning_rate}")
        self.learning_rate = learning_rate
        self.probe: LinearProbe | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the probe and its optimiser's state, as tensors and numbers."""
        return {} if self.probe is None else self.probe.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the probe of a checkpoint."""
        if state_dict:
            num_classes, in_features = state_dict["probe"]["1.weight"].shape
            if self.num_classes not in (None, num_classes):
                raise UserError(
                    f"the checkpoint's linear probe knows {num_classes} classes, but the data have {self.num_classes}: "
                    "use the data it was trained on"
                )
            self.probe = LinearProbe(in_features, num_classes, self.learning_rate)
            self.probe.load_state_dict(state_dict)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move a probe that has been restored, or used in an evaluation."""
        if self.probe is not None:
            self.probe.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take one step of the probe on the labelled part of the global batch (x1, x2, label)."""
        features, labels = self._features(pl_module, batch[0]), batch[-1]
        if not isinstance(labels, Tensor) or labels.shape != features.shape[:1] or labels.is_floating_point():
            raise UserError("OnlineLinearProbe needs labels, int64, (n,), as the last item of a training batch")
        if trainer.world_size > 1:
            features, labels = (all_gather(part).flatten(0, 1) for part in (features, labels))
        known = self._known(labels)
        features, labels = features[known], labels[known]
        if len(labels) < 2:  # nothing to standardise
            return
        if self.probe is None:
            assert self.num_classes is not None
            self.probe = LinearProbe(features.shape[1], self.num_classes, self.learning_rate)
            self.probe.to(features.device)
        loss = self.probe.step(features, labels)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and trainer.global_step % every == 0:
            pl_module.log("train/probe_loss", loss)

    def _scores(self, features: Tensor) -> Tensor:
        if self.probe is None:
            raise UserError(
                "the linear probe has seen no labelled image: train with it first, on batches with at least two "
                "labels, or give the checkpoint of a run with it (--ckpt_path)"
            )
        self.probe.to(features.device)
        return self.probe.scores(features)


class OnlineKNN(_Evaluation):
    """Classify held-out images by their nearest neighbours among the labelled training images; log the accuracy.

    At each validation all labelled training images are embedded without augmentation, in equal shares where there are
    several processes. The ``k`` most similar ones by cosine s vote with weight exp(s / temperature), as in Wu et al.
    2018 (arXiv 1805.01978), who take k = 200 and temperature 0.07.

    Logged: ``val/knn_top1`` and, with more than five classes, ``val/knn_top5``; ``test/…``.

    Args:
        watch: name of the submodule whose output, flattened, is the representation.
        k: number of neighbours, at most all.
        temperature: of their votes.
        num_classes: None for the number of ``trainer.datamodule.class_names``.

    Raises (when training or evaluation starts, the last two while it runs):
        ValueError: unknown submodule, no classes, a datamodule without ``labelled_train_dataloader()``, no labels, or
            labels beyond the classes.

    """

    tag = "knn"

    def __init__(
        self, watch: str = REPRESENTATION, k: int = 200, temperature: float = 0.07, num_classes: int | None = None
    ) -> None:
        if k < 1 or not 0 < temperature < float("inf"):
            raise UserError(f"k must be at least 1 and temperature positive, got {k} and {temperature}")
        super().__init__(watch, num_classes)
        self.k, self.temperature = k, temperature

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that there are images to compare with."""
        if not hasattr(getattr(trainer, "datamodule", None), "labelled_train_dataloader"):
            raise UserError(
                "OnlineKNN compares with the images of datamodule.labelled_train_dataloader(): give the Trainer a "
                "datamodule that has this method, such as TwoViewDataModule"
            )
        super().setup(trainer, pl_module, stage)

    def _start(self, pl_module: L.LightningModule) -> None:
        super()._start(pl_module)
        trainer = pl_module.trainer
        loader = trainer.datamodule.labelled_train_dataloader()  # type: ignore[attr-defined]
        features, labels = [], []
        for x, label in tqdm(
            loader, "embedding training images", leave=False, delay=2, disable=trainer.global_rank > 0 or None
        ):
            x = trainer.precision_plugin.convert_input(x)  # as Lightning does with its own batches
            features.append(normalize(self._features(pl_module, x.to(pl_module.device))))
            labels.append(label.to(pl_module.device))
        if not any(self._known(label).any() for label in labels):
            raise UserError("OnlineKNN has nothing to compare with: labelled_train_dataloader() gave no labelled image")
        bank, answers = torch.cat(features), torch.cat(labels)
        if trainer.world_size > 1:  # dealt out in turn, so that the order is that of one process
            bank, answers = (all_gather(part).transpose(0, 1).flatten(0, 1) for part in (bank, answers))
        bank, answers = bank[: len(loader.dataset)], answers[: len(loader.dataset)]
        self._bank, self._answers = bank[answers >= 0], answers[answers >= 0]

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super()._finish(trainer, pl_module)
        del self._bank, self._answers  # room for training

    def _scores(self, features: Tensor) -> Tensor:
        assert self.num_classes is not None
        return knn_scores(features, self._bank, self._answers, self.num_classes, self.k, self.temperature)
