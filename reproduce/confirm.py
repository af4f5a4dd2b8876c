"""Test the primary claims of protocol.json with seeds that nobody has seen.

Every seed is computed once, and its numbers are written to reproduce/results/confirm/<data set>; with another profile
than the protocol's, to <out>/confirm. The command can be interrupted at any time: call it again to continue. Several
processes with the same --out share the seeds.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import reproduce.protocol as protocols
from reproduce.claims import Claim
from reproduce.evidence import confirmed_table
from reproduce.figure import settings_of
from reproduce.figures import FIGURES, train_networks
from reproduce.networks.training import PROFILES, RunDivergedError, RunFailedError
from reproduce.options import check_writable, exit_interrupted, new_parser, parse, report_error
from reproduce.processes import prepare_process
from reproduce.protocol import Protocol, data_set_name, is_complete, read_records, verdicts
from stepwise_lightning.data import load_images
from stepwise_lightning.errors import EX_TEMPFAIL, UserError, reason
from stepwise_lightning.files import atomic_write_text
from stepwise_lightning.runs import provenance


def confirm(arguments: list[str] | None = None) -> int:
    """Compute missing seeds; return 0 if all claims are confirmed, 1 if one is not, 2 for bad input."""
    parser = new_parser("reproduce confirm", __doc__ or "", PROFILES, with_seeds=False)
    parser.add_argument("--keep", action="store_true", help="keep trained networks of finished seeds")
    options = parse(parser, PROFILES, arguments)
    try:
        protocol = Protocol.read()
        name, work, folder = _places(protocol, options)
        prepare_process()
        for seed in protocol.seeds:
            with _locked(work / f"seed_{seed}.lock") as free:
                if free:
                    _compute(protocol, seed, options, work, folder / f"seed_{seed}.json")
        records = read_records(folder, protocol, warn=True)
        if not is_complete(protocol, records):
            print(f"other processes compute seeds of {name}: call again when they have ended")
            return EX_TEMPFAIL
        print(f"\n{confirmed_table(protocol, records)}\n\nrecords      {folder.resolve()}")
        return 0 if all(verdict.confirmed for verdict in verdicts(protocol, records)) else 1
    except Exception as error:
        return report_error(error)
    except KeyboardInterrupt:
        exit_interrupted("call again to continue")


def _places(protocol: Protocol, options: argparse.Namespace) -> tuple[str, Path, Path]:
    """Return the name of the data set, the folder of unfinished seeds, and the folder of records.

    Raises:
        UserError: the data set is not in the protocol.
        CannotWriteError: a folder is not writable.

    """
    name = data_set_name(options.data)
    if name not in protocol.data_sets:
        names = ", ".join(protocol.data_sets)
        raise UserError(f"{name!r} is not a data set of the protocol: choose --data from {names}, or folders so named")
    count, expected = len(load_images(options.data, options.root, options.download)), protocol.data_sets[name]
    if count != expected:
        raise UserError(f"{options.data!r} has {count} images, and the protocol {expected}: choose the same images")
    work = Path(options.out) / "confirm" / name
    folder = protocols.RESULTS / name if options.profile == protocol.profile else work
    for place in (work, folder):
        check_writable(place)
        place.mkdir(parents=True, exist_ok=True)
    return name, work, folder


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Yield whether no other process holds the lock of a seed, and hold it."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _compute(protocol: Protocol, seed: int, options: argparse.Namespace, work: Path, path: Path) -> None:
    """Compute the missing figures of a seed, and write its record after each."""
    record = read_records(path.parent, protocol).get(seed) or {
        "protocol": protocol.digest, "profile": options.profile, "data_set": data_set_name(options.data), "seed": seed,
        "figures": {},
    }  # fmt: skip
    out = work / f"seed_{seed}"
    places = ["--out", str(out), "--root", options.root, "--launcher", options.launcher, "--data", options.data]
    arguments = ["--profile", options.profile, "--seeds", str(seed), "--resume", *places]
    missing = [name for name in protocol.figures(seed) if name not in record["figures"]]
    if missing:
        number, count = protocol.seeds.index(seed) + 1, len(protocol.seeds)
        print(f"\n=== {record['data_set']}, seed {seed}, {number} of {count}: {', '.join(missing)}", flush=True)
    with suppress(RunDivergedError):  # the result of its figures, which train the other networks
        train_networks(missing, arguments)
    for name in missing:
        print(name, flush=True)
        started = time.perf_counter()
        record["figures"][name] = _figure(protocol, name, arguments)
        record["figures"][name]["seconds"] = round(time.perf_counter() - started, 1)
        text = json.dumps(record | provenance(), indent=1, ensure_ascii=False)
        atomic_write_text(path, text + "\n")
    if not options.keep:
        shutil.rmtree(out, ignore_errors=True)


def _figure(protocol: Protocol, name: str, arguments: list[str]) -> dict[str, Any]:
    """Return all claims of a figure for one seed, measured number and control, or the error of its experiment.

    A network that diverges is such an error.

    Raises:
        UserError: the figure does not have the claims of the protocol.
        OSError: files or data cannot be read or written.
        RunFailedError: training failed, but did not diverge.

    """
    options = FIGURES[name].options(arguments)
    directory = Path(options.out) / name
    directory.mkdir(parents=True, exist_ok=True)
    try:
        claims = FIGURES[name].produce(options, directory).claims
    except (OSError, UserError) as error:
        if isinstance(error, (OSError, RunFailedError)) and not isinstance(error, RunDivergedError):
            raise
        text = reason(error).replace(f"{options.out}/", "")
        print(f"warning: {name}, seed {options.seeds[0]}: {text}", file=sys.stderr)
        return {"error": text, "options": settings_of(options)}
    if options.profile == protocol.profile:
        _check_claims(protocol, name, claims)
    numbers = {
        claim.name: [float(claim.measured), float("nan" if claim.control_value is None else claim.control_value)]
        for claim in claims
    }
    return {"claims": numbers, "options": settings_of(options)}


def _check_claims(protocol: Protocol, name: str, claims: list[Claim]) -> None:
    found = {(claim.name, claim.relation, claim.control) for claim in claims}
    for primary in protocol.claims:
        if primary.figure == name and (primary.claim, primary.relation, primary.control) not in found:
            raise UserError(
                f"{name} has no claim {primary.claim!r} with relation {primary.relation} and control "
                f"{primary.control!r}: the figure was changed, and protocol.json must be changed too"
            )
