"""Folders: which images are for training, which are held out, and what is left out, in one line."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from tiny_sets import noise

from stepwise_lightning import TwoViewDataModule
from stepwise_lightning.data.image_files import image_paths, read_image
from stepwise_lightning.data.image_sets import load_image_set, load_images


def fill(folder: Path, count: int = 3, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(noise(8, 8, 3, seed=100 * seed + number)).save(folder / f"{number:02d}.png")
    return folder


def sizes(folder: Path) -> list[int]:
    return [len(load_image_set(str(folder), split)) for split in ("train", "val", "test")]


PAIRS = [
    ("train", "validation"), ("train", "valid"), ("train", "dev"), ("train", "eval"), ("train", "holdout"),
    ("train", "held-out"), ("Training", "Testing"), ("TRAIN", "Val"), ("Train", "TEST"), ("train2017", "val2017"),
    ("seg_train", "seg_test"), ("training_set", "test_set"), ("trainset", "testset"), ("train_images", "test_images"),
]  # fmt: skip


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_the_usual_names_of_splits_are_recognised(names: tuple[str, str], tmp_path: Path) -> None:
    for seed, name in enumerate(names):
        for label, kind in enumerate(("cat", "dog")):
            fill(tmp_path / name / kind, 3 - seed, seed=2 * seed + label)
    assert sizes(tmp_path) == [6, 4, 4]
    for split in ("train", "val"):
        images = load_image_set(str(tmp_path), split)
        assert images.class_names == ["cat", "dog"] and images.labels.unique().tolist() == [0, 1]


def test_three_splits_and_what_lies_beside_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for seed, name in enumerate(("Train", "DEV", "testing", "extra")):
        fill(tmp_path / name / "cat", 4 - seed, seed)
    (tmp_path / "readme.txt").touch()
    with caplog.at_level(logging.INFO):
        assert sizes(tmp_path) == [4, 3, 2]
    assert [record.message for record in caplog.records] == [
        f"left out of {str(tmp_path)!r}: 1 .txt, 1 folder beside the splits ('extra')"
    ]


@pytest.mark.parametrize("pair", [("val", "validation"), ("test", "Testing"), ("dev", "valid"), ("Train", "train")])
def test_two_folders_for_one_split_are_refused_by_name(pair: tuple[str, str], tmp_path: Path) -> None:
    for name in {"train", "test", *pair}:
        fill(tmp_path / name)
    with pytest.raises(ValueError, match=f"{min(pair)!r}, {max(pair)!r} in .* all named for one split.*: keep one$"):
        load_image_set(str(tmp_path))


@pytest.mark.parametrize("inside", ["dataset", "a/b/c"])
def test_splits_may_lie_deeper_as_archives_unpack(inside: str, tmp_path: Path) -> None:
    fill(tmp_path / "__MACOSX" / inside / "train")
    (tmp_path / "labels").mkdir()
    for name in ("train", "val"):
        fill(tmp_path / inside / name / "cat", 5 - len(name) // 2)
    assert sizes(tmp_path) == [3, 4, 4] and load_image_set(str(tmp_path)).class_names == ["cat"]
    (tmp_path / inside / "train" / "notes.txt").touch()
    assert sizes(tmp_path) == [3, 4, 4]


def test_a_split_that_repeats_its_name_is_looked_into(tmp_path: Path) -> None:
    for part in ("seg_train", "seg_test"):
        for kind in ("forest", "sea"):
            fill(tmp_path / part / part / kind)
    assert load_image_set(str(tmp_path)).class_names == ["forest", "sea"] and sizes(tmp_path) == [6, 6, 6]


@pytest.mark.parametrize("inside", ["train", "data/Training"])
def test_training_images_alone_are_split_by_file_and_keep_their_classes(inside: str, tmp_path: Path) -> None:
    fill(tmp_path / inside / "cat", 12)
    fill(tmp_path / inside / "dog", 8)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "boxes.json").touch()
    assert load_image_set(str(tmp_path)).class_names == ["cat", "dog"] and sizes(tmp_path) == [18, 2, 2]


def test_train_is_a_class_among_others_and_this_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for seed, name in enumerate(("bus", "plane", "train")):
        fill(tmp_path / name, 4, seed)
    with caplog.at_level(logging.INFO):
        assert load_image_set(str(tmp_path)).class_names == ["bus", "plane", "train"]
    assert "'bus', 'plane', 'train' in" in caplog.text and "are read as classes" in caplog.text


AMBIGUOUS = {
    "other folders beside the classes of train": (["train/cat", "train/dog", "other/cat"], "'train' in .* is named"),
    "nothing to train on": (["val/cat", "test/cat"], "'test', 'val' in .* are named for a split, but train/"),
    "test among classes": (["cat", "dog", "test"], "'test' in .* is named for a split"),
    "two data sets": (["a/train", "a/val", "b/train", "b/val"], "a' is split into folders, but there are images"),
    "classes that are split": (["cat/train", "cat/test", "dog/train", "dog/test"], "cat' is split into folders"),
    "images beside a split one": (["", "a/train", "a/val"], "a' is split into folders"),
    "images beside train": (["", "train/cat"], "'train' in .* is named for a split"),
}


@pytest.mark.parametrize(("folders", "message"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_folders_that_can_be_read_in_two_ways_are_refused(folders: list[str], message: str, tmp_path: Path) -> None:
    for folder in folders:
        fill(tmp_path / folder, 6)
    with pytest.raises(ValueError, match=message) as refusal:
        load_image_set(str(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["folder", "link", "hard link", "split"])
def test_no_link_puts_an_image_into_training_and_held_out_images(kind: str, tmp_path: Path) -> None:
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
    with pytest.raises(
        ValueError, match="links put an image both into the training and the held-out images"
    ) as refusal:
        load_image_set(str(root))
    assert "val/cat" in str(refusal.value) and "train/cat" in str(refusal.value) and "\n" not in str(refusal.value)


def test_links_between_the_tenths_are_refused_and_others_are_not(tmp_path: Path) -> None:
    fill(tmp_path, 12)
    os.link(tmp_path / "00.png", tmp_path / "00b.png")  # both for training
    assert sizes(tmp_path) == [12, 1, 1]
    (tmp_path / "08.png").unlink()
    (tmp_path / "08.png").symlink_to("00.png")  # the tenth
    with pytest.raises(ValueError, match=r"08\.png' is '.*00b?\.png'; remove one of the two names"):
        load_image_set(str(tmp_path))


def test_val_and_test_may_be_one_folder(tmp_path: Path) -> None:
    fill(tmp_path / "train")
    fill(tmp_path / "val", 2, 1)
    (tmp_path / "test").symlink_to("val")
    assert sizes(tmp_path) == [3, 2, 2]


def test_folders_without_anything_special_are_split_as_ever(tmp_path: Path) -> None:
    """Against the plain rule: all files with the usual endings, sorted, every tenth held out."""
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


def test_the_working_directory_is_a_folder_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ant", "bee/young"):
        fill(tmp_path / name, 6)
    monkeypatch.chdir(tmp_path)
    here, there = load_image_set("."), load_image_set(str(tmp_path))
    assert here.class_names == there.class_names == ["ant", "bee"] and torch.equal(here.labels, there.labels)
    paths = image_paths(Path())
    assert paths == sorted(Path().rglob("*.*")) and [tmp_path / path for path in paths] == image_paths(tmp_path)


ENDINGS = ["gif", "jfif", "jpe", "apng", "tga", "ico", "pcx", "sgi", "dds", "qoi", "jp2", "avif", "mpo", "icns", "xbm"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_whatever_pillow_reads_is_read(ending: str, tmp_path: Path) -> None:
    if ending in ("jp2", "avif") and not features.check({"jp2": "jpg_2000", "avif": "avif"}[ending]):
        pytest.skip(f"this Pillow reads no .{ending}")
    Image.new("1" if ending == "xbm" else "RGB", (16, 16), 1).save(tmp_path / f"image.{ending}")
    assert len(image_paths(tmp_path)) == 1 and read_image(tmp_path / f"image.{ending}").size[0] >= 16


def test_what_is_left_out_is_counted_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_folder_of_hidden_files_alone_says_so(tmp_path: Path) -> None:
    (tmp_path / "._a.jpg").touch()
    (tmp_path / "a.pdf").touch()
    with pytest.raises(ValueError, match=r"^no images in '.*' \(left out: 1 \.pdf, 1 hidden\): expected files ending"):
        load_images(str(tmp_path))


def test_a_document_under_an_image_s_name_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("load", [load_images, load_image_set])
def test_a_folder_called_like_a_data_set_is_warned_of(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "photos", 12)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="to mean the folder 'photos' here, write './photos'$"):
        photos = load("photos")
    assert len(photos) > 2000 and len(load("./photos")) in (11, 12)
    fill(tmp_path / "cifar10", 12)
    with (
        pytest.warns(UserWarning, match="write './cifar10'$"),
        pytest.raises(FileNotFoundError, match="no intact CIFAR-10"),
    ):
        load("cifar10", root=str(tmp_path))
    assert isinstance(load_images("./cifar10"), torch.Tensor)
