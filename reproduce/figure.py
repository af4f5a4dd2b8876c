"""Run one figure, and write its outputs atomically."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

import reproduce
import stepwise_lightning
from reproduce.claims import Claim, read_claim
from reproduce.options import PLACES, check_writable, exit_interrupted, new_parser, parse, report_error
from reproduce.processes import prepare_process
from reproduce.protocol import confirmed_intervals
from stepwise_lightning.files import atomic_write, atomic_write_text
from stepwise_lightning.runs import provenance

FILES = ("figure.png", "figure.pdf", "data.csv")  # claims.json contains their checksums


@dataclass
class Outcome:
    """Result of an experiment: figure, long-format data, claims, one row per run, and further settings."""

    figure: Figure
    columns: list[str]
    rows: Iterable[list[Any]]
    claims: list[Claim]
    runs: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class PaperFigure:
    """A figure and the function that produces it.

    Args:
        name: name of the figure, and of its folder under ``--out``.
        description: text for ``--help``; the first line is the title.
        paper: corresponding place in the paper, and its content.
        profiles: settings by profile; command-line options override them.
        produce: function of options and output folder that returns the outcome. Bad input raises an exception with a
            one-line message (:func:`stepwise_lightning.errors.one_line`).
        add_options: function that adds further options to the parser.
        networks: loss and variant of the networks that it trains for every seed, for :func:`figures.train_networks`.

    """

    name: str
    description: str
    paper: str
    profiles: dict[str, dict[str, Any]]
    produce: Callable[[argparse.Namespace, Path], Outcome]
    add_options: Callable[[argparse.ArgumentParser], None] = lambda _: None
    networks: Sequence[tuple[str, str]] = ()

    @property
    def title(self) -> str:
        """First line of the description."""
        return self.description.splitlines()[0]

    def options(self, arguments: list[str] | None = None) -> argparse.Namespace:
        """Parse command-line arguments."""
        parser = new_parser(f"reproduce {self.name}", self.description, self.profiles)
        self.add_options(parser)
        return parse(parser, self.profiles, arguments)


def run_figure(figure: PaperFigure, arguments: list[str] | None = None) -> int:
    """Run a figure; return 0 if every claim holds, 1 if one fails, 2 for bad input. Raise other errors."""
    options = figure.options(arguments)
    directory, started = Path(options.out) / figure.name, time.perf_counter()
    settings = settings_of(options)
    identity = {"data_set": options.data, "seeds": options.seeds, "options": settings}
    intervals = confirmed_intervals(figure.name, options.data, settings)
    identity |= {"version": version("stepwise_lightning"), "source_sha256": source_digest(), "intervals": intervals}
    if options.resume and (finished := finished_claims(directory, identity)) is not None:
        print(f"{figure.name}: kept from an earlier run")
        return print_verdict(directory, finished)
    prepare_process()
    try:
        check_writable(directory)
        outcome = figure.produce(options, directory)
        outcome.claims = [replace(claim, interval=intervals.get(claim.name, [])) for claim in outcome.claims]
        metadata = {
            "name": figure.name, "title": figure.title, "paper": figure.paper, **identity,
            "settings": outcome.settings, "runs": outcome.runs, "seconds": round(time.perf_counter() - started, 1),
        }  # fmt: skip
        write_outputs(directory, outcome, metadata)
    except Exception as error:
        return report_error(error)
    except KeyboardInterrupt:
        exit_interrupted()
    print_table(outcome.runs)
    return print_verdict(directory, outcome.claims)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that affect the numbers of one seed."""
    return {name: value for name, value in vars(options).items() if name not in (*PLACES, "seeds", "data")}


def finished_claims(directory: Path, identity: dict[str, Any]) -> list[Claim] | None:
    """Return the claims of an earlier call with the same options and code, or None."""
    path = directory / "claims.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        claims = [read_claim(saved) for saved in document["claims"]]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        print(f"warning: {path} cannot be read; computing the figure again", file=sys.stderr)
        return None
    if json.loads(json.dumps(identity)) != {key: document.get(key) for key in identity}:
        return None
    if changed := [name for name in FILES if _digest(directory / name) != document.get("sha256", {}).get(name)]:
        path = directory / changed[0]
        print(f"warning: {path} is missing or was changed; computing the figure again", file=sys.stderr)
        return None
    return claims


def _digest(path: Path) -> str | None:
    """Return the SHA-256 of a file, or None if it does not exist."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_digest() -> str:
    """Return one SHA-256 of the source files of the package and the figures, including uncommitted changes."""
    digest = hashlib.sha256()
    for path in sorted(p for module in (stepwise_lightning, reproduce) for p in Path(module.__path__[0]).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_outputs(directory: Path, outcome: Outcome, metadata: dict[str, Any]) -> None:
    """Write ``figure.png``, ``figure.pdf``, ``data.csv`` and ``claims.json``, each atomically.

    Raises:
        CannotWriteError: a file cannot be written.

    """
    atomic_write(directory / "figure.png", lambda path: outcome.figure.savefig(path, format="png", dpi=150))
    with rc_context({"pdf.fonttype": 42}):  # TrueType, as publishers require
        atomic_write(directory / "figure.pdf", lambda path: outcome.figure.savefig(path, format="pdf"))

    def write_csv(path: Path) -> None:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([outcome.columns, *outcome.rows])

    atomic_write(directory / "data.csv", write_csv)
    claims = [asdict(claim) for claim in outcome.claims]
    document = {"claims": claims, "all_hold": all(claim.holds for claim in outcome.claims)} | metadata | provenance()
    document["sha256"] = {name: _digest(directory / name) for name in FILES}
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    atomic_write_text(directory / "claims.json", text)


def print_table(table: list[dict[str, Any]]) -> None:
    """Print rows with equal keys as a Markdown table."""
    print("\n| " + " | ".join(name.replace("_", " ") for name in table[0]) + " |\n" + "|---" * len(table[0]) + "|")
    for row in table:
        cells = ("" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
        print("| " + " | ".join(cells) + " |")


def print_verdict(directory: Path, claims: list[Claim]) -> int:
    """Print the output paths and the claims; return 1 if a claim fails, else 0."""
    directory = directory.resolve()
    print(f"\nfigure       {directory / 'figure.png'} (and .pdf)")
    print(f"data         {directory / 'data.csv'}")
    print(f"claims       {directory / 'claims.json'}")
    if (directory / "tensorboard").is_dir():
        print(f"TensorBoard  tensorboard --logdir {directory / 'tensorboard'}")
    print("", *claims, sep="\n")
    failed = sum(not claim.holds for claim in claims)
    verdict = f"all {len(claims)} claims hold" if not failed else f"{failed} of {len(claims)} claims FAIL"
    print(f"\nVERDICT: {verdict}")
    return 1 if failed else 0
