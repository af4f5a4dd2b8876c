"""Lightning data module of two augmented views of each image, resampled at every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from stepwise_lightning.data.augmentation import AugmentationParameters
from stepwise_lightning.data.batch_views import BatchTwoViews, BatchViews
from stepwise_lightning.data.image_sets import ImageSet, download_images, load_image_set
from stepwise_lightning.data.sampling import GlobalBatchSampler, ResumableLoader, local_batch_size
from stepwise_lightning.data.seeded_datamodule import SeededDataModule
from stepwise_lightning.data.views import PROBE_EPOCH, PlainImages, TwoViews, plain_view, random_views
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
    of workers or processes nor resuming changes them; see :mod:`stepwise_lightning.data.sampling`. Views of images held
    in memory are computed per batch, on the GPU if it trains (:class:`stepwise_lightning.data.batch_views.BatchViews`);
    views of other images are computed one at a time.

    Under DDP, Lightning repeats some validation and test images to get equal shares; for exact numbers, evaluate on
    one device.

    Args:
        data: ``photos``, ``cifar10``, ``stl10``, or the path of a folder of images.
        augmentation: ``standard``, ``weak``, ``barlow_twins`` or ``simclr``, see :class:`.AugmentationParameters`.
        image_size: side of the views in pixels; None for the shorter side of the images.
        global_batch_size: pairs per step over all processes.
        num_probe_pairs: number of held-out pairs of :meth:`probe_pairs`.
        probe_seed: seed of these pairs, independent of ``seed``: runs with different seeds use the same pairs.
        num_workers: processes per training process that prepare batches. 0 is fast enough for images held in memory,
            which always use 0 on a GPU.
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
        data: str = "photos",
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
        self.save_hyperparameters()
        self._set_seed(seed)
        AugmentationParameters.of(augmentation)  # raises for an unknown name
        for name, value, least in (("image_size", image_size, 1), ("num_probe_pairs", num_probe_pairs, 2)):
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        if num_workers < 0:
            raise UserError(f"num_workers must be 0 or more, got {num_workers}")
        local_batch_size(global_batch_size, 1)
        self._sets: dict[str, ImageSet] = {}
        self._probe: tuple[Tensor, Tensor, Tensor] | None = None

    def prepare_data(self) -> None:
        """Download the data set if ``download`` is set (in one process per machine)."""
        if self.hparams["download"]:
            download_images(self.hparams["data"], self.hparams["root"])

    def setup(self, stage: str | None = None) -> None:
        """Load the images that ``stage`` needs and compute the channel statistics of the training images."""
        h = self.hparams
        local_batch_size(h["global_batch_size"], self._num_processes)
        super().setup(stage)
        if not hasattr(self, "mean"):
            train = self.images("train")
            mean, std = train.statistics()
            self.mean, self.std, self.class_names = tuple(mean.tolist()), tuple(std.tolist()), train.class_names
            self._image_size(train)  # raises here rather than at the first batch
        if stage in (None, "fit", "validate"):
            self.images("val")
        if stage in (None, "test"):
            self.images("test")

    def check(self, num_processes: int) -> None:
        """Load the images, and raise a ValueError for a batch size that does not fit them or the processes."""
        super().check(num_processes)
        GlobalBatchSampler(self._two_views("train", 0), self.hparams["global_batch_size"], num_processes)

    def state_dict(self) -> dict[str, Any]:
        """Return seed, and the input settings of the trained model: size, normalisation, class names."""
        size = self._image_size(self.images("train"))
        inputs = {"image_size": size, "mean": self.mean, "std": self.std, "class_names": self.class_names}
        return super().state_dict() | inputs

    def train_dataloader(self) -> ResumableLoader:
        """Return a loader of batches (x1, x2, label), this process's share of every global batch."""
        h = self.hparams
        if getattr(self.trainer, "overfit_batches", 0):
            raise UserError("overfit_batches would replace the sampler: set limit_train_batches instead")
        dataset, loading = self._two_views("train", self.seed, self._device), self._loading()
        if isinstance(dataset, BatchTwoViews):
            loading["collate_fn"] = BatchTwoViews.keep
            if dataset.device.type != "cpu":  # batches are already on the training device
                loading |= {"num_workers": 0, "persistent_workers": False, "pin_memory": False}
        rank = self.trainer.global_rank if self.trainer else 0
        sampler = GlobalBatchSampler(dataset, h["global_batch_size"], self._num_processes, rank, self.seed)
        return ResumableLoader(dataset, sampler.local_batch_size, sampler=sampler, **loading)

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
            views = self._two_views("val", seed)
            generator = torch.Generator().manual_seed(hashed_seed(seed, PROBE_EPOCH, "order"))
            chosen = torch.randperm(len(held_out), generator=generator)[:number].tolist()
            keys = [(PROBE_EPOCH, index) for index in chosen]
            if isinstance(views, BatchTwoViews):
                self._probe = views.__getitems__(keys)
            else:
                x1, x2, labels = zip(*(views[key] for key in keys), strict=True)
                self._probe = torch.stack(x1), torch.stack(x2), torch.tensor(labels)
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
            self._sets[split] = load_image_set(self.hparams["data"], split, self.hparams["root"], verify=verify)
        return self._sets[split]

    def _image_size(self, train: ImageSet) -> int:
        if self.hparams["image_size"] is not None:
            return self.hparams["image_size"]
        if not isinstance(train.images, list):
            return min(train.images.shape[2:])
        raise UserError(f"image_size must be given: the images in {self.hparams['data']!r} are large or differ in size")

    @property
    def _device(self) -> torch.device:
        """Return the device on which views are computed: the training device if it is a CUDA device, else the CPU."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        return device if device.type == "cuda" else torch.device("cpu")

    def _two_views(self, split: str, seed: int, device: torch.device | str = "cpu") -> TwoViews | BatchTwoViews:
        images, augmentation = self.images(split), self.hparams["augmentation"]
        size = self._image_size(self.images("train"))
        if not isinstance(images.images, list):
            return BatchTwoViews(images, BatchViews(augmentation, size, self.mean, self.std, seed), device)
        return TwoViews(images, random_views(augmentation, size, self.mean, self.std), seed)

    def _plain_images(self, split: str) -> PlainImages:
        transform = plain_view(self._image_size(self.images("train")), self.mean, self.std)
        return PlainImages(self.images(split), transform)

    def _plain_dataloader(self, dataset: Dataset[Any], sampler: Sequence[int] | None = None) -> DataLoader[Any]:
        batch_size = local_batch_size(self.hparams["global_batch_size"], self._num_processes)
        return DataLoader(dataset, batch_size, sampler=sampler, **self._loading())

    def _loading(self) -> dict[str, Any]:
        workers = self.hparams["num_workers"]
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # Otherwise each new iterator consumes a number of the global generator, and validation would change the
            # training of a model with dropout.
            "generator": torch.Generator(),
            "worker_init_fn": prepare_worker,
        }
