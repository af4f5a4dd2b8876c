"""Streams of images: batches independent of workers and ranks, ids, and epochs."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh_processes import ProcessServer
from PIL import Image
from recorded_batches import Recorder, fit
from small_images import VAL, Stream, TarStream, epoch, module, picture, write_tar
from torch import Tensor

from stepwise_lightning.data.streams import StreamTwoViews


def test_stream_equals_a_data_set_with_the_same_ids() -> None:
    # Batches differ in order: views are compared by id.
    splits = {"train": [picture(number) for number in range(30)], "val": VAL}
    stream, data_set = module({"train": Stream(), "val": VAL}), module(splits)
    dataset = data_set.train_dataloader().dataset
    x1, x2, _ = next(iter(stream.train_dataloader()))
    assert stream.mean == data_set.mean
    for number in range(8):
        assert torch.equal(x1[number], dataset[0, number][0]) and torch.equal(x2[number], dataset[0, number][1])
    others = epoch(module({"train": Stream(start=30), "val": VAL}))
    assert not torch.equal(others[0, 0], x1) and len(others) == 3


class OneId:
    """A stream of one image with one id."""

    def __init__(self, id: int) -> None:
        self.id = id

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return iter([(VAL[0], self.id)] * 8)


def test_ids_of_a_stream_may_be_numpy_integers_and_hashes() -> None:
    x1 = [
        next(iter(module({"train": OneId(kind(id)), "val": VAL}).train_dataloader()))[0]
        for kind, id in ((int, 3), (np.int64, 3), (np.uint64, 2**63), (int, 2**63), (int, 2**127))
    ]
    assert torch.equal(x1[0], x1[1]) and torch.equal(x1[2], x1[3])
    assert not torch.equal(x1[0], x1[3]) and not torch.equal(x1[3], x1[4])


@pytest.mark.parametrize(("count", "num_workers"), [(30, 2), (24, 0), pytest.param(33, 2, marks=pytest.mark.slow)])
def test_batches_of_a_tar_stream_are_independent_of_workers_and_ranks(
    count: int, num_workers: int, tmp_path: Path
) -> None:
    data = {"train": TarStream(write_tar(tmp_path / "images.tar", count)), "val": VAL}
    alone, helped = module(data), module(data, num_workers=num_workers)
    for number in (0, 1):
        expected = epoch(alone, number)
        assert len(expected) == count // 8 and torch.equal(epoch(helped, number), expected)
        views = alone.train_dataloader().dataset.views
        ranks = [StreamTwoViews(alone.images("train"), views, "cpu", 8, 2, rank) for rank in range(2)]
        shares = [[rank.views_of(rank[number, k])[:2] for k in range(len(expected))] for rank in ranks]
        joined = torch.cat([torch.stack([torch.stack(batch) for batch in share]) for share in shares], 2)
        assert torch.equal(joined, expected)
    assert not torch.equal(epoch(alone, 0), epoch(alone, 1))


def batches_in_ddp(tar: Path) -> Tensor:
    """Return the batches of this rank, of two."""
    data = module({"train": TarStream(tar), "val": VAL})
    return torch.stack(fit(Recorder(), data, strategy="ddp", devices=2))


@pytest.mark.slow
def test_two_ranks_share_the_batches_of_a_stream(processes: ProcessServer, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "images.tar")
    shares = processes.run_ranks(2, batches_in_ddp, tar)
    joined = torch.cat([share.unflatten(1, (2, 4)) for share in shares], dim=2).flatten(1, 2)
    assert torch.equal(joined, torch.stack(fit(Recorder(), module({"train": TarStream(tar), "val": VAL}))))


@pytest.mark.parametrize(
    ("kind", "save_at", "num_workers"),
    [
        pytest.param("stream", 5, 0, id="mid-epoch"),
        pytest.param("stream", 6, 0, id="last-batch"),
        pytest.param("stream", -1, 0, id="epoch-end"),
        pytest.param("stream", 5, 2, id="mid-epoch, workers"),
        # Images of a folder are such a data set: test_data_modules.py has the other cases.
        pytest.param("data set", 5, 0, id="mid-epoch of a data set"),
        pytest.param("data set", 5, 2, id="mid-epoch of a data set, workers", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_has_the_same_batches(kind: str, save_at: int, num_workers: int, tmp_path: Path) -> None:
    data = {"data set": [picture(number) for number in range(30)], "stream": {"train": Stream(27), "val": VAL}}[kind]
    path = str(tmp_path / "saved.ckpt")
    whole = fit(Recorder(save_at, path), module(data, num_workers=num_workers))
    assert len(whole) == 9
    torch.load(path, weights_only=True)
    resumed = fit(Recorder(), module(data, num_workers=num_workers), ckpt_path=path)
    assert torch.equal(torch.stack(resumed), torch.stack(whole[6 if save_at == -1 else save_at :]))


def test_epoch_of_a_shuffling_stream_is_set() -> None:
    class Shuffled(Stream):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
            order = torch.randperm(30, generator=torch.Generator().manual_seed(self.epoch)).tolist()
            return ((picture(number), number) for number in order)

    data = module({"train": Shuffled(), "val": VAL})
    dataset = data.train_dataloader().dataset
    batches = [dataset[epoch, 0].indices for epoch in (0, 1, 0)]
    assert torch.equal(batches[0], batches[2]) and not torch.equal(batches[0], batches[1])
