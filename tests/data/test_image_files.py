"""Image files of every kind that a folder may hold: what each is turned into, or how it is refused."""

import io
import os
import random
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_sets import damaged, noise

from stepwise_lightning import TwoViewDataModule
from stepwise_lightning.data.image_files import image_paths, pixels, read_image
from stepwise_lightning.data.image_sets import load_image_set, load_images

LEVELS = np.array([[0, 128, 255, 256, 257, 32768, 65280, 65535]], dtype=np.uint16)


def fill(folder: Path, count: int = 12, size: tuple[int, int] = (12, 12)) -> Path:
    """Write ``count`` images, 00.png, 01.png, …; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        Image.fromarray(noise(*size, 3, seed=seed)).save(folder / f"{seed:02d}.png")
    return folder


def png(samples: np.ndarray, colour_type: int, palette: bytes = b"", transparency: bytes = b"") -> bytes:
    """Encode samples (h, w, c), 8 or 16 bits each, which Pillow itself cannot write for every type."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = samples.shape
    big_endian = samples.astype(samples.dtype.newbyteorder(">"))
    header = struct.pack(">IIBBBBB", width, height, 8 * samples.dtype.itemsize, colour_type, 0, 0, 0)
    extra = (chunk(b"PLTE", palette) if palette else b"") + (chunk(b"tRNS", transparency) if transparency else b"")
    data = b"".join(b"\0" + row.tobytes() for row in big_endian)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


UPPER = (LEVELS >> 8).astype(np.uint8)[..., None].repeat(3, 2)
GREY, COLOUR = noise(5, 8, seed=1), noise(5, 8, 3, seed=2)
READ = {
    "grey": ("png", encoded(Image.fromarray(GREY), "PNG"), GREY[..., None].repeat(3, 2)),
    "black and white": ("png", encoded(Image.fromarray(GREY > 127), "PNG"), 255 * (GREY > 127)[..., None].repeat(3, 2)),
    "grey with alpha": ("png", png(np.dstack([GREY, GREY]), 4), GREY[..., None].repeat(3, 2)),
    "RGBA": ("png", png(np.dstack([COLOUR, np.zeros_like(GREY)]), 6), COLOUR),
    "palette with transparency": (
        "png", png((GREY % 2)[..., None], 3, bytes([9, 8, 7, 1, 2, 3]), b"\0\x80"),
        np.array([[9, 8, 7], [1, 2, 3]])[GREY % 2],
    ),
    "CMYK": ("tif", encoded(Image.fromarray(np.dstack([COLOUR, 0 * GREY]), "CMYK"), "TIFF"), 255 - COLOUR),
    "16 bits grey, PNG": ("png", encoded(Image.fromarray(LEVELS), "PNG"), UPPER),
    "16 bits grey, TIFF": ("tif", encoded(Image.fromarray(LEVELS), "TIFF"), UPPER),
    "16 bits grey, PGM": ("pgm", b"P5 8 1 65535\n" + LEVELS.astype(">u2").tobytes(), UPPER),
    "16 bits colour": ("png", png(LEVELS[..., None].repeat(3, 2), 2), UPPER),
    "one pixel": ("bmp", encoded(Image.fromarray(COLOUR[:1, :1]), "BMP"), COLOUR[:1, :1]),
    "first of two frames": (
        "webp", encoded(Image.fromarray(COLOUR), "WEBP", lossless=True, save_all=True,
                        append_images=[Image.fromarray(255 - COLOUR)]), COLOUR,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("suffix", "content", "expected"), READ.values(), ids=READ)
def test_images_of_every_mode_become_rgb(suffix: str, content: bytes, expected: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    path.write_bytes(content)
    image = read_image(path)
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), expected)
    assert np.array_equal(pixels(image).permute(1, 2, 0).numpy(), expected)


whole = encoded(Image.fromarray(noise(40, 40, 3)), "JPEG")
REFUSED = {
    "a text": (b"not an image", "cannot identify image file"),
    "empty": (b"", "cannot identify image file"),
    "truncated": (whole[: len(whole) // 2], "truncated"),
    "floating point": (encoded(Image.fromarray(noise(4, 4).astype(np.float32)), "TIFF"), "mode F.*no known range"),
    "32 bits": (encoded(Image.fromarray(np.array([[-1, 70000]], np.int32)), "TIFF"), "mode I, -1 to 70000.*no known"),
    "200 megapixels": (encoded(Image.new("1", (20_000, 10_000)), "PNG"), "exceeds limit of 178956970 pixels"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    path = fill(tmp_path) / "05.jpg"
    path.write_bytes(content)
    message = f"^{re.escape(repr(str(path)))} cannot be read as an image .*{reason}.*: remove or repair it$"
    for load in (load_images, load_image_set):
        with pytest.raises(ValueError, match=message) as refusal:
            load(str(tmp_path))
        assert "\n" not in str(refusal.value)


def test_all_files_that_cannot_be_read_are_counted_and_the_first_named(tmp_path: Path) -> None:
    fill(tmp_path, 20)
    for number in (2, 5, 7, 11, 12):
        (tmp_path / f"{number:02d}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^5 of 20 image files.*02\.png.*05\.png.*07\.png.*; and 2 more$") as refusal:
        load_images(str(tmp_path))
    assert "11.png" not in str(refusal.value) and "\n" not in str(refusal.value)


def test_fifty_megapixels_are_read_and_a_hundred_with_pillow_s_warning(tmp_path: Path) -> None:
    Image.new("L", (10_000, 5_000), 7).save(tmp_path / "50.png")
    assert read_image(tmp_path / "50.png").size == (10_000, 5_000)
    Image.new("1", (10_000, 10_000), 1).save(tmp_path / "100.png")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.warns(Image.DecompressionBombWarning, match="exceeds limit of 89478485 pixels"):
            assert read_image(tmp_path / "100.png").getpixel((9_999, 9_999)) == (255, 255, 255)


def test_large_images_are_refused_when_their_turn_comes(tmp_path: Path) -> None:
    fill(tmp_path, 12, (150, 150))
    (tmp_path / "05.png").write_bytes(b"no image")
    images = load_image_set(str(tmp_path))
    assert images.picture(4).size == (150, 150)
    with pytest.raises(ValueError, match=r"05\.png' cannot be read as an image.*remove or repair it$"):
        images.picture(5)
    with pytest.raises(ValueError, match=r"05\.png' cannot be read as an image"):
        TwoViewDataModule(str(tmp_path), image_size=8).setup("fit")  # measures the training images


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    elsewhere = fill(tmp_path / "elsewhere" / "emu", 3)
    root = tmp_path / "root"
    fill(root / "cat", 12)
    (root / "ant").symlink_to(elsewhere)  # a class that lies elsewhere
    (root / "a_second_name").symlink_to(root / "cat")  # comes first by name, but is a link
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "self").symlink_to(root / "cat" / "self")
    (root / "cat" / "self.png").symlink_to("self.png")
    (root / "cat" / "folder.png").mkdir()
    os.mkfifo(root / "cat" / "pipe.png")
    names_found = [str(path.relative_to(root)) for path in image_paths(root)]
    names = [f"ant/{n:02d}.png" for n in range(3)] + [f"cat/{n:02d}.png" for n in range(12)]
    assert names_found == [*names, "cat/self.png"]
    with pytest.raises(ValueError, match=r"self\.png' cannot be read .*Too many levels of symbolic links"):
        load_images(str(root))
    (root / "cat" / "self.png").unlink()
    assert load_image_set(str(root)).class_names == ["ant", "cat"] and len(load_images(str(root))) == 15


def test_an_image_that_a_link_has_lost_is_refused(tmp_path: Path) -> None:
    (fill(tmp_path) / "lost.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"lost\.png' cannot be read as an image .*No such file"):
        load_image_set(str(tmp_path))


def test_names_beyond_ascii_and_empty_classes(tmp_path: Path) -> None:
    for name in ("猫", "Ünï cödé", "🦜"):
        fill(tmp_path / name, 6)
    (tmp_path / "empty").mkdir()
    strange = os.fsdecode(b"\xff\xfe.png")  # not UTF-8
    os.rename(tmp_path / "猫" / "00.png", tmp_path / "猫" / strange)
    images = load_image_set(str(tmp_path))
    assert images.class_names == sorted(["猫", "Ünï cödé", "🦜"]) and images.labels.bincount().sum() == 17
    (tmp_path / "猫" / strange).write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot be read as an image") as refusal:
        load_image_set(str(tmp_path))
    str(refusal.value).encode()  # can be printed


def test_sets_of_one_image_one_pixel_and_one_colour(tmp_path: Path) -> None:
    for part in ("train", "val"):
        fill(tmp_path / "one" / part, 1)
    data = TwoViewDataModule(str(tmp_path / "one"), num_probe_pairs=2)
    data.setup("fit")
    with pytest.raises(ValueError, match="the losses compare samples, but the data set has 1 training image"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="num_probe_pairs 2 is more than the 1 held-out images: hold out at least 2"):
        data.probe_pairs()
    data = TwoViewDataModule(str(fill(tmp_path / "pixels", 20, (1, 1))), global_batch_size=4, num_probe_pairs=2)
    data.setup("fit")
    x1, x2, _ = next(iter(data.train_dataloader()))
    assert x1.shape == x2.shape == (4, 3, 1, 1) and x1.isfinite().all()
    (tmp_path / "plain").mkdir()
    for number in range(12):
        Image.new("RGB", (4, 4), (5, 6, 7)).save(tmp_path / "plain" / f"{number}.png")
    with pytest.raises(ValueError, match="a colour channel is constant over the whole data set"):
        TwoViewDataModule(str(tmp_path / "plain")).setup("fit")


FORMATS = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "ppm": "PPM", "tif": "TIFF", "webp": "WEBP"}


@pytest.mark.parametrize("cases", [80, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:::PIL")  # which also warns about some of them
@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_images_are_read_or_refused_in_one_line(suffix: str, cases: int, tmp_path: Path) -> None:
    draw, outcomes = random.Random(0), {"read": 0, "refused": 0}
    content = encoded(Image.fromarray(noise(9, 9, 3)), FORMATS[suffix])
    path = tmp_path / f"image.{suffix}"
    for _ in range(cases):
        path.write_bytes(damaged(content, draw))
        try:
            assert read_image(path).mode == "RGB"
            outcomes["read"] += 1
        except ValueError as refusal:
            assert re.fullmatch(r"'[^\n]*' cannot be read as an image \([^\n]*\): remove or repair it", str(refusal))
            outcomes["refused"] += 1
    assert outcomes["refused"] > cases / 10
