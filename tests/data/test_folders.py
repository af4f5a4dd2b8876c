"""Split folders into training and held-out images, and list ignored files."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from tiny_sets import fill, noise

from stepwise_lightning import TwoViewDataModule
from stepwise_lightning.data.folders import list_images, split_name
from stepwise_lightning.data.image_files import read_image
from stepwise_lightning.data.image_sets import load_image_set, load_images


def sizes(folder: Path) -> list[int]:
    return [len(load_image_set(str(folder), split)) for split in ("train", "val", "test")]


NAMES = {
    "train": "train", "Training": "train", "TRAIN": "train", "train2017": "train", "seg_train": "train",
    "training_set": "train", "trainset": "train", "train_images": "train", "validation": "val", "valid": "val",
    "dev": "val", "eval": "val", "holdout": "val", "held-out": "val", "Val": "val", "val2017": "val", "test": "test",
    "Testing": "test", "test_set": "test", "testset": "test", "seg_test": "test", "cat": "", "trains": "", "data": "",
}  # fmt: skip


def test_usual_names_of_splits_are_recognised() -> None:
    assert {name: split_name(name) for name in NAMES} == NAMES


@pytest.mark.parametrize("names", [("Training", "held-out"), ("train2017", "test_set")], ids="-".join)
def test_split_folders_share_class_names(names: tuple[str, str], tmp_path: Path) -> None:
    for seed, name in enumerate(names):
        for label, kind in enumerate(("cat", "dog")):
            fill(tmp_path / name / kind, 3 - seed, seed=2 * seed + label)
    assert sizes(tmp_path) == [6, 4, 4]
    for split in ("train", "val"):
        images = load_image_set(str(tmp_path), split)
        assert images.class_names == ["cat", "dog"] and images.labels.unique().tolist() == [0, 1]


def test_folders_beside_three_splits_are_ignored_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for seed, name in enumerate(("Train", "DEV", "testing", "extra")):
        fill(tmp_path / name / "cat", 4 - seed, seed)
    (tmp_path / "readme.txt").touch()
    with caplog.at_level(logging.INFO):
        assert sizes(tmp_path) == [4, 3, 2]
    assert [record.message for record in caplog.records] == [
        f"left out of {str(tmp_path)!r}: 1 .txt, 1 folder beside the splits ('extra')"
    ]


@pytest.mark.parametrize("pair", [("val", "validation"), ("Train", "train")])
def test_two_folders_for_one_split_raise(pair: tuple[str, str], tmp_path: Path) -> None:
    for name in {"train", "test", *pair}:
        fill(tmp_path / name)
    with pytest.raises(ValueError, match=f"{min(pair)!r}, {max(pair)!r} in .* all named for one split.*: keep one$"):
        load_image_set(str(tmp_path))


@pytest.mark.parametrize("inside", ["dataset", "a/b/c"])
def test_split_folders_may_be_nested(inside: str, tmp_path: Path) -> None:
    fill(tmp_path / "__MACOSX" / inside / "train")
    (tmp_path / "labels").mkdir()
    for name in ("train", "val"):
        fill(tmp_path / inside / name / "cat", 5 - len(name) // 2)
    assert sizes(tmp_path) == [3, 4, 4] and load_image_set(str(tmp_path)).class_names == ["cat"]
    (tmp_path / inside / "train" / "notes.txt").touch()
    assert sizes(tmp_path) == [3, 4, 4]


def test_nested_split_folder_of_the_same_name(tmp_path: Path) -> None:
    for part in ("seg_train", "seg_test"):
        for kind in ("forest", "sea"):
            fill(tmp_path / part / part / kind)
    assert load_image_set(str(tmp_path)).class_names == ["forest", "sea"] and sizes(tmp_path) == [6, 6, 6]


@pytest.mark.parametrize("inside", ["train", "data/Training"])
def test_train_alone_holds_out_every_tenth_file_and_keeps_classes(inside: str, tmp_path: Path) -> None:
    fill(tmp_path / inside / "cat", 12)
    fill(tmp_path / inside / "dog", 8)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "boxes.json").touch()
    assert load_image_set(str(tmp_path)).class_names == ["cat", "dog"] and sizes(tmp_path) == [18, 2, 2]


def test_train_among_classes_is_a_class_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for seed, name in enumerate(("bus", "plane", "train")):
        fill(tmp_path / name, 4, seed)
    with caplog.at_level(logging.INFO):
        assert load_image_set(str(tmp_path)).class_names == ["bus", "plane", "train"]
    assert "'bus', 'plane', 'train' in" in caplog.text and "are read as classes" in caplog.text


AMBIGUOUS = {
    "other folders beside the classes of train": (["train/cat", "train/dog", "other/cat"], "'train' in .* is named"),
    "nothing to train on": (["val/cat", "test/cat"], "'test', 'val' in .* are named for a split, which needs train/"),
    "test among classes": (["cat", "dog", "test"], "'test' in .* is named for a split"),
    "two data sets": (["a/train", "a/val", "b/train", "b/val"], "a' is split into folders, but there are images"),
    "classes that are split": (["cat/train", "cat/test", "dog/train", "dog/test"], "cat' is split into folders"),
    "images beside a split one": (["", "a/train", "a/val"], "a' is split into folders"),
    "images beside train": (["", "train/cat"], "'train' in .* is named for a split"),
}


@pytest.mark.parametrize(("folders", "message"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_ambiguous_folders_raise(folders: list[str], message: str, tmp_path: Path) -> None:
    for folder in folders:
        fill(tmp_path / folder, 6)
    with pytest.raises(ValueError, match=message) as error:
        load_image_set(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["folder", "link", "hard link", "split"])
def test_links_between_splits_raise(kind: str, tmp_path: Path) -> None:
    shared, root = fill(tmp_path / "elsewhere" / "cat"), tmp_path / "root"
    for part in ("train", "val"):
        place = root / part / "cat"
        place.parent.mkdir(parents=True)
        if kind == "folder":
            place.symlink_to(shared)
        elif kind == "split":
            place.parent.rmdir()
            place.parent.symlink_to(shared.parent)
        else:
            fill(place, 3, seed=len(part))
            (os.link if kind == "hard link" else os.symlink)(shared / "00.png", place / "shared.png")
    with pytest.raises(ValueError, match="links put an image into both the training and the held-out images") as error:
        load_image_set(str(root))
    assert "val/cat" in str(error.value) and "train/cat" in str(error.value) and "\n" not in str(error.value)


def test_links_between_training_and_held_out_tenths_raise(tmp_path: Path) -> None:
    fill(tmp_path, 12)
    os.link(tmp_path / "00.png", tmp_path / "00b.png")  # both are training images
    assert sizes(tmp_path) == [12, 1, 1]
    (tmp_path / "08.png").unlink()
    (tmp_path / "08.png").symlink_to("00.png")  # the tenth file
    with pytest.raises(ValueError, match=r"08\.png' is '.*00b?\.png'; remove one of the two names"):
        load_image_set(str(tmp_path))


def test_val_and_test_may_be_one_folder(tmp_path: Path) -> None:
    fill(tmp_path / "train")
    fill(tmp_path / "val", 2, 1)
    (tmp_path / "test").symlink_to("val")
    assert sizes(tmp_path) == [3, 2, 2]


def test_every_tenth_sorted_file_is_held_out(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    names = ["ant", "b-c", "b", "Bee", "emu/young", "emu"]
    for number in range(83):
        place = tmp_path / names[draw.integers(len(names))]
        place.mkdir(parents=True, exist_ok=True)
        ending = ("png", "PNG", "bmp", "tiff", "webp")[number % 5]
        Image.fromarray(noise(6 + number, 9, 3, seed=number)).save(place / f"{draw.integers(10**6)}.{ending}")
    paths = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    classes = sorted({path.relative_to(tmp_path).parts[0] for path in paths})
    for split, chosen in (("train", [p for n, p in enumerate(paths) if n % 10 != 9]), ("val", paths[9::10])):
        images = load_image_set(str(tmp_path), split)
        assert images.images == list(map(str, chosen)) and images.class_names == classes
        assert [classes[k] for k in images.labels.tolist()] == [p.relative_to(tmp_path).parts[0] for p in chosen]


def test_current_directory_equals_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ant", "bee/young"):
        fill(tmp_path / name, 6)
    monkeypatch.chdir(tmp_path)
    here, there = load_image_set("."), load_image_set(str(tmp_path))
    assert here.class_names == there.class_names == ["ant", "bee"] and torch.equal(here.labels, there.labels)
    paths = list_images(Path()).paths
    assert paths == list(map(str, sorted(Path().rglob("*.*"))))
    assert [str(tmp_path / path) for path in paths] == list_images(tmp_path).paths


ENDINGS = ["gif", "jfif", "jpe", "apng", "tga", "ico", "pcx", "sgi", "dds", "qoi", "jp2", "avif", "mpo", "icns", "xbm"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_pillow_format_is_read(ending: str, tmp_path: Path) -> None:
    if ending in ("jp2", "avif") and not features.check({"jp2": "jpg_2000", "avif": "avif"}[ending]):
        pytest.skip(f"this Pillow reads no .{ending}")
    Image.new("1" if ending == "xbm" else "RGB", (16, 16), 1).save(tmp_path / f"image.{ending}")
    assert len(list_images(tmp_path).paths) == 1 and read_image(tmp_path / f"image.{ending}").size[0] >= 16


def test_ignored_files_are_counted_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "cat", 12)
    for number in range(40):
        (tmp_path / "cat" / f"._{number:02d}.png").write_bytes(b"\0\5\x16\7")
    for place in (".ipynb_checkpoints", "@eaDir", "__MACOSX/cat", ".git", ".Trash", "cat/.hidden"):
        fill(tmp_path / place, 2)
    for name in ("Thumbs.db", "cat/a.txt", "b.TXT", "c.pdf", "d.eps", "licence", "e.pfm"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.png")
    with caplog.at_level(logging.INFO):
        data = TwoViewDataModule(str(tmp_path), num_probe_pairs=2)
        data.setup()
    assert data.class_names == ["cat"] and len(data.images("train")) == 11
    message = (
        f"left out of {str(tmp_path)!r}: 44 hidden, 3 of the operating system, 2 .txt, 1 .eps, 1 .pdf, 1 .pfm, "
        "1 neither file nor folder, 1 without an ending"
    )
    assert [record.message for record in caplog.records] == [message]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert len(load_images(str(tmp_path))) == 12
    assert [record.message for record in caplog.records] == [message]


def test_folder_of_ignored_files_raises_with_counts(tmp_path: Path) -> None:
    (tmp_path / "._a.jpg").touch()
    (tmp_path / "a.pdf").touch()
    with pytest.raises(ValueError, match=r"^no images in '.*' \(left out: 1 \.pdf, 1 hidden\): expected files ending"):
        load_images(str(tmp_path))


def test_document_with_an_image_ending_raises(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("load", [load_images, load_image_set])
def test_folder_named_like_a_data_set_warns(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "photos", 12)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(
        UserWarning, match="built-in data set, not the folder 'photos': for the folder, write './photos'$"
    ):
        photos = load("photos")
    assert len(photos) > 2000 and len(load("./photos")) in (11, 12)
    fill(tmp_path / "cifar10", 12)
    with (
        pytest.warns(UserWarning, match="write './cifar10'$"),
        pytest.raises(FileNotFoundError, match="no intact CIFAR-10"),
    ):
        load("cifar10", root=str(tmp_path))
    assert isinstance(load_images("./cifar10"), torch.Tensor)
