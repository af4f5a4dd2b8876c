"""Progress of long computations on standard error: a bar on a terminal, otherwise plain lines."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

# Seconds before a bar appears, and between two lines.
_DELAY, _LINE_INTERVAL = 5.0, 20.0


class _Lines:
    """Write each update of a tqdm bar as a line to standard error."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def progress_bar(
    description: str, unit: str, total: int | None = None, items: Iterable[Any] | None = None, shown: bool = True
) -> tqdm[Any]:
    """Return a bar over ``items``, or one that ``update`` advances to ``total``; silent on short work and ranks > 0."""
    options: dict[str, Any] = {"desc": description, "unit": unit, "total": total, "leave": False, "delay": _DELAY}
    options["disable"] = not shown or dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
    if not sys.stderr.isatty():
        known = total is not None or items is not None
        line = "{n_fmt} of {total_fmt} {unit}s, {elapsed}, {remaining} left" if known else "{n_fmt} {unit}s, {elapsed}"
        options |= {"bar_format": f"{{desc}}: {line}{{postfix}}", "file": _Lines(), "position": 0}
        options |= {"mininterval": _LINE_INTERVAL, "miniters": 1}
    return tqdm(items, **options)
