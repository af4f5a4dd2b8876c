"""Online evaluation of a representation by a linear probe and by k nearest neighbours.

Both are callbacks for any LightningModule with labelled batches. They use the output of one submodule, with the network
in evaluation mode and without gradients. Training is bit-identical with and without them.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from stepwise_lightning.asynchronous import CopyToCPU, to_device
from stepwise_lightning.callbacks.classifiers import LinearProbe, knn_scores
from stepwise_lightning.callbacks.evaluation import Evaluation
from stepwise_lightning.distributed import all_gather
from stepwise_lightning.errors import UserError

# Submodule of the encoders of this package whose output is the hidden representation.
REPRESENTATION = "encoder.backbone"


class OnlineLinearProbe(Evaluation):
    """Train a linear classifier on a representation during training; log its accuracy.

    After each training step the network, in evaluation mode and in the precision of training, computes features of the
    first view of the labelled images of the batch (an additional forward pass on at most half of the views), and the
    classifier takes one step of Adam on the cross-entropy.
    Features are standardised with running statistics, because their scale is arbitrary with a small initialisation. All
    ranks train equal copies on the global batch. Checkpoints contain the probe; resuming and ``stepwise validate
    --ckpt_path`` restore it.

    Logged: ``train/probe_loss``; ``val/probe_top1`` and, with more than five classes, ``val/probe_top5``; ``test/…``.

    Args:
        watch: name of the submodule whose flattened output is the representation.
        num_classes: number of classes; None for the number of ``trainer.datamodule.class_names``.
        learning_rate: learning rate of Adam.

    Raises:
        ValueError: an unknown submodule, no classes, a checkpoint with another number of classes, no labels in the
            training batches, an evaluation without a trained probe or without labels, or labels out of range.

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
        self._copied_labels: CopyToCPU | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the probe and its optimiser."""
        return {} if self.probe is None else self.probe.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the probe of a checkpoint."""
        if state_dict:
            num_classes, in_features = state_dict["probe"]["1.weight"].shape
            if self.num_classes not in (None, num_classes):
                raise UserError(
                    f"the linear probe in the checkpoint has {num_classes} classes, but the data have "
                    f"{self.num_classes}: use the data it was trained on"
                )
            self.probe = LinearProbe(in_features, num_classes, self.learning_rate)
            self.probe.load_state_dict(state_dict)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move the probe to the device of the module."""
        if self.probe is not None:
            self.probe.to(pl_module.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Copy the labels of the global batch to the CPU while the network trains."""
        labels = batch[-1]
        if not isinstance(labels, Tensor) or labels.shape != batch[0].shape[:1] or labels.is_floating_point():
            raise UserError(
                "OnlineLinearProbe needs integer labels (n,) as the last item of a training batch: use labelled data"
            )
        self._copied_labels = CopyToCPU(all_gather(labels) if trainer.world_size > 1 else labels[None])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Train the probe for one step on the labelled part of the global batch (x1, x2, label)."""
        assert self._copied_labels is not None
        labels, self._copied_labels = self._copied_labels.result(), None
        known = self._known(labels)
        if known.sum() < 2:  # standardisation needs two samples
            return
        features = self._labelled_features(pl_module, batch[0], known, trainer.global_rank)
        if self.probe is None:
            assert self.num_classes is not None
            self.probe = LinearProbe(features.shape[1], self.num_classes, self.learning_rate)
            self.probe.to(features.device)
        loss = self.probe.step(features, to_device(labels[known], features.device))
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and trainer.global_step % every == 0:
            pl_module.log("train/probe_loss", loss)

    def _labelled_features(self, pl_module: L.LightningModule, x: Tensor, known: Tensor, rank: int) -> Tensor:
        """Return the features of all ranks' images with ``known`` labels, bool, (ranks, n), on the CPU."""
        counts = known.sum(1)
        largest = int(counts.max())
        # Ranks with fewer labels embed their first image again, because shards must be equal.
        chosen = torch.cat([known[rank].nonzero().flatten(), counts.new_zeros(largest - int(counts[rank]))])
        features = self._features(pl_module, x.index_select(0, to_device(chosen, x.device)))
        if len(known) == 1:
            return features
        rows = (torch.arange(largest) < counts[:, None]).flatten().nonzero().flatten()
        return all_gather(features).flatten(0, 1).index_select(0, to_device(rows, x.device))

    def _scores(self, features: Tensor) -> Tensor:
        if self.probe is None:
            raise UserError(
                "the linear probe is untrained: train it first, on batches with at least two labelled images, or use a "
                "checkpoint that contains it (--ckpt_path)"
            )
        self.probe.to(features.device)
        return self.probe.scores(features)


class OnlineKNN(Evaluation):
    """Classify held-out images by their nearest neighbours among the labelled training images; log the accuracy.

    Each validation computes features of all labelled training images without augmentation, in equal shares on all
    ranks. The ``k`` images of the largest cosine similarity s vote with weight exp(s / temperature), as in Wu et al.
    2018 (arXiv 1805.01978), with their k = 200 and temperature 0.07.

    Logged: ``val/knn_top1`` and, with more than five classes, ``val/knn_top5``; ``test/…``.

    Args:
        watch: name of the submodule whose flattened output is the representation.
        k: number of neighbours; all if there are fewer.
        temperature: temperature of the votes.
        num_classes: number of classes; None for the number of ``trainer.datamodule.class_names``.

    Raises:
        ValueError: an unknown submodule, no classes, a datamodule without ``labelled_train_dataloader()``, no labels,
            or labels out of range.

    """

    tag = "knn"

    def __init__(
        self, watch: str = REPRESENTATION, k: int = 200, temperature: float = 0.07, num_classes: int | None = None
    ) -> None:
        if k < 1 or not 0 < temperature < float("inf"):
            raise UserError(f"k must be at least 1 and temperature positive, got {k} and {temperature}")
        super().__init__(watch, num_classes)
        self.k, self.temperature = k, temperature
        self._loader: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the datamodule has labelled training images."""
        if not hasattr(getattr(trainer, "datamodule", None), "labelled_train_dataloader"):
            raise UserError(
                "OnlineKNN needs datamodule.labelled_train_dataloader(): give the Trainer a datamodule that has this "
                "method, such as TwoViewDataModule"
            )
        super().setup(trainer, pl_module, stage)
        self._loader = None

    def _start(self, pl_module: L.LightningModule) -> None:
        super()._start(pl_module)
        trainer = pl_module.trainer
        if self._loader is None:  # kept, with its workers, for later validations
            self._loader = trainer.datamodule.labelled_train_dataloader()  # type: ignore[attr-defined]
        loader, features, labels = self._loader, [], []
        for x, label in tqdm(
            loader, "embedding training images", leave=False, delay=2, disable=trainer.global_rank > 0 or None
        ):
            x = trainer.precision_plugin.convert_input(x)  # as Lightning does for training batches
            features.append(normalize(self._features(pl_module, x.to(pl_module.device))))
            labels.append(label.to(pl_module.device))
        if not any(self._known(label).any() for label in labels):
            raise UserError(
                "OnlineKNN needs labelled training images, but labelled_train_dataloader() returned none: use labelled "
                "data"
            )
        bank, classes = torch.cat(features), torch.cat(labels)
        if trainer.world_size > 1:  # restore the order of one process from interleaved shards
            bank, classes = (all_gather(part).transpose(0, 1).flatten(0, 1) for part in (bank, classes))
        bank, classes = bank[: len(loader.dataset)], classes[: len(loader.dataset)]
        self._bank, self._labels = bank[classes >= 0], classes[classes >= 0]

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super()._finish(trainer, pl_module)
        del self._bank, self._labels  # free memory for training

    def _scores(self, features: Tensor) -> Tensor:
        assert self.num_classes is not None
        return knn_scores(features, self._bank, self._labels, self.num_classes, self.k, self.temperature)
