"""Read image files of every kind: RGB conversion, 16-bit images, unreadable files, links."""

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
import tifffile
from PIL import Image
from tiny_sets import damaged, fill, noise

from stepwise_lightning import TwoViewDataModule
from stepwise_lightning.data.folders import list_images
from stepwise_lightning.data.image_files import pixels, read_image
from stepwise_lightning.data.image_sets import load_image_set, load_images

LEVELS = np.array([[0, 128, 255, 256, 257, 32768, 65280, 65535]], dtype=np.uint16)
DEEP_COLOUR = np.stack([LEVELS, LEVELS[:, ::-1], LEVELS // 2], -1)


def png(samples: np.ndarray, colour_type: int, palette: bytes = b"", transparency: bytes = b"") -> bytes:
    """Encode samples (h, w, c), 8 or 16 bits each; Pillow cannot write every colour type."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = samples.shape
    big_endian = samples.astype(samples.dtype.newbyteorder(">"))
    header = struct.pack(">IIBBBBB", width, height, 8 * samples.dtype.itemsize, colour_type, 0, 0, 0)
    chunks = [chunk(b"IHDR", header)]
    chunks += [chunk(kind, data) for kind, data in ((b"PLTE", palette), (b"tRNS", transparency)) if data]
    rows = b"".join(b"\0" + row.tobytes() for row in big_endian)
    return b"\x89PNG\r\n\x1a\n" + b"".join([*chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


def tiff(samples: np.ndarray, **settings) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, samples, photometric="minisblack" if samples.ndim == 2 else "rgb", **settings)
    return buffer.getvalue()


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def as_rgb(gray: np.ndarray) -> np.ndarray:
    return gray[..., None].repeat(3, 2)


UPPER, UPPER_COLOUR = as_rgb(LEVELS >> 8), DEEP_COLOUR >> 8
GRAY, COLOUR = noise(5, 8, seed=1), noise(5, 8, 3, seed=2)
READ = {
    "gray": ("png", encoded(Image.fromarray(GRAY), "PNG"), as_rgb(GRAY)),
    "black and white": ("png", encoded(Image.fromarray(GRAY > 127), "PNG"), 255 * as_rgb(GRAY > 127)),
    "gray with alpha": ("png", png(np.dstack([GRAY, GRAY]), 4), as_rgb(GRAY)),
    "RGBA": ("png", png(np.dstack([COLOUR, np.zeros_like(GRAY)]), 6), COLOUR),
    "palette with transparency": (
        "png", png((GRAY % 2)[..., None], 3, bytes([9, 8, 7, 1, 2, 3]), b"\0\x80"),
        np.array([[9, 8, 7], [1, 2, 3]])[GRAY % 2],
    ),
    "CMYK": ("tif", encoded(Image.fromarray(np.dstack([COLOUR, 0 * GRAY]), "CMYK"), "TIFF"), 255 - COLOUR),
    "16-bit gray PNG": ("png", encoded(Image.fromarray(LEVELS), "PNG"), UPPER),
    "16-bit gray PNG with alpha": ("png", png(np.dstack([LEVELS, LEVELS]), 4), UPPER),
    "16-bit gray TIFF": ("tif", encoded(Image.fromarray(LEVELS), "TIFF"), UPPER),
    "16-bit gray TIFF, big-endian": ("tif", tiff(LEVELS, byteorder=">"), UPPER),
    "16-bit gray PGM": ("pgm", b"P5 8 1 65535\n" + LEVELS.astype(">u2").tobytes(), UPPER),
    "12-bit gray PGM": ("pgm", b"P5 8 1 4095\n" + (LEVELS >> 4).astype(">u2").tobytes(), UPPER),
    "16-bit colour PNG": ("png", png(DEEP_COLOUR, 2), UPPER_COLOUR),
    "16-bit colour PNG with alpha": ("png", png(np.dstack([DEEP_COLOUR, LEVELS]), 6), UPPER_COLOUR),
    "16-bit colour TIFF, compressed, big-endian": (
        "tif", tiff(DEEP_COLOUR, compression="zlib", byteorder=">"), UPPER_COLOUR
    ),
    "one pixel": ("bmp", encoded(Image.fromarray(COLOUR[:1, :1]), "BMP"), COLOUR[:1, :1]),
    "two frames": (
        "webp", encoded(Image.fromarray(COLOUR), "WEBP", lossless=True, save_all=True,
                        append_images=[Image.fromarray(255 - COLOUR)]), COLOUR,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("suffix", "content", "expected"), READ.values(), ids=READ)
def test_images_of_every_mode_are_converted_to_rgb(
    suffix: str, content: bytes, expected: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / f"image.{suffix}"
    path.write_bytes(content)
    image = read_image(path)
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), expected)
    assert np.array_equal(pixels(image).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    ("colour_type", "channels", "bits", "side"),
    [(0, 1, 12, 12), (0, 1, 8, 12), (2, 3, 12, 12), (4, 2, 10, 12), (2, 3, 14, 150), (0, 1, 8, 150)],
)
def test_unused_upper_bits_of_16_bit_images_warn_once(
    colour_type: int, channels: int, bits: int, side: int, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    for number in range(12):
        samples = draw.integers(0, 2 ** (bits - (number != 3)), (side, side, 1), np.uint16)
        samples[0, 0] = 2**bits - 1 if number == 3 else 0
        (tmp_path / f"{number:02d}.png").write_bytes(png(samples.repeat(channels, 2), colour_type))
    message = (
        f"^the 16-bit images in {re.escape(repr(str(tmp_path)))} use at most {bits} bits, .* "
        rf"\({2 ** (bits - 8)} of 256 levels\): multiply their values by {2 ** (16 - bits)}$"
    )

    def statistics() -> None:
        try:
            load_image_set(str(tmp_path)).statistics()
        except ValueError as error:
            assert bits == 8 and "constant" in str(error)

    for load in (lambda: load_images(str(tmp_path)), statistics):
        with pytest.warns(UserWarning, match=message) as caught:
            load()
        assert len(caught) == 1


def test_one_image_with_the_full_16_bit_range_suppresses_the_warning(tmp_path: Path) -> None:
    for number in range(12):
        samples = np.full((6, 6, 1), 4095 if number != 5 else 40_000, np.uint16)
        (tmp_path / f"{number:02d}.png").write_bytes(png(samples, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_images(str(tmp_path)).unique().tolist() == [15, 156]  # all images are scaled alike


whole = encoded(Image.fromarray(noise(40, 40, 3)), "JPEG")
UNREADABLE = {
    "text": (b"not an image", "cannot identify image file"),
    "empty": (b"", "cannot identify image file"),
    "truncated": (whole[: len(whole) // 2], "truncated"),
    "floating point": (encoded(Image.fromarray(noise(4, 4).astype(np.float32)), "TIFF"), "mode F .*no known range"),
    "32 bits": (encoded(Image.fromarray(np.array([[-1, 70000]], np.int32)), "TIFF"), "mode I between -1 and 70000"),
    "16-bit colours in separate planes": (
        tiff(np.ascontiguousarray(DEEP_COLOUR.transpose(2, 0, 1)), planarconfig="separate"), "in separate planes",
    ),
    "200 megapixels": (encoded(Image.new("1", (20_000, 10_000)), "PNG"), "exceeds limit of 178956970 pixels"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_files_raise_one_line_with_their_name(content: bytes, reason: str, tmp_path: Path) -> None:
    path = fill(tmp_path, 12) / "05.jpg"
    path.write_bytes(content)
    message = f"^{re.escape(repr(str(path)))} cannot be read as an image .*{reason}.*: remove or repair it$"
    for load in (load_images, load_image_set):
        with pytest.raises(ValueError, match=message) as error:
            load(str(tmp_path))
        assert "\n" not in str(error.value)


def test_several_unreadable_files_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, 20)
    for number in (2, 5, 7, 11, 12):
        (tmp_path / f"{number:02d}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^5 of 20 image files.*02\.png.*05\.png.*07\.png.*; and 2 more$") as error:
        load_images(str(tmp_path))
    assert "11.png" not in str(error.value) and "\n" not in str(error.value)


def test_unreadable_large_images_raise_when_they_are_read(tmp_path: Path) -> None:
    fill(tmp_path, 12, size=(150, 150))
    (tmp_path / "05.png").write_bytes(b"no image")
    images = load_image_set(str(tmp_path))
    assert images.picture(4).size == (150, 150)
    with pytest.raises(ValueError, match=r"05\.png' cannot be read as an image.*remove or repair it$"):
        images.picture(5)
    with pytest.raises(ValueError, match=r"05\.png' cannot be read as an image"):
        TwoViewDataModule(str(tmp_path), image_size=8).setup("fit")  # computes the channel statistics


@pytest.mark.slow
def test_pillow_warns_above_89_megapixels(tmp_path: Path) -> None:
    Image.new("1", (10_000, 10_000), 1).save(tmp_path / "100.png")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.warns(Image.DecompressionBombWarning, match="exceeds limit of 89478485 pixels"):
            assert read_image(tmp_path / "100.png").getpixel((9_999, 9_999)) == (255, 255, 255)


def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path) -> None:
    elsewhere = fill(tmp_path / "elsewhere" / "emu", 3)
    root = tmp_path / "root"
    fill(root / "cat", 12)
    (root / "ant").symlink_to(elsewhere)
    (root / "a_second_name").symlink_to(root / "cat")  # sorts before cat, but is a link
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "self").symlink_to(root / "cat" / "self")
    (root / "cat" / "self.png").symlink_to("self.png")
    (root / "cat" / "folder.png").mkdir()
    os.mkfifo(root / "cat" / "pipe.png")
    names = [f"ant/{n:02d}.png" for n in range(3)] + [f"cat/{n:02d}.png" for n in range(12)]
    assert [os.path.relpath(path, root) for path in list_images(root).paths] == [*names, "cat/self.png"]
    with pytest.raises(ValueError, match=r"self\.png' cannot be read .*Too many levels of symbolic links"):
        load_images(str(root))
    (root / "cat" / "self.png").unlink()
    assert load_image_set(str(root)).class_names == ["ant", "cat"] and len(load_images(str(root))) == 15


def test_broken_link_raises(tmp_path: Path) -> None:
    (fill(tmp_path, 12) / "lost.png").symlink_to(tmp_path / "missing.png")
    with pytest.raises(ValueError, match=r"lost\.png' cannot be read as an image .*No such file"):
        load_image_set(str(tmp_path))


def test_names_outside_ascii_and_empty_classes(tmp_path: Path) -> None:
    for name in ("猫", "Ünï cödé", "🦜"):
        fill(tmp_path / name, 6)
    (tmp_path / "empty").mkdir()
    not_utf8 = os.fsdecode(b"\xff\xfe.png")
    os.rename(tmp_path / "猫" / "00.png", tmp_path / "猫" / not_utf8)
    images = load_image_set(str(tmp_path))
    assert images.class_names == sorted(["猫", "Ünï cödé", "🦜"]) and images.labels.bincount().sum() == 17
    (tmp_path / "猫" / not_utf8).write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot be read as an image") as error:
        load_image_set(str(tmp_path))
    str(error.value).encode()  # the message is printable


def test_sets_of_one_image_one_pixel_and_one_colour(tmp_path: Path) -> None:
    for part in ("train", "val"):
        fill(tmp_path / "one" / part, 1)
    data = TwoViewDataModule(str(tmp_path / "one"), num_probe_pairs=2)
    data.setup("fit")
    with pytest.raises(ValueError, match="the data set has 1 training image, but the losses compare samples"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="num_probe_pairs 2 is more than the 1 held-out images: hold out at least 2"):
        data.probe_pairs()
    data = TwoViewDataModule(str(fill(tmp_path / "pixels", 20, size=(1, 1))), global_batch_size=4, num_probe_pairs=2)
    data.setup("fit")
    x1, x2, _ = next(iter(data.train_dataloader()))
    assert x1.shape == x2.shape == (4, 3, 1, 1) and x1.isfinite().all()
    (tmp_path / "plain").mkdir()
    for number in range(12):
        Image.new("RGB", (4, 4), (5, 6, 7)).save(tmp_path / "plain" / f"{number}.png")
    with pytest.raises(ValueError, match="a colour channel is constant over the whole data set"):
        TwoViewDataModule(str(tmp_path / "plain")).setup("fit")


FORMATS = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "ppm": "PPM", "tif": "TIFF", "webp": "WEBP"}


@pytest.mark.parametrize("cases", [30, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:::PIL")  # Pillow also warns about some damaged files
@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_images_are_read_or_raise_one_line(suffix: str, cases: int, tmp_path: Path) -> None:
    draw, num_errors = random.Random(0), 0
    content = encoded(Image.fromarray(noise(9, 9, 3)), FORMATS[suffix])
    path = tmp_path / f"image.{suffix}"
    for _ in range(cases):
        path.write_bytes(damaged(content, draw))
        try:
            assert read_image(path).mode == "RGB"
        except ValueError as error:
            assert re.fullmatch(r"'[^\n]*' cannot be read as an image \([^\n]*\): remove or repair it", str(error))
            num_errors += 1
    assert num_errors > cases / 10
