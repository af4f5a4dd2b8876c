"""Samplers and loader whose global batches depend neither on the number of processes nor on resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from stepwise_lightning.errors import UserError
from stepwise_lightning.seeding import hashed_seed


class GlobalBatchSampler(DistributedSampler[Any]):
    """Yield one rank's share of every global batch as keys (epoch, index).

    The samples are permuted by (seed, epoch) and divided into global batches; an incomplete last batch is dropped.
    Rank r of R gets the r-th of R equal slices of each global batch: step k uses the same samples for every R.

    Lightning keeps a DistributedSampler under DDP and sets its epoch.
    """

    def __init__(
        self, dataset: Dataset[Any], global_batch_size: int, num_replicas: int = 1, rank: int = 0, seed: int = 0
    ) -> None:
        assert isinstance(dataset, Sized)
        super().__init__(dataset, num_replicas, rank, seed=seed, drop_last=True)
        self.local_batch_size = local_batch_size(global_batch_size, num_replicas)
        self.global_batch_size = global_batch_size
        self.num_batches = len(dataset) // global_batch_size
        if len(dataset) < 2:
            raise UserError(
                f"the data set has {len(dataset)} training image, but the losses compare samples: add more images"
            )
        if not self.num_batches:
            raise UserError(
                f"global_batch_size {global_batch_size} is larger than the {len(dataset)} training images: "
                f"choose 2 to {len(dataset)}"
            )
        self.num_images = len(dataset)
        self.skip = 0  # batches of this epoch that were completed before resuming

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the permutation; a new epoch starts at its first batch."""
        if epoch != self.epoch:
            self.epoch, self.skip = epoch, 0

    def __len__(self) -> int:
        return self.num_batches * self.local_batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(hashed_seed(self.seed, self.epoch, "order"))
        order = torch.randperm(self.num_images, generator=generator, device="cpu")
        order = order[: self.num_batches * self.global_batch_size]
        share = order.view(self.num_batches, self.num_replicas, self.local_batch_size)[self.skip :, self.rank]
        return iter([(self.epoch, index) for index in share.flatten().tolist()])


class BatchNumbers(GlobalBatchSampler):
    """Yield the keys (epoch, 0), (epoch, 1), … of the batches of a stream, whose number is unknown.

    Lightning reads the first batch of a stream before it sets the epoch.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch, self.skip = epoch, 0

    def __len__(self) -> int:
        raise TypeError("a stream has no length")

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, number) for number in count(self.skip))


def local_batch_size(global_batch_size: int, num_replicas: int) -> int:
    """Return the number of samples per rank and step; ValueError if the ranks do not divide the batch."""
    if global_batch_size < 2:
        raise UserError(
            f"global_batch_size must be at least 2, because the losses compare samples, got {global_batch_size}"
        )
    if global_batch_size % num_replicas:
        nearest = max(1, round(global_batch_size / num_replicas)) * num_replicas
        raise UserError(
            f"global_batch_size {global_batch_size} cannot be divided among {num_replicas} processes: "
            f"choose a multiple of {num_replicas}, for example {nearest}"
        )
    return global_batch_size // num_replicas


def unchanged(batch: Any) -> Any:
    """Return a batch unchanged."""
    return batch


class ResumableLoader(DataLoader[Any]):
    """DataLoader over a :class:`GlobalBatchSampler` that resumes within an epoch.

    Lightning stores ``state_dict()`` in its checkpoints. It counts the batches yielded, without those that workers have
    prefetched. A batch ``None`` ends the epoch.

    Attributes:
        finish: function that is applied to each batch in the training process.

    """

    sampler: GlobalBatchSampler
    finish: Callable[[Any], Any] = staticmethod(unchanged)
    _state: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # promises its own iterator class
        # A generator starts at the first next(). Lightning requests the iterator before it sets the epoch of a resumed
        # run, and workers would prefetch batches of the wrong epoch.
        done, epoch = self.sampler.skip, self.sampler.epoch
        ahead = isinstance(self.sampler, BatchNumbers)  # Lightning reads one batch ahead if the length is unknown
        for batch in super().__iter__():
            self.sampler.skip = 0
            if batch is None:
                self._state = {"epoch": epoch + 1, "batches": 0}
                return
            done += 1
            self._state = {"epoch": epoch, "batches": done - ahead}
            yield self.finish(batch)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches yielded, for a stream without the last one."""
        return self._state or {"epoch": self.sampler.epoch, "batches": 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume after the last batch that ``state`` counts."""
        finished = not isinstance(self.sampler, BatchNumbers) and state["batches"] >= len(self)
        self.sampler.set_epoch(state["epoch"] + finished)
        self.sampler.skip = 0 if finished else state["batches"]
        self._state = {"epoch": self.sampler.epoch, "batches": self.sampler.skip}
