"""What every figure script shares: options, claims, provenance, and output that is never half-written."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import logging
import operator
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from matplotlib.figure import Figure
from tqdm import tqdm

import reproduce
import stepwise_lightning
from stepwise_lightning.files import atomic_write, atomic_write_text
from stepwise_lightning.runs.provenance import provenance

# Options that say where and how, not what.
_PLACES = ("out", "root", "download", "resume", "launcher")
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


def read_claim(saved: Any) -> Claim:
    """Return a claim from ``claims.json``, judged anew; ValueError, KeyError or TypeError if it is damaged."""
    words = str(saved["name"]), str(saved["description"])
    return Claim(*words, float(saved["measured"]), saved["relation"], float(saved["bound"]))


@dataclass
class Outcome:
    """What a figure script comes to: a figure, long-format data, claims, a row per run, and settings of its own."""

    figure: Figure
    columns: list[str]
    rows: Iterable[list[Any]]
    claims: list[Claim]
    runs: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)


Produce = Callable[[argparse.Namespace, Path], Outcome]


def run_figure(
    name: str,
    description: str,
    paper: str,
    profiles: dict[str, dict[str, Any]],
    produce: Produce,
    arguments: list[str] | None = None,
    extend: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> int:
    """Run a figure script; return 0 if every claim holds, 1 if one fails, 2 for bad input.

    Args:
        name: of the script, and of the folder that it writes, under ``--out``.
        description: the script's docstring, whose first line is the figure's title.
        paper: what the paper shows, and where.
        profiles: settings by profile, each an attribute of the options unless ``extend`` made it an option given.
        produce: from options and folder to the outcome; it raises ValueError, OSError or RuntimeError for bad input.
        arguments: of the command line.
        extend: adds options.

    """
    figure_parser = parser(name, description, profiles)
    extend(figure_parser)
    options = figure_parser.parse_args(arguments)
    for key, value in ({"data": "photos"} | profiles[options.profile]).items():
        if getattr(options, key, None) is None:
            setattr(options, key, value)
    directory, started = Path(options.out) / name, time.perf_counter()
    asked = {k: v for k, v in vars(options).items() if k not in (*_PLACES, "seeds", "data")}
    identity = {"data_set": options.data, "seeds": options.seeds, "options": asked}
    identity |= {"version": version("stepwise_lightning"), "source_sha256": source_digest()}
    if options.resume and (kept := _finished(directory, identity)) is not None:
        print(f"{name}: kept, it was finished before")
        return report(directory, kept)
    quiet_lightning()
    torch.set_num_threads(1)  # these experiments are small: runs side by side use the cores better than threads
    try:
        check_writable(directory)
        outcome = produce(options, directory)
    except (ValueError, OSError, RuntimeError) as error:
        print("error:", *str(error).split(), file=sys.stderr)  # in one line, whatever a library says
        return 2
    except KeyboardInterrupt:
        interrupted()
    facts = {
        "name": name, "title": description.splitlines()[0], "paper": paper, **identity, "settings": outcome.settings,
        "runs": outcome.runs, "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    write_outputs(directory, outcome, facts)
    print_table(outcome.runs)
    return report(directory, outcome.claims)


def interrupted() -> NoReturn:
    """End the program, not one figure only, after Ctrl-C."""
    print("\ninterrupted: what is finished is kept, and with --resume the rest goes on", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)  # as shells say it


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, without the usage."""
        self.exit(2, f"error: {message} (see --help)\n")


def parser(name: str, description: str, profiles: dict[str, dict[str, Any]]) -> argparse.ArgumentParser:
    """Return a parser of the options that every figure has."""
    result = _Parser(
        prog=f"python -m reproduce {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--profile", choices=profiles, default="cpu", help="size of the experiment (default: cpu)")
    result.add_argument("--data", help="photos, cifar10, stl10 or a folder of images (default: the profile's, photos)")
    result.add_argument("--out", default="results", help="folder for the outputs (default: results)")
    result.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data and weights (default: 0 1 2)")
    result.add_argument(
        "--resume", action="store_true", help="keep what an earlier call of these options and this code finished"
    )
    result.add_argument("--root", default="data", help="where cifar10 and stl10 lie (default: data)")
    result.add_argument("--download", action="store_true", help="fetch them if they are not there")
    result.add_argument("--launcher", default="", help="put before the commands that train ResNets, for instance srun")
    return result


def _finished(directory: Path, identity: dict[str, Any]) -> list[Claim] | None:
    """Return the claims of an earlier call that was asked for the same, or None."""
    path = directory / "claims.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        claims = [read_claim(saved) for saved in document["claims"]]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        print(f"warning: {path} cannot be read; the figure is made again", file=sys.stderr)
        return None
    if json.loads(json.dumps(identity)) != {key: document.get(key) for key in identity}:
        return None
    if changed := [name for name in FILES if _digest(directory / name) != document.get("sha256", {}).get(name)]:
        print(f"warning: {directory / changed[0]} is not what was written; the figure is made again", file=sys.stderr)
        return None
    return claims


def _digest(path: Path) -> str | None:
    """Return the SHA-256 of a file, None if there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_digest() -> str:
    """Return one SHA-256 of the package's and the figures' code, as it is here, committed or not."""
    digest = hashlib.sha256()
    for path in sorted(p for module in (stepwise_lightning, reproduce) for p in Path(module.__path__[0]).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_writable(directory: Path) -> None:
    """Refuse an output folder before hours are spent; nothing is left behind.

    Raises:
        PermissionError: it is not a folder, or cannot be written to.

    """
    existing = next(path for path in (directory, *directory.resolve().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise PermissionError(f"cannot write to {str(existing)!r}: choose another folder with --out")


def each(function: Callable[..., Any], items: Sequence[tuple[Any, ...]], what: str) -> list[Any]:
    """Call ``function(*item)`` for every item, in as many processes as there are cores, behind one progress bar.

    Function, items and results must be picklable. A single item runs here.
    """
    if len(items) == 1 or os.cpu_count() == 1:
        return [function(*item) for item in tqdm(items, what, unit="run", disable=len(items) == 1)]
    with ProcessPoolExecutor(min(len(items), os.cpu_count() or 1), get_context("spawn"), _prepare_process) as pool:
        futures = [pool.submit(function, *item) for item in items]
        try:
            for future in tqdm(as_completed(futures), what, len(futures), unit="run"):
                future.result()
        except BaseException:
            for process in active_children():  # or the pool would wait for what they do now
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]


def is_alone() -> bool:
    """Return whether this process is the one that was started: others run side by side, behind one bar for all."""
    return parent_process() is None


def progress_bar(steps: int) -> list[TQDMProgressBar]:
    """Return the bar of a single training run, redrawn 50 times; none beside others."""
    return [TQDMProgressBar(refresh_rate=max(1, steps // 50))] if is_alone() else []


def _prepare_process() -> None:
    quiet_lightning()
    torch.set_num_threads(1)


FILES = ("figure.png", "figure.pdf", "data.csv")  # and claims.json, which has their checksums


def write_outputs(directory: Path, outcome: Outcome, facts: dict[str, Any]) -> None:
    """Write ``figure.png``, ``figure.pdf``, ``data.csv`` and ``claims.json``, each replaced only when complete."""
    directory.mkdir(parents=True, exist_ok=True)
    atomic_write(directory / "figure.png", lambda path: outcome.figure.savefig(path, format="png", dpi=150))
    atomic_write(directory / "figure.pdf", lambda path: outcome.figure.savefig(path, format="pdf"))

    def write_csv(path: Path) -> None:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([outcome.columns, *outcome.rows])

    atomic_write(directory / "data.csv", write_csv)
    claims = [asdict(claim) for claim in outcome.claims]
    document = {"claims": claims, "all_hold": all(claim.holds for claim in outcome.claims)} | facts | provenance()
    document["sha256"] = {name: _digest(directory / name) for name in FILES}
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    atomic_write_text(directory / "claims.json", text)


def report(directory: Path, claims: list[Claim]) -> int:
    """Print where everything lies and the verdict; return the exit status, 1 if a claim fails."""
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


def seeds_of(options: argparse.Namespace) -> str:
    """Return ``seeds 0, 1, 2``, for the texts of claims."""
    return f"seed{'s' * (len(options.seeds) > 1)} {', '.join(map(str, options.seeds))}"


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
