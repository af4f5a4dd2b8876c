"""Images of 9 to 16 bits stored in 16: which 8 bits are kept, and what is said when the file does not say."""

import io
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from stepwise_lightning.data.image_files import read_image
from stepwise_lightning.data.image_sets import load_image_set, load_images

GREY = np.array([[0, 17, 129, 255, 256, 1023, 3000, 4095]], np.uint16)  # 12 bits
COLOUR = np.stack([GREY, GREY[:, ::-1], GREY // 2], -1)


def png(samples: np.ndarray, colour_type: int, significant: bytes = b"") -> bytes:
    """Encode samples (h, w) or (h, w, c) of 16 bits, with PNG's sBIT; every row filtered by the one above."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, colour_type, 0, 0, 0)
    rows = [np.frombuffer(row.tobytes(), np.uint8) for row in samples.astype(">u2")]
    filtered = [b"\2" + (row - above).tobytes() for row, above in zip(rows, [0 * rows[0], *rows], strict=False)]
    said = chunk(b"sBIT", significant) if significant else b""
    data = chunk(b"IDAT", zlib.compress(b"".join(filtered)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + said + data + chunk(b"IEND", b"")


def tiff(samples: np.ndarray, tag: int = 281, maximum: int = 4095, **settings) -> bytes:
    buffer = io.BytesIO()
    channels = 1 if samples.ndim == 2 else 3
    tags = [(tag, "H", channels, (maximum,) * channels if channels > 1 else maximum, False)]
    photometric = "rgb" if channels == 3 else "minisblack"
    tifffile.imwrite(buffer, samples, photometric=photometric, extratags=tags, **settings)
    return buffer.getvalue()


def packed_tiff(samples: np.ndarray) -> bytes:
    """Encode a row of 12 bits as TIFF of 12 bits, two values in three bytes."""
    pairs = zip(samples.ravel()[::2].tolist(), samples.ravel()[1::2].tolist(), strict=True)
    data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    tags = {256: samples.size, 257: 1, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 1, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + data


def jpeg2000(samples: np.ndarray) -> bytes:
    """Encode 12 bits: as 16 bits, which Pillow can write, around another zero; then the precision is changed."""
    buffer = io.BytesIO()
    Image.fromarray(samples + np.uint16(2**15 - 2**11)).save(buffer, "JPEG2000", irreversible=False, no_jp2=True)
    content = bytearray(buffer.getvalue())
    content[content.index(b"\xff\x51") + 40] = 11
    return bytes(content)


SPREAD = GREY << 4 | GREY >> 8
READ = {
    "PNG, sBIT": ("png", png(GREY, 0, b"\x0c"), GREY >> 4),
    "PNG, sBIT, as its specification demands": ("png", png(SPREAD, 0, b"\x0c"), GREY >> 4),
    "the same, dark": ("png", png(SPREAD[:, :4], 0, b"\x0c"), GREY[:, :4] >> 4),
    "PNG, sBIT 10": ("png", png(GREY // 4, 0, b"\x0a"), GREY >> 4),
    "PNG, sBIT 8": ("png", png(GREY // 16, 0, b"\x08"), GREY >> 4),
    "PNG, sBIT 16": ("png", png(GREY, 0, b"\x10"), GREY >> 8),
    "PNG, nothing said": ("png", png(GREY, 0), GREY >> 8),
    "PNG, colour": ("png", png(COLOUR.repeat(3, 0), 2, b"\x0c\x0c\x0c"), COLOUR.repeat(3, 0) >> 4),
    "PNG, colour with alpha": ("png", png(np.dstack([COLOUR, GREY]), 6, b"\x0c" * 4), COLOUR >> 4),
    "PNG, grey with alpha": ("png", png(np.dstack([GREY, GREY]), 4, b"\x0c\x0c"), GREY >> 4),
    "PNG, colour, nothing said": ("png", png(COLOUR, 2), COLOUR >> 8),
    "TIFF, MaxSampleValue": ("tif", tiff(GREY), GREY >> 4),
    "TIFF, big-endian": ("tif", tiff(GREY, byteorder=">"), GREY >> 4),
    "TIFF, SMaxSampleValue": ("tif", tiff(GREY, 341), GREY >> 4),
    "TIFF, MaxSampleValue 255": ("tif", tiff(GREY // 16, maximum=255), GREY >> 4),
    "TIFF, the largest value of this image": ("tif", tiff(GREY, maximum=4094), GREY >> 8),
    "TIFF, colour": ("tif", tiff(COLOUR), COLOUR >> 4),
    "TIFF, colour, big-endian": ("tif", tiff(COLOUR, byteorder=">"), COLOUR >> 4),
    "TIFF, colour, compressed": ("tif", tiff(COLOUR, compression="zlib"), COLOUR >> 4),
    "TIFF, colour, compressed, big-endian": ("tif", tiff(COLOUR, compression="zlib", byteorder=">"), COLOUR >> 4),
    "TIFF of 12 bits": ("tif", packed_tiff(GREY), GREY >> 4),
    "PGM": ("pgm", b"P5 8 1 4095\n" + GREY.astype(">u2").tobytes(), GREY >> 4),
    "PPM": ("ppm", b"P6 8 1 4095\n" + COLOUR.astype(">u2").tobytes(), np.rint(COLOUR / 4095 * 255)),
    "JPEG 2000": ("j2k", jpeg2000(GREY), GREY >> 4),
}


@pytest.mark.parametrize(("ending", "content", "expected"), READ.values(), ids=READ)
def test_the_upper_eight_of_the_bits_that_the_file_states(
    ending: str, content: bytes, expected: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / f"image.{ending}"
    path.write_bytes(content)
    values = np.asarray(read_image(path))
    np.testing.assert_array_equal(values, expected if expected.ndim == 3 else expected[..., None].repeat(3, 2))


REFUSED = {
    "values beyond what is stated": (tiff(GREY, maximum=1023), "values up to 4095, but the file says .* 10 bits"),
    "separate planes": (
        tiff(np.ascontiguousarray(COLOUR.transpose(2, 0, 1)), planarconfig="separate"), "in separate planes",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_contradicts_itself_or_pillow_mixes_up_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "image.tif").write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot be read as an image .*{reason}"):
        read_image(tmp_path / "image.tif")


@pytest.mark.parametrize("side", [12, 150])
@pytest.mark.parametrize(("bits", "levels"), [(8, 1), (10, 4), (12, 16), (14, 64)])
@pytest.mark.parametrize("kind", ["grey", "colour", "grey with alpha"])
def test_a_set_that_uses_few_bits_is_warned_of_once(
    kind: str, bits: int, levels: int, side: int, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    for number in range(12):
        samples = draw.integers(0, 2 ** (bits - (number != 3)), (side, side, 1), np.uint16)
        samples[0, 0] = 2**bits - 1 if number == 3 else 0
        colour_type, channels = {"grey": (0, 1), "colour": (2, 3), "grey with alpha": (4, 2)}[kind]
        (tmp_path / f"{number:02d}.png").write_bytes(png(samples.repeat(channels, 2), colour_type))
    message = (
        f"^16 bits per channel in {re.escape(repr(str(tmp_path)))}: the largest value read .* is {2**bits - 1}, as of "
        f"{bits} bits, .* at most {levels} of 256 levels; multiply the values by {2 ** (16 - bits)}$"
    )

    def statistics() -> None:
        try:
            load_image_set(str(tmp_path)).statistics()
        except ValueError as refusal:
            assert bits == 8 and "constant" in str(refusal)

    for load in (lambda: load_images(str(tmp_path)), statistics):
        with pytest.warns(UserWarning, match=message) as seen:
            load()
        assert len(seen) == 1


def test_one_image_of_all_sixteen_bits_is_enough_for_silence(tmp_path: Path) -> None:
    for number in range(12):
        samples = np.full((6, 6), 4095 if number != 5 else 40_000, np.uint16)
        (tmp_path / f"{number:02d}.png").write_bytes(png(samples, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_images(str(tmp_path)).unique().tolist() == [15, 156]  # all scaled alike
