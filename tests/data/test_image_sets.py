"""Load image sets: photographs, CIFAR-10, STL-10 and folders."""

import hashlib
import http.server
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sets import CIFAR_CLASSES, STL_CLASSES, md5, noise, write_cifar10, write_stl10
from torchvision.datasets import CIFAR10, STL10

from stepwise_lightning.data import TwoViewDataModule
from stepwise_lightning.data.image_files import channel_statistics
from stepwise_lightning.data.image_sets import load_image_set, load_images
from stepwise_lightning.data.photographs import BETWEEN, HELD_OUT, TRAIN, cut_photos
from stepwise_lightning.data.stl10 import JoinedImages


def write_png(path: Path, size: tuple[int, int] = (12, 12), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(*size, 3, seed=seed)).save(path)


@pytest.fixture
def cifar10_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_cifar10(tmp_path / "origin", monkeypatch)


@pytest.fixture
def stl10_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_stl10(tmp_path / "origin", monkeypatch)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the address of a local HTTP server of ``tmp_path``."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None: ...

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_photos_are_fixed_cached_and_disjoint_between_splits() -> None:
    tiles, photograph, place = cut_photos()
    assert tiles.shape == (2690, 3, 32, 32) and tiles.dtype == torch.uint8
    assert cut_photos()[0] is tiles and load_images("photos") is tiles
    assert hashlib.md5(tiles.numpy().tobytes()).hexdigest() == "75f43dc1f0f61f2019e2a8de1a9939b4"
    assert [int((place == p).sum()) for p in (TRAIN, HELD_OUT, BETWEEN)] == [2190, 268, 232]
    assert (tiles.double().flatten(1).std(1, correction=0) > 5).all()
    cut_photos.cache_clear()
    assert torch.equal(cut_photos()[0], tiles)

    train, held_out = load_image_set("photos", "train"), load_image_set("photos", "test")
    assert train.labels.unique().tolist() == held_out.labels.unique().tolist() == list(range(8))
    assert torch.equal(held_out.labels, photograph[place == HELD_OUT])
    # Tiles that share pixels share 8×8 blocks, because their positions differ by multiples of 12 pixels.
    windows = tiles.unfold(2, 8, 12).unfold(3, 8, 12).permute(0, 2, 3, 1, 4, 5).numpy()
    blocks = [{block.tobytes() for block in windows[place == p].reshape(-1, 192)} for p in (TRAIN, HELD_OUT, BETWEEN)]
    plain = {
        block for side in blocks for block in side if len(set(block)) < 16
    }  # nearly uniform blocks, such as black sky, occur in all splits
    assert not blocks[TRAIN] & blocks[HELD_OUT] - plain
    assert blocks[TRAIN] & blocks[BETWEEN] - plain and blocks[HELD_OUT] & blocks[BETWEEN] - plain


def test_channel_statistics_equal_direct_computation() -> None:
    images = torch.from_numpy(noise(5000, 3, 6, 7))
    images[:, 1] //= 2
    mean, std = channel_statistics(images)
    pixels = images.double().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(mean, pixels.mean(1))
    torch.testing.assert_close(std, pixels.std(1, correction=0))
    with pytest.raises(ValueError, match="constant over the whole data set"):
        channel_statistics(torch.full((3, 3, 4, 4), 7, dtype=torch.uint8))


def test_cifar10_in_its_real_format(cifar10_files: Path) -> None:
    train, test = (load_image_set("cifar10", split, str(cifar10_files)) for split in ("train", "val"))
    assert train.images.shape == (20, 3, 32, 32) and len(test) == 4 and train.class_names == CIFAR_CLASSES
    assert train.labels.tolist() == [(number + k) % 10 for number in range(5) for k in range(4)]
    assert train.images[7].numpy().tobytes() == noise(4, 3072, seed=1)[3].tobytes()
    assert test.images[2].numpy().tobytes() == noise(4, 3072, seed=5)[2].tobytes()
    assert torch.equal(load_images("cifar10", str(cifar10_files)), train.images)


def test_stl10_in_its_real_format(stl10_files: Path) -> None:
    train, test = (load_image_set("stl10", split, str(stl10_files)) for split in ("train", "test"))
    assert train.images.shape == (5, 3, 96, 96) and len(test) == 2 and train.class_names == STL_CLASSES
    assert train.labels.tolist() == [8, 9, -1, -1, -1] and test.labels.tolist() == [8, 9]
    assert np.array_equal(np.asarray(train.picture(3)), noise(3, 96, 96, 3, seed=1)[1])
    images = load_images("stl10", str(stl10_files))
    assert torch.equal(images, train.images[torch.arange(5)])
    mean, std = train.statistics()
    pixels = images.double().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close((mean, std), (pixels.mean(1), pixels.std(1, correction=0)))


def test_stl10_is_memory_mapped_and_files_are_never_written(stl10_files: Path) -> None:
    before = [path.read_bytes() for path in sorted(stl10_files.rglob("*.bin"))]
    images = load_image_set("stl10", "train", str(stl10_files)).images
    if sys.platform == "linux":
        maps = Path("/proc/self/maps").read_text()
        assert all(str(stl10_files / f"stl10_binary/{part}_X.bin") in maps for part in ("train", "unlabeled"))
    for part in images.parts:
        part.zero_()
    assert [path.read_bytes() for path in sorted(stl10_files.rglob("*.bin"))] == before


def test_joined_images_are_indexed_like_their_concatenation() -> None:
    parts = [torch.from_numpy(noise(count, 3, 4, 5, seed=count)) for count in (4, 1, 6)]
    joined, whole = JoinedImages(parts), torch.cat(parts)
    indices = torch.tensor([10, 0, 4, 3, 5, 5, 9])
    assert len(joined) == 11 and joined.shape == whole.shape and torch.equal(joined[indices], whole[indices])
    assert torch.equal(torch.cat(list(joined.split(3))), whole)


def test_one_process_per_machine_verifies_stl10(stl10_files: Path) -> None:
    path = stl10_files / "stl10_binary/train_X.bin"
    path.write_bytes(bytes(len(path.read_bytes())))
    data = TwoViewDataModule("stl10", root=str(stl10_files))
    data.trainer = SimpleNamespace(local_rank=1)
    assert not data.images("train").images[torch.tensor([0])].any()
    data = TwoViewDataModule("stl10", root=str(stl10_files))
    data.trainer = SimpleNamespace(local_rank=0)
    with pytest.raises(FileNotFoundError, match="no intact STL-10"):
        data.images("train")


@pytest.mark.parametrize("data", ["cifar10", "stl10"])
def test_missing_data_set_raises_with_the_download_command(data: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"stepwise download {data} --root") as caught:
        load_image_set(data, root=str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("data", ["cifar10", "stl10"])
def test_data_set_is_downloaded_on_request(
    data: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    origin = request.getfixturevalue(f"{data}_files")
    cls = {"cifar10": CIFAR10, "stl10": STL10}[data]
    archive = tmp_path / cls.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(origin / cls.base_folder, cls.base_folder)
    monkeypatch.setattr(cls, "tgz_md5", md5(archive))
    monkeypatch.setattr(cls, "url", f"{server}/nowhere.tar.gz")
    root = tmp_path / "root"
    with pytest.raises(OSError, match="could not be downloaded and unpacked.*404"):
        load_image_set(data, root=str(root), download=True)
    monkeypatch.setattr(cls, "url", f"{server}/{archive.name}")
    fetched = load_image_set(data, root=str(root), download=True)
    indices = torch.arange(len(fetched))
    assert torch.equal(fetched.images[indices], load_image_set(data, root=str(origin)).images[indices])


def test_folder_with_splits_and_classes(tmp_path: Path) -> None:
    names = ["train/cat/a.png", "train/cat/b.png", "train/dog/c.png", "train/d.png", "val/dog/e.png", "val/emu/f.PNG"]
    for seed, name in enumerate(names):
        write_png(tmp_path / name, seed=seed)
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    train, val = (load_image_set(str(tmp_path), split) for split in ("train", "val"))
    assert train.class_names == val.class_names == ["cat", "dog", "emu"]
    assert train.labels.tolist() == [0, 0, -1, 1] and val.labels.tolist() == [1, 2]
    assert np.array_equal(np.asarray(val.picture(1)), noise(12, 12, 3, seed=5))
    assert torch.equal(load_image_set(str(tmp_path), "test").images, val.images)
    write_png(tmp_path / "test" / "cat" / "g.png", seed=9)
    assert len(load_image_set(str(tmp_path), "test")) == 1 and len(load_image_set(str(tmp_path), "val")) == 2


def test_folder_without_splits_holds_out_every_tenth_file(tmp_path: Path) -> None:
    for seed in range(25):
        write_png(tmp_path / f"{seed:02d}.png", seed=seed)
    train, val = (load_image_set(str(tmp_path), split).images for split in ("train", "val"))
    assert len(train) == 23 and len(val) == 2
    assert torch.equal(
        torch.cat([train[:9], val[:1], train[9:18], val[1:], train[18:]]), load_images(str(tmp_path), image_size=12)
    )


@pytest.mark.parametrize("size", [(13, 12), (150, 150)])
def test_large_images_and_images_of_different_sizes_are_read_when_needed(size: tuple[int, int], tmp_path: Path) -> None:
    for seed in range(10):
        write_png(tmp_path / f"{seed}.png", (150, 150) if max(size) > 128 else (12, 12 + (seed == 4)), seed)
    lazily = load_image_set(str(tmp_path))
    assert isinstance(lazily.images, list) and lazily.picture(4).size == (size[0] if size[0] > 128 else 13, size[1])
    pixels = np.concatenate([np.asarray(lazily.picture(i)).reshape(-1, 3) for i in range(9)]) / 255
    mean, std = lazily.statistics()
    np.testing.assert_allclose(mean, pixels.mean(0))
    np.testing.assert_allclose(std, pixels.std(0))
    assert load_images(str(tmp_path), image_size=8).shape == (10, 3, 8, 8)


def test_invalid_data_and_splits_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'mnist' is neither one of photos, cifar10, stl10 nor the path"):
        load_image_set("mnist")
    with pytest.raises(ValueError, match="unknown split 'dev': choose one of train, val, test"):
        load_image_set("photos", "dev")
    for load in (load_images, load_image_set):
        with pytest.raises(ValueError, match="no images in .*: expected files ending in"):
            load(str(tmp_path))
    (tmp_path / "readme.txt").write_text("no image")
    with pytest.raises(ValueError, match="no images in"):
        load_images(str(tmp_path))
    write_png(tmp_path / "only.png")
    with pytest.raises(ValueError, match="too few images in .* to hold some out: 1, at least 10"):
        load_image_set(str(tmp_path))
