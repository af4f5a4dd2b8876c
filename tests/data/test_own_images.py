"""Images of files, tensors, data sets and streams: equal views, unusual samples, refusals."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_images import SIDE, VAL, Stream, TarStream, encoded, epoch, module, picture, write_tar
from tiny_runs import changed, refusal, stepwise
from tiny_sets import noise, write_cifar10
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.datasets import CIFAR10, FakeData, ImageFolder
from torchvision.transforms import v2

from stepwise_lightning.data import batch_views
from stepwise_lightning.data.batch_views import BatchTwoViews, BatchViews
from stepwise_lightning.data.image_files import pixels, read_image, rgb_image
from stepwise_lightning.data.sampling import GlobalBatchSampler, ResumableLoader, unchanged


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
