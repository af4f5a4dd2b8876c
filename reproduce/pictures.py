"""Write small copies of the figures to ``docs/<figure>.png``: ``python -m reproduce.pictures results``."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from reproduce.figures import FIGURES

DOCS = Path(__file__).parent.parent / "docs"
WIDTH = 1200


def write_pictures(out: str | Path) -> list[Path]:
    """Shrink the figures in ``out`` and return the paths of the copies."""
    written = []
    for name in (name for name in FIGURES if (Path(out) / name / "figure.png").exists()):
        with Image.open(Path(out) / name / "figure.png") as figure:
            size = WIDTH, round(figure.height * WIDTH / figure.width)
            small = figure.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        written.append(DOCS / f"{name}.png")
        small.quantize(256, Image.Quantize.FASTOCTREE).save(written[-1], optimize=True)
    return written


if __name__ == "__main__":
    print(*write_pictures(sys.argv[1]), sep="\n")
