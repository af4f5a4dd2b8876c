"""The data of training runs: two augmented views of each image, drawn anew at every epoch."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from stepwise_lightning.data.augmentation import AugmentationParameters
from stepwise_lightning.data.batch_views import BatchTwoViews, BatchViews
from stepwise_lightning.data.image_sets import ImageSet, download_images, load_image_set
from stepwise_lightning.data.sampling import GlobalBatchSampler, ResumableLoader, local_batch_size
from stepwise_lightning.data.views import PROBE_EPOCH, PlainImages, TwoViews, plain_view, random_view
from stepwise_lightning.errors import UserError
from stepwise_lightning.seeding import hashed_seed
from stepwise_lightning.signals import STOP_SIGNALS


class TwoViewDataModule(L.LightningDataModule):
    """Two augmented views of each image for training; held-out images and pairs for measuring.

    Training batches are ``(x1, x2, label)``: two views, float32, (n, 3, image_size, image_size) each, and the labels,
    int64, (n,), −1 where unknown; losses need ``batch[:2]`` alone, labels are for probes. Validation and test batches
    are ``(x, label)``, not augmented. What each split holds: :func:`stepwise_lightning.data.image_sets.load_image_set`.
    All are normalised with the mean and standard deviation of the training images.

    A view is a function of (seed, epoch, image, view) alone and the global batch at step k of (seed, k), so that the
    number of workers, of processes, and resuming change nothing; see :mod:`stepwise_lightning.data.sampling`. Views of
    images held in memory are made in whole batches, on the GPU where one trains
    (:class:`stepwise_lightning.data.batch_views.BatchViews`; up to version 0.1.0 they were made one by one, so that
    runs with the same seed differ from those of that version as runs with another seed do); those of other folders one
    by one.

    Under DDP Lightning pads the validation and test images to a multiple of the number of processes by repeating
    some; evaluate on one device where the last digit matters.

    Args:
        data: ``photos``, ``cifar10``, ``stl10``, or the path of a folder of images.
        augmentation: ``standard`` or ``weak``, see :class:`.AugmentationParameters`.
        image_size: side of the views in pixels; None for the images' own (the shorter side).
        global_batch_size: pairs per step over all processes together.
        num_probe_pairs: how many pairs of held-out images :meth:`probe_pairs` gives.
        probe_seed: of their choice and views, apart from ``seed``: runs that differ in that are measured on the same.
        num_workers: processes that prepare batches, per training process; 0 to do it in the training process, which
            is fast enough for images held in memory, and is what is done with these on a GPU.
        seed: of order and views.
        root: where ``cifar10`` and ``stl10`` are looked for, and put.
        download: fetch ``cifar10`` or ``stl10`` if it is not there.

    Attributes (after ``setup``):
        class_names: what the labels 0, 1, … stand for.
        mean, std: of the channels of the training images, in [0, 1].

    Raises (in ``setup`` where it depends on the data or the number of processes):
        ValueError: a value out of range, ``global_batch_size`` that the processes do not divide, unreadable images.
        FileNotFoundError: the data set is not there and was not asked to be downloaded.

    """

    class_names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        data: str = "photos",
        augmentation: Literal["standard", "weak"] = "standard",
        image_size: int | None = None,
        global_batch_size: int = 64,
        num_probe_pairs: int = 256,
        probe_seed: int = 0,
        num_workers: int = 0,
        seed: int = 0,
        root: str = "data",
        download: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        AugmentationParameters.of(augmentation)  # refuses an unknown one
        for name, value, least in (("image_size", image_size, 1), ("num_probe_pairs", num_probe_pairs, 2)):
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        if num_workers < 0:
            raise UserError(f"num_workers must be 0 or more, got {num_workers}")
        local_batch_size(global_batch_size, 1)
        self._sets: dict[str, ImageSet] = {}
        self._probe: tuple[Tensor, Tensor, Tensor] | None = None

    def prepare_data(self) -> None:
        """Download, if asked to (one process of each machine only)."""
        if self.hparams["download"]:
            download_images(self.hparams["data"], self.hparams["root"])

    def setup(self, stage: str | None = None) -> None:
        """Load the images that ``stage`` needs and measure the training images."""
        h = self.hparams
        local_batch_size(h["global_batch_size"], self._num_processes)
        if not hasattr(self, "mean"):
            train = self.images("train")
            mean, std = train.statistics()
            self.mean, self.std, self.class_names = tuple(mean.tolist()), tuple(std.tolist()), train.class_names
            self._image_size(train)  # refuses here, not at the first batch
        if stage in (None, "fit", "validate"):
            self.images("val")
        if stage in (None, "test"):
            self.images("test")

    def state_dict(self) -> dict[str, Any]:
        """Return what an image needs to become an input of the trained model, which checkpoints keep."""
        size = self._image_size(self.images("train"))
        return {"image_size": size, "mean": self.mean, "std": self.std, "class_names": self.class_names}

    def train_dataloader(self) -> ResumableLoader:
        """Return batches (x1, x2, label) of this process's share of every global batch."""
        h = self.hparams
        if getattr(self.trainer, "overfit_batches", 0):
            raise UserError("overfit_batches would replace the order of samples: set limit_train_batches instead")
        dataset, loading = self._two_views("train", h["seed"], self._device), self._loading()
        if isinstance(dataset, BatchTwoViews):
            loading["collate_fn"] = BatchTwoViews.as_they_are
            if dataset.device.type != "cpu":  # made where they are trained on: nothing to prepare, pin or send
                loading |= {"num_workers": 0, "persistent_workers": False, "pin_memory": False}
        rank = self.trainer.global_rank if self.trainer else 0
        sampler = GlobalBatchSampler(dataset, h["global_batch_size"], self._num_processes, rank, h["seed"])
        return ResumableLoader(dataset, sampler.local_batch_size, sampler=sampler, **loading)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return batches (x, label) of the held-out images, not augmented, in order."""
        return self._plain_dataloader(self._plain_images("val"))

    def test_dataloader(self) -> DataLoader[Any]:
        """Return batches (x, label) of the test images, not augmented, in order."""
        return self._plain_dataloader(self._plain_images("test"))

    def labelled_train_dataloader(self) -> DataLoader[Any]:
        """Return batches (x, label) of the labelled training images, not augmented: what k-NN compares with.

        Process r of R gets images r, r + R, …; where R does not divide their number, the first ones are repeated, so
        that all processes have equally many. ``len(loader.dataset)`` is the number of labelled images.
        """
        images = self.images("train")
        labelled = (images.labels >= 0).nonzero().flatten().tolist()
        count, rank = self._num_processes, self.trainer.global_rank if self.trainer else 0
        share = [position % len(labelled) for position in range(rank, len(labelled) + -len(labelled) % count, count)]
        return self._plain_dataloader(Subset(self._plain_images("train"), labelled), share)

    def probe_pairs(self) -> tuple[Tensor, Tensor]:
        """Return two views of ``num_probe_pairs`` held-out images, drawn once by ``probe_seed``.

        They are augmented as the training images are, but never trained on, and the same in every process and run.

        Returns:
            x1, x2, float32, (num_probe_pairs, 3, image_size, image_size) each.

        Raises:
            ValueError: fewer held-out images than ``num_probe_pairs``.

        """
        return self._probes()[:2]

    def probe_labels(self) -> Tensor:
        """Return the labels of the images of :meth:`probe_pairs`, int64, (num_probe_pairs,), −1 where unknown."""
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
            addresses = [(PROBE_EPOCH, index) for index in chosen]
            if isinstance(views, BatchTwoViews):
                self._probe = views.__getitems__(addresses)
            else:
                x1, x2, labels = zip(*(views[address] for address in addresses), strict=True)
                self._probe = torch.stack(x1), torch.stack(x2), torch.tensor(labels)
        return self._probe

    @property
    def _num_processes(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def images(self, split: str) -> ImageSet:
        """Return the images of a split, ``train``, ``val`` or ``test``, loaded when they are first asked for."""
        if split not in self._sets:
            # prepare_data has downloaded what was to be: here, all processes at once would try to.
            self._sets[split] = load_image_set(self.hparams["data"], split, self.hparams["root"])
        return self._sets[split]

    def _image_size(self, train: ImageSet) -> int:
        if self.hparams["image_size"] is not None:
            return self.hparams["image_size"]
        if isinstance(train.images, Tensor):
            return min(train.images.shape[2:])
        raise UserError(f"image_size must be given: the images in {self.hparams['data']!r} are large or differ in size")

    @property
    def _device(self) -> torch.device:
        """The device that trains if views can be made there: a CUDA device."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        return device if device.type == "cuda" else torch.device("cpu")

    def _two_views(self, split: str, seed: int, device: torch.device | str = "cpu") -> TwoViews | BatchTwoViews:
        images, augmentation = self.images(split), self.hparams["augmentation"]
        size = self._image_size(self.images("train"))
        if isinstance(images.images, Tensor):
            return BatchTwoViews(images, BatchViews(augmentation, size, self.mean, self.std, seed), device)
        return TwoViews(images, random_view(augmentation, size, self.mean, self.std), seed)

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
            # Otherwise each new iterator takes a number from the global generator, and a model with dropout would
            # train differently when someone looks at the validation images.
            "generator": torch.Generator(),
            "worker_init_fn": _outlive_signals,
        }


def _outlive_signals(worker: int) -> None:
    """Leave it to the training process to end in good order; its end ends the workers too."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
