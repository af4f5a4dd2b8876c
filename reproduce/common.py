"""What every figure script shares: claims, provenance, and output that is never half-written."""

from __future__ import annotations

import csv
import json
import logging
import operator
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from stepwise_lightning.provenance import provenance

_RELATIONS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}


@dataclass
class Claim:
    """One sentence with a number: ``measured relation bound``, relation ``<=`` or ``>=``."""

    name: str
    description: str
    measured: float
    relation: str
    bound: float
    holds: bool = field(init=False)

    def __post_init__(self) -> None:
        self.holds = _RELATIONS[self.relation](self.measured, self.bound)

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        return f"  {verdict}  {self.description}: {self.measured:.4g} ({self.relation} {self.bound:.4g})"


def write_outputs(
    directory: Path, figure: Figure, columns: list[str], rows: Iterable[list[Any]], claims: list[Claim], **facts: Any
) -> None:
    """Write ``figure.png``, ``figure.pdf``, ``data.csv`` and ``claims.json``, each replaced only when complete."""
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / "figure.png", lambda path: figure.savefig(path, format="png", dpi=150))
    _replace(directory / "figure.pdf", lambda path: figure.savefig(path, format="pdf"))

    def write_csv(path: Path) -> None:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])

    _replace(directory / "data.csv", write_csv)
    document = {"claims": [asdict(claim) for claim in claims], "all_hold": all(c.holds for c in claims)} | facts
    text = json.dumps(document | provenance(), indent=2, ensure_ascii=False) + "\n"
    _replace(directory / "claims.json", lambda path: path.write_text(text, encoding="utf-8"))


def report(directory: Path, claims: list[Claim]) -> int:
    """Print where everything lies and the verdict; return the exit status, 1 if a claim fails."""
    directory = directory.resolve()
    print(f"\nfigure       {directory / 'figure.png'} (and .pdf)")
    print(f"data         {directory / 'data.csv'}")
    print(f"claims       {directory / 'claims.json'}")
    print(f"TensorBoard  tensorboard --logdir {directory / 'tensorboard'}\n")
    print(*claims, sep="\n")
    failed = sum(not claim.holds for claim in claims)
    verdict = f"all {len(claims)} claims hold" if not failed else f"{failed} of {len(claims)} claims FAIL"
    print(f"\nVERDICT: {verdict}")
    return 1 if failed else 0


def data_name(data: str) -> str:
    """Return what a figure calls the data set that an option names."""
    names = {"photos": "scikit-image's photographs (not the paper's data)", "cifar10": "CIFAR-10", "stl10": "STL-10"}
    return names.get(data, f"{Path(data).resolve().name} (folder)")


def print_table(table: list[dict[str, Any]]) -> None:
    """Print rows of equal keys as Markdown."""
    print("\n| " + " | ".join(name.replace("_", " ") for name in table[0]) + " |\n" + "|---" * len(table[0]) + "|")
    for row in table:
        cells = ("" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
        print("| " + " | ".join(cells) + " |")


def quiet_lightning() -> None:
    """Silence start-up messages that are not about the experiment."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)
