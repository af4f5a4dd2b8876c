"""Lightning data module of two augmented views of each image, resampled at every epoch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from stepwise_lightning.data.augmentation import AugmentationParameters
from stepwise_lightning.data.batch_views import PROBE_EPOCH, BatchTwoViews, BatchViews
from stepwise_lightning.data.image_sets import ImageSet
from stepwise_lightning.data.own_images import ImageStream, any_image_set, imported_data
from stepwise_lightning.data.sampling import (
    BatchNumbers,
    GlobalBatchSampler,
    ResumableLoader,
    local_batch_size,
    unchanged,
)
from stepwise_lightning.data.seeded_datamodule import SeededDataModule
from stepwise_lightning.data.stl10 import JoinedImages
from stepwise_lightning.data.streams import StreamTwoViews
from stepwise_lightning.data.views import PlainImages, plain_view
from stepwise_lightning.data.workers import prepare_worker
from stepwise_lightning.errors import UserError
from stepwise_lightning.seeding import hashed_seed


class TwoViewDataModule(SeededDataModule):
    """Two augmented views of each training image, and held-out images and pairs for evaluation.

    Training batches are ``(x1, x2, label)``: two views, float32, (n, 3, image_size, image_size) each, and labels,
    int64, (n,), −1 for unknown. Losses use ``batch[:2]``; labels are for probes. Validation and test batches are
    ``(x, label)``, not augmented. All images are normalised with the mean and standard deviation of the training
    images. For the splits see :func:`stepwise_lightning.data.image_sets.load_image_set`.

    A view is a function of (seed, epoch, image, view), and the global batch at step k of (seed, k). Neither the number
    of workers or processes nor resuming changes them; see :mod:`stepwise_lightning.data.sampling`. Views are computed
    per batch, on the GPU if it trains (:class:`stepwise_lightning.data.batch_views.BatchViews`).

    Under DDP, Lightning repeats some validation and test images to get equal shares; for exact numbers, evaluate on
    one device.

    Args:
        data: ``photos``, ``cifar10``, ``stl10``, or the path of a folder of images; a data set of images, see
            :class:`stepwise_lightning.data.own_images.OwnImages`; ``{"train": …, "val": …, "test": …}`` with data sets,
            where ``train`` can be a stream of (image, id) or (image, id, label); or the dotted path of a function that
            returns such data. ``docs/inputs.md`` describes each kind.
        augmentation: ``standard``, ``weak``, ``barlow_twins`` or ``simclr``, see :class:`.AugmentationParameters`.
        image_size: side of the views in pixels; None for the shorter side of the images.
        global_batch_size: pairs per step over all processes.
        num_probe_pairs: number of held-out pairs of :meth:`probe_pairs`.
        probe_seed: seed of these pairs, independent of ``seed``: runs with different seeds use the same pairs.
        num_workers: processes per training process that read images and, without a GPU, compute views. 0 is fast enough
            for images held in memory, which always use 0 on a GPU.
        seed: seed of order and views; None for the global seed (``seed_everything``).
        root: folder of ``cifar10`` and ``stl10``.
        download: download ``cifar10`` or ``stl10`` if missing.

    Attributes:
        class_names: names of the labels 0, 1, …, after ``setup``.
        mean, std: channel statistics of the training images, in [0, 1], after ``setup``.
        seed: the seed in use, see :class:`.SeededDataModule`.

    Raises:
        ValueError: a value out of range; in ``setup``, a ``global_batch_size`` that the processes do not divide, or
            unreadable images.
        FileNotFoundError: in ``setup``, the data set is missing and ``download`` is False.

    """

    class_names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        data: str | Dataset | dict[str, Dataset] | Iterable = "photos",
        augmentation: Literal["standard", "weak", "barlow_twins", "simclr"] = "standard",
        image_size: int | None = None,
        global_batch_size: int = 64,
        num_probe_pairs: int = 256,
        probe_seed: int = 0,
        num_workers: int = 0,
        seed: int | None = None,
        root: str = "data",
        download: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=() if isinstance(data, str) else "data")
        self._set_seed(seed)
        self._data: Any = data
        AugmentationParameters.of(augmentation)  # raises for an unknown name
        for name, value, least in (("image_size", image_size, 1), ("num_probe_pairs", num_probe_pairs, 2)):
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        if num_workers < 0:
            raise UserError(f"num_workers must be 0 or more, got {num_workers}")
        local_batch_size(global_batch_size, 1)
        self._sets: dict[str, ImageSet] = {}
        self._probe: tuple[Tensor, Tensor, Tensor] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Load the images that ``stage`` needs and compute the channel statistics of the training images."""
        h = self.hparams
        local_batch_size(h["global_batch_size"], self._num_processes)
        super().setup(stage)
        if not hasattr(self, "mean"):
            train = self.images("train")
            mean, std = train.statistics()
            self.mean, self.std, self.class_names = tuple(mean.tolist()), tuple(std.tolist()), train.class_names
            self._image_size()  # raises here rather than at the first batch
        if stage in (None, "fit", "validate"):
            self.images("val")
        if stage in (None, "test"):
            self.images("test")

    def check(self, num_processes: int) -> None:
        """Load the images, and raise a ValueError for a batch size that does not fit them or the processes."""
        super().check(num_processes)
        if not isinstance(images := self.images("train"), ImageStream):
            dataset = BatchTwoViews(images, self._batch_views(0))
            GlobalBatchSampler(dataset, self.hparams["global_batch_size"], num_processes)

    def state_dict(self) -> dict[str, Any]:
        """Return seed, and the input settings of the trained model: size, normalisation, class names."""
        inputs = {"image_size": self._image_size(), "mean": self.mean, "std": self.std, "class_names": self.class_names}
        return super().state_dict() | inputs

    def train_dataloader(self) -> ResumableLoader:
        """Return a loader of batches (x1, x2, label), this process's share of every global batch."""
        h = self.hparams
        if getattr(self.trainer, "overfit_batches", 0):
            raise UserError("overfit_batches would replace the sampler: set limit_train_batches instead")
        number, rank, loading = self._num_processes, self.trainer.global_rank if self.trainer else 0, self._loading()
        dataset: BatchTwoViews | StreamTwoViews
        sampler: GlobalBatchSampler
        images, views = self.images("train"), self._batch_views(self.seed)
        if isinstance(images, ImageStream):
            dataset = StreamTwoViews(images, views, self._device, h["global_batch_size"], number, rank)
            progress = self.trainer.fit_loop.epoch_progress.current if self.trainer else None
            sampler, batch_size = BatchNumbers(getattr(progress, "processed", 0)), None
        else:
            dataset = BatchTwoViews(images, views, self._device)
            sampler = GlobalBatchSampler(dataset, h["global_batch_size"], number, rank, self.seed)
            batch_size = sampler.local_batch_size
        on_cpu = dataset.device.type == "cpu"
        if images.in_memory and not on_cpu:
            loading |= {"num_workers": 0, "persistent_workers": False}
        loading["collate_fn"] = dataset.views_of if on_cpu else unchanged
        loader = ResumableLoader(dataset, batch_size, sampler=sampler, **loading)
        loader.finish = unchanged if on_cpu else dataset.views_of
        return loader

    def val_dataloader(self) -> DataLoader[Any]:
        """Return a loader of batches (x, label) of the held-out images, not augmented, in order."""
        return self._plain_dataloader(self._plain_images("val"))

    def test_dataloader(self) -> DataLoader[Any]:
        """Return a loader of batches (x, label) of the test images, not augmented, in order."""
        return self._plain_dataloader(self._plain_images("test"))

    def labelled_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of batches (x, label) of the labelled training images, not augmented, for k-NN.

        Process r of R gets images r, r + R, …; the first images are repeated until all processes have equally many.
        ``len(loader.dataset)`` is the number of labelled images.
        """
        images = self.images("train")
        if isinstance(images, ImageStream):
            raise UserError("a stream has no labelled images for k-NN: remove OnlineKNN, or give a data set")
        labelled = (images.labels >= 0).nonzero().flatten().tolist()
        count, rank = self._num_processes, self.trainer.global_rank if self.trainer else 0
        share = [position % len(labelled) for position in range(rank, len(labelled) + -len(labelled) % count, count)]
        return self._plain_dataloader(Subset(self._plain_images("train"), labelled), share)

    def probe_pairs(self) -> tuple[Tensor, Tensor]:
        """Return two fixed views of ``num_probe_pairs`` held-out images, chosen by ``probe_seed``.

        They are augmented like training images and equal in every process and run.

        Returns:
            Views x1, x2, float32, (num_probe_pairs, 3, image_size, image_size) each.

        Raises:
            ValueError: fewer held-out images than ``num_probe_pairs``.

        """
        return self._probes()[:2]

    def probe_labels(self) -> Tensor:
        """Return the labels of :meth:`probe_pairs`, int64, (num_probe_pairs,), −1 for unknown."""
        return self._probes()[2]

    def _probes(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._probe is None:
            held_out, number, seed = self.images("val"), self.hparams["num_probe_pairs"], self.hparams["probe_seed"]
            if number > len(held_out):
                remedy = f"choose 2 to {len(held_out)}" if len(held_out) > 1 else "hold out at least 2"
                raise UserError(f"num_probe_pairs {number} is more than the {len(held_out)} held-out images: {remedy}")
            views = BatchTwoViews(held_out, self._batch_views(seed))
            generator = torch.Generator().manual_seed(hashed_seed(seed, PROBE_EPOCH, "order"))
            chosen = torch.randperm(len(held_out), generator=generator, device="cpu")[:number].tolist()
            self._probe = views.views_of(views.__getitems__([(PROBE_EPOCH, index) for index in chosen]))
        return self._probe

    @property
    def _num_processes(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def images(self, split: str) -> ImageSet:
        """Return the images of a split, ``train``, ``val`` or ``test``, loaded on first use."""
        if split not in self._sets:
            # Without download, which prepare_data does: here all processes would download at once.
            # One process per machine verifies the files.
            verify = self.trainer is None or self.trainer.local_rank == 0
            self._data = imported_data(self._data)
            self._sets[split] = any_image_set(self._data, split, self.hparams["root"], verify)
        return self._sets[split]

    def _image_size(self) -> int:
        if self.hparams["image_size"] is not None:
            return self.hparams["image_size"]
        images = self.images("train").images
        if isinstance(images, Tensor | JoinedImages):
            return min(images.shape[2:])
        data = f"the images in {self._data!r}" if isinstance(self._data, str) else "images of a data set"
        raise UserError(f"image_size must be given: {data} are large or may differ in size")

    @property
    def _device(self) -> torch.device:
        """Return the device on which views are computed: the training device if it is a CUDA device, else the CPU."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        return device if device.type == "cuda" else torch.device("cpu")

    def _batch_views(self, seed: int) -> BatchViews:
        return BatchViews(self.hparams["augmentation"], self._image_size(), self.mean, self.std, seed)

    def _plain_images(self, split: str) -> PlainImages:
        return PlainImages(self.images(split), plain_view(self._image_size(), self.mean, self.std))

    def _plain_dataloader(self, dataset: Dataset[Any], sampler: Sequence[int] | None = None) -> DataLoader[Any]:
        batch_size = local_batch_size(self.hparams["global_batch_size"], self._num_processes)
        return DataLoader(dataset, batch_size, sampler=sampler, **self._loading())

    def _loading(self) -> dict[str, Any]:
        workers = self.hparams["num_workers"]
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": self._device.type == "cuda",  # pinning initialises CUDA
            # Otherwise each new iterator consumes a number of the global generator, and validation would change the
            # training of a model with dropout.
            "generator": torch.Generator(),
            "worker_init_fn": prepare_worker,
        }
