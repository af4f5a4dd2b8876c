"""Images of files, tensors, data sets and streams: equal views, awkward samples, refusals."""

import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fresh_processes import ProcessServer
from PIL import Image
from recorded_batches import Recorder, fit
from tiny_runs import changed, refusal, stepwise
from tiny_sets import noise, write_cifar10
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.datasets import CIFAR10, FakeData, ImageFolder
from torchvision.transforms import v2

from stepwise_lightning import TwoViewDataModule
from stepwise_lightning.data import batch_views
from stepwise_lightning.data.batch_views import BatchTwoViews, BatchViews
from stepwise_lightning.data.image_files import pixels, read_image, rgb_image
from stepwise_lightning.data.sampling import GlobalBatchSampler, ResumableLoader, unchanged
from stepwise_lightning.data.streams import StreamTwoViews

SIDE = 20
VAL = [Image.fromarray(noise(SIDE, SIDE, 3, seed=1000 + number)) for number in range(5)]


def picture(number: int) -> Image.Image:
    """Return an image of noise; there are four sizes."""
    return Image.fromarray(noise(SIDE + number % 2, SIDE + number % 4 // 2, 3, seed=number))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


class Stream:
    """Images 0 to 29 as pairs (image, id), with the ids from ``start``."""

    def __init__(self, count: int = 30, start: int = 0) -> None:
        self.count, self.start = count, start

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return ((picture(number), self.start + number) for number in range(self.count))


class TarStream:
    """Encoded images and their names from a tar file that is read from its start to its end, as in webdataset."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[tuple[bytes, str]]:
        with tarfile.open(self.path, "r|") as tar:
            for member in tar:
                yield tar.extractfile(member).read(), member.name


def write_tar(path: Path, count: int = 30) -> Path:
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            content = encoded(picture(number))
            member = tarfile.TarInfo(f"{number:03d}.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def module(data: Any, **settings: Any) -> TwoViewDataModule:
    defaults = {"augmentation": "standard", "image_size": 8, "global_batch_size": 8, "num_probe_pairs": 2, "seed": 0}
    module = TwoViewDataModule(data, **(defaults | settings))
    module.setup("fit")
    return module


def epoch(data: TwoViewDataModule, number: int = 0) -> Tensor:
    """Return the views of all training batches of an epoch, (batches, 2, n, 3, h, w)."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return torch.stack([torch.stack([x1, x2]) for x1, x2, _ in loader])


@pytest.mark.parametrize("augmentation", ["weak", "standard"])
def test_views_of_files_data_sets_streams_and_tensors_are_equal(augmentation: str, tmp_path: Path) -> None:
    size = (140, 150)  # too large to be held in memory if read from a folder
    images = [Image.fromarray(noise(*size, 3, seed=number)) for number in range(20)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number:02d}.png")
    tensor = torch.stack([pixels(image) for image in images])
    kinds = [tensor, str(tmp_path), images, list(tensor), [np.asarray(image) for image in images]]
    modules = [module(data, augmentation=augmentation, image_size=100, global_batch_size=18) for data in kinds]
    assert [data.images("train").in_memory for data in modules] == [True, False, False, False, False]
    expected = epoch(modules[0], 1)
    for data in modules[1:]:
        assert torch.equal(epoch(data, 1), expected)
        assert all(map(torch.equal, data.probe_pairs(), modules[0].probe_pairs()))
        assert torch.equal(next(iter(data.val_dataloader()))[0], next(iter(modules[0].val_dataloader()))[0])


@pytest.mark.parametrize("max_floats", [1, 10**9])  # alone, or padded to one size as on a GPU
def test_view_is_independent_of_the_sizes_of_other_images(max_floats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_views, "_MAX_FLOATS", max_floats)
    views = BatchViews("standard", 32, (0.5,) * 3, (0.2,) * 3, seed=3)
    sizes = ((30, 90), (200, 40), (1, 1), *((300, width) for width in range(200, 440, 20)))
    images = [pixels(Image.fromarray(noise(*size, 3))) for size in sizes]
    whole = torch.stack(views(images, [2] * len(images), range(len(images))))
    for number, image in enumerate(images):
        for alone in ([image], image[None]):
            assert torch.equal(torch.stack(views(alone, [2], [number]))[:, 0], whole[:, number])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_large_files_are_reduced_to_the_needed_size(kind: str, tmp_path: Path) -> None:
    large = Image.fromarray(noise(9, 11, 3)).resize((440, 360))
    large.save(tmp_path / f"large.{kind.lower()}")
    path, min_side = tmp_path / f"large.{kind.lower()}", BatchViews("standard", 60, (0.0,) * 3, (1.0,) * 3, 0).min_side
    assert min_side == 155  # a crop of a fifth of the area, three by four, is 60 pixels high
    reduced = read_image(path, min_side=min_side)
    assert min_side <= min(reduced.size) < 2 * min_side and read_image(path).size == (440, 360)
    same = large.resize(reduced.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(reduced).astype(int) - np.asarray(same)).mean() < 3
    assert reduced.tobytes() == rgb_image(path.read_bytes(), min_side).tobytes()
    assert read_image(path, min_side=181).size == (440, 360)
    view = module([str(path)] * 20, image_size=60).train_dataloader().dataset[4, 7]
    direct = module([reduced] * 20, image_size=60).train_dataloader().dataset[4, 7]
    mean = [module([path] * 20, image_size=60).mean, module([reduced] * 20, image_size=60).mean]
    assert np.allclose(*mean, atol=0.01) and (view[0] - direct[0]).abs().mean() < 0.02


class Table:
    """Rows of a table with named columns, as in the library datasets."""

    column_names = ("image", "label")

    def __len__(self) -> int:
        return 30

    def __getitem__(self, key: int | str) -> Any:
        return [number % 3 for number in range(30)] if key == "label" else {"image": picture(key), "label": key % 3}


class Transformed(Dataset):
    """A data set with a random transform."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return v2.RandomHorizontalFlip()(picture(index)), index % 2


def cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> CIFAR10:
    return CIFAR10(str(write_cifar10(root, monkeypatch)), transform=v2.RandomCrop(24))


def image_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> ConcatDataset:
    for number in range(30):
        (root / f"class_{number % 2}").mkdir(exist_ok=True)
        picture(number).save(root / f"class_{number % 2}" / f"{number}.png")
    return ConcatDataset([ImageFolder(str(root)), Subset(ImageFolder(str(root)), range(10))])


DATA_SETS: dict[str, tuple[Any, int]] = {  # and the number of classes
    "FakeData": (lambda *_: FakeData(30, (3, SIDE, SIDE), 4), 0),
    "CIFAR10": (cifar10, 10),
    "ConcatDataset of ImageFolder and Subset": (image_folder, 2),
    "table": (lambda *_: Table(), 3),
    "random transforms": (lambda *_: Transformed(), 0),
    "gray tensors (1, h, w)": (lambda *_: torch.from_numpy(noise(30, 1, SIDE, SIDE)), 0),
    "gray arrays (h, w)": (lambda *_: noise(30, SIDE, SIDE), 0),
    "arrays with alpha (h, w, 4)": (lambda *_: noise(30, SIDE, SIDE, 4), 0),
    "arrays of 16 bits": (lambda *_: noise(30, SIDE, SIDE, 3).astype(np.uint16) << 8, 0),
    "PIL images of 16 bits": (lambda *_: [Image.fromarray(noise(9, 9).astype(np.uint16) << 8)] * 30, 0),
    "palettes": (lambda *_: [picture(number).convert("P") for number in range(30)], 0),
    "files": (lambda *_: [encoded(picture(number)) for number in range(30)], 0),
    "train and validation": (lambda *_: {"train": Table(), "validation": VAL}, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA_SETS)
def test_data_sets_of_many_kinds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, num_classes = DATA_SETS[name]
    alone, again = (module(data, num_workers=workers) for data, workers in ((make(tmp_path, monkeypatch), 0),) * 2)
    views = epoch(alone)
    assert views.isfinite().all() and views.std() > 0.1 and torch.equal(epoch(again), views)
    assert not torch.equal(epoch(alone, 1), views) and len(alone.class_names) == num_classes
    x, labels = next(iter(alone.labelled_train_dataloader())) if num_classes else next(iter(alone.val_dataloader()))
    assert x.shape[1:] == (3, 8, 8) and labels.max() < max(num_classes, 4)
    batch_labels = torch.cat([labels for _, _, labels in alone.train_dataloader()])
    assert (len(batch_labels.unique()) > 1) == (name in ("FakeData", "random transforms") or num_classes > 0)
    assert "data" not in alone.hparams


def test_images_read_by_workers_for_the_training_process_give_the_same_views() -> None:
    """On a GPU, workers only read images, and the training process computes the views."""
    data = module(Table())
    dataset = BatchTwoViews(data.images("train"), data.train_dataloader().dataset.views)
    sampler = GlobalBatchSampler(dataset, 8, seed=0)
    loader = ResumableLoader(dataset, 8, sampler=sampler, collate_fn=unchanged, num_workers=1)
    loader.finish = dataset.views_of
    assert torch.equal(torch.stack([torch.stack(batch[:2]) for batch in loader]), epoch(data))


def test_samples_without_listed_labels_are_read_for_them() -> None:
    labels = torch.cat([labels for _, labels in module(Transformed()).labelled_train_dataloader()])
    assert torch.equal(labels, torch.tensor([number % 2 for number in range(30) if number % 10 != 9]))


def test_random_transforms_of_a_data_set_are_reproducible_in_workers() -> None:
    alone, helped = (module(Transformed(), num_workers=workers) for workers in (0, 2))
    assert torch.equal(epoch(alone, 3), epoch(helped, 3))
    dataset = alone.train_dataloader().dataset
    read = {bytes(dataset.__getitems__([(number, 0)]).pixels.tolist()) for number in range(9)}
    assert len(read) == 2  # flipped in some epochs


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


@pytest.mark.parametrize(("count", "num_workers"), [(30, 2), (24, 0), (33, 2)])
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
    ("save_at", "num_workers"),
    [
        pytest.param(5, 0, id="mid-epoch"),
        pytest.param(6, 0, id="last-batch"),
        pytest.param(-1, 0, id="epoch-end"),
        pytest.param(5, 2, id="mid-epoch, workers"),
    ],
)
@pytest.mark.parametrize("kind", ["data set", "stream"])
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


class NoIds:
    """A stream of images without ids."""

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(VAL)


REFUSALS: dict[str, tuple[Any, str]] = {
    "number": (3, "data of type int have no length and random access: give a data set of images, or"),
    "stream alone": (Stream(), "data of type Stream have no length and random access: .*'train': iterable"),
    "few": (VAL, "too few images to hold some out: 5, at least 10 are needed"),
    "train alone": ({"train": VAL}, "data have the keys 'train': expected 'train' and 'val' or 'test'"),
    "key": ({"train": VAL, "dog": VAL}, "data have the keys 'train', 'dog': expected"),
    "empty": ({"train": [], "val": VAL}, "the data set is empty"),
    "iterator": ({"train": iter(Stream()), "val": VAL}, "train data of type generator: .* that can be read again"),
    "held-out stream": ({"train": VAL, "val": Stream()}, "val data of type Stream: give .* such as a list"),
    "floats": ([torch.rand(3, 8, 8)] * 10, r"type float32 and shape \(8, 8, 3\), expected uint8 .* such as ToTensor"),
    "integers": ([np.ones((8, 8, 3), int)] * 10, "values of type int64"),
    "channels": ([noise(3, 8, 8)] * 10, r"shape \(3, 8, 8\), expected uint8 or uint16, \(3, h, w\) in a tensor"),
    "float image": ([Image.new("F", (8, 8))] * 10, "pixels of mode F between 0.0 and 0.0 have no known range"),
    "dictionary": ([{"pixels": VAL[0]}] * 10, "a sample has the keys 'pixels': expected 'image' or 'img'"),
    "objects": ([object()] * 10, "an image of the data has the type object: expected a PIL image"),
    "damaged": ([b"damaged"] * 10, "an image of the data cannot be used: cannot identify image file"),
    "no pixels": ([np.zeros((0, 8, 3), np.uint8)] * 10, "8×0 pixels, at least 1×1 are needed"),
    "no id": ({"train": NoIds(), "val": VAL}, r"the stream yields Image objects that are not \(image, id\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_other_data_raise(name: str) -> None:
    data, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message) as error:
        module(data)
    assert "\n" not in str(error.value)


def test_short_stream_and_missing_size_raise() -> None:
    with pytest.raises(ValueError, match="global_batch_size 40 is larger than the stream of 30 training images"):
        epoch(module({"train": Stream(), "val": VAL}, global_batch_size=40))
    with pytest.raises(ValueError, match="image_size must be given: images of a data set are large or may differ"):
        module(Table(), image_size=None)
    with pytest.raises(ValueError, match="a stream has no labelled images for k-NN"):
        module({"train": Stream(), "val": VAL}).labelled_train_dataloader()


def test_configuration_names_a_function_or_a_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "my_data", type(sys)("my_data"))
    tar = write_tar(tmp_path / "images.tar")
    sys.modules["my_data"].make = lambda: {"train": TarStream(tar), "val": VAL}
    key, size = "data.init_args.data", {"data.init_args.image_size": 4}
    stepwise("fit", config=changed(size | {key: "my_data.make"}))
    fake = {"class_path": "torchvision.datasets.FakeData", "init_args": {"size": 20, "image_size": [3, 9, 9]}}
    stepwise("fit", config=changed(size | {key: fake}))
    for number in (0, 1):
        assert Path("runs", "lightning_logs", f"version_{number}", "spectrum.npz").exists()
    line = refusal(capsys, "fit", config=changed({key: "my_data.mak"}))
    assert "data 'my_data.mak' is no folder and cannot be imported: module 'my_data' has no attribute 'mak'" in line
