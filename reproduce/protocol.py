"""Frozen protocol of the primary claims, its records, and the verdicts on them.

``protocol.json`` lists the primary claims with bound, control and number of seeds. Its SHA-256 determines the seeds,
which therefore cannot be chosen, and a changed protocol has other seeds. ``python -m reproduce confirm`` writes one
record for every seed to ``results/confirm/<data set>``; records of another protocol are ignored.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from reproduce.claims import Claim
from reproduce.inference import PairedDifference, holm, paired_difference, prediction_interval, success_bound
from stepwise_lightning.data.image_sets import DATA_SETS
from stepwise_lightning.errors import UserError, reason

PROTOCOL = Path(__file__).with_name("protocol.json")
RESULTS = Path(__file__).parent / "results" / "confirm"
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class PrimaryClaim:
    """A claim that is judged for each seed: ``value relation bound``, and the control violates the bound."""

    figure: str
    claim: str
    relation: str
    bound: float
    control: str
    seeds: int

    def result(self, record: dict[str, Any]) -> Claim:
        """Return the claim for one seed; NaN if the figure could not be computed."""
        numbers = record["figures"][self.figure].get("claims", {}).get(self.claim, [math.nan, math.nan])
        return Claim(self.claim, "", numbers[0], self.relation, self.bound, self.control, numbers[1])


@dataclass(frozen=True)
class Protocol:
    """Content of ``protocol.json``, and its SHA-256."""

    digest: str
    profile: str
    data_sets: dict[str, int]
    """Number of images of each data set; a folder of images is identified by its name."""
    min_probability: float
    """Least lower confidence bound of the probability that a confirmed claim holds for a seed."""
    exclusions: str
    claims: list[PrimaryClaim]

    @classmethod
    def read(cls) -> Protocol:
        """Return the committed protocol."""
        text = PROTOCOL.read_bytes()
        content = json.loads(text)
        claims = [PrimaryClaim(**claim) for claim in content.pop("claims")]
        return cls(hashlib.sha256(text).hexdigest(), claims=claims, **content)

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds: 1000 + SHA-256 of ``<digest> <index>`` modulo 999 000."""
        count = max(claim.seeds for claim in self.claims)
        texts = (f"{self.digest} {index}" for index in range(2 * count))  # more than enough without repetitions
        draws = (1000 + int(hashlib.sha256(text.encode()).hexdigest(), 16) % 999_000 for text in texts)
        return list(dict.fromkeys(draws))[:count]

    def figures(self, seed: int) -> list[str]:
        """Return the figures that this seed is used for."""
        claims = [claim for claim in self.claims if self.seeds.index(seed) < claim.seeds]
        return list(dict.fromkeys(claim.figure for claim in claims))


def data_set_name(data: str) -> str:
    """Return the name of a data set in the protocol: the option, or the name of the folder."""
    return data if data in DATA_SETS else Path(data).resolve().name


def read_records(folder: Path, protocol: Protocol, warn: bool = False) -> dict[int, dict[str, Any]]:
    """Return the records of the protocol by seed; with ``warn``, report other records in one line.

    Raises:
        UserError: a record is damaged.

    """
    records, others = {}, 0
    for path in sorted(folder.glob("seed_*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["protocol"] == protocol.digest:
                records[int(record["seed"])] = record
            else:
                others += 1
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(f"{path} cannot be read ({reason(error)}): remove it, and confirm again") from error
    if others and warn:
        print(f"warning: {others} records in {folder} belong to another protocol and are ignored", file=sys.stderr)
    return records


def is_complete(protocol: Protocol, records: dict[int, dict[str, Any]]) -> bool:
    """Return whether every figure of every seed has been computed."""
    return all(set(protocol.figures(seed)) <= records.get(seed, {"figures": {}})["figures"].keys()
               for seed in protocol.seeds)  # fmt: skip


def computed_results(protocol: Protocol, records: dict[int, dict[str, Any]], claim: PrimaryClaim) -> list[Claim]:
    """Return a claim for each of its seeds whose figure has been computed."""
    chosen = [records[seed] for seed in protocol.seeds[: claim.seeds] if seed in records]
    return [claim.result(record) for record in chosen if claim.figure in record["figures"]]


@dataclass(frozen=True)
class Verdict:
    """Result of a primary claim over its seeds."""

    primary: PrimaryClaim
    results: list[Claim]
    """The claim for each seed."""
    difference: PairedDifference
    """Run minus control."""
    p: float
    """One-sided p-value of the difference, adjusted for the number of primary claims."""
    min_probability: float

    @property
    def values(self) -> list[float]:
        """Measured numbers."""
        return [result.measured for result in self.results]

    @property
    def control_values(self) -> list[float]:
        """Numbers measured on the control."""
        return [result.control_value for result in self.results if result.control_value is not None]

    @property
    def successes(self) -> int:
        """Number of seeds whose run satisfies the bound and whose control violates it."""
        return sum(result.holds for result in self.results)

    @property
    def probability(self) -> float:
        """Lower confidence bound, 95 %, of the probability of a success."""
        return success_bound(self.successes, len(self.results))

    @property
    def confirmed(self) -> bool:
        """Return whether the claim is confirmed."""
        return self.probability >= self.min_probability and self.p <= SIGNIFICANCE


def verdicts(protocol: Protocol, records: dict[int, dict[str, Any]]) -> list[Verdict]:
    """Return the verdicts on all primary claims from complete records."""
    results, differences = [], []
    for claim in protocol.claims:
        results.append(computed_results(protocol, records, claim))
        sign = 1 if claim.relation == ">=" else -1
        pairs = ((each.measured, each.control_value) for each in results[-1])
        oriented = paired_difference([sign * (value - control) for value, control in pairs if control is not None])
        low, high = sorted([sign * oriented.low, sign * oriented.high])
        differences.append(PairedDifference(sign * oriented.estimate, low, high, oriented.p))
    adjusted = holm([difference.p for difference in differences])
    rows = zip(protocol.claims, results, differences, adjusted, strict=True)
    return [Verdict(*row, protocol.min_probability) for row in rows]


def confirmed_intervals(figure: str, data: str, settings: dict[str, Any]) -> dict[str, list[float]]:
    """Return the prediction interval of a new run for each confirmed claim of a figure.

    Empty if the records of this data set are not complete, or if the figure was computed with other settings. The level
    is 95 % for all primary claims together (Bonferroni). Student's t is used because the range of ten runs, the
    distribution-free interval, would miss two new runs in eleven. Intervals that contain the number of a control are
    omitted: they are too wide to judge a single run.
    """
    protocol = Protocol.read()
    records = read_records(RESULTS / data_set_name(data), protocol)
    if not is_complete(protocol, records):
        return {}
    intervals = {}
    for verdict in verdicts(protocol, records):
        claim = verdict.primary
        computed = [records[seed]["figures"][claim.figure] for seed in protocol.seeds[: claim.seeds]]
        same = all(entry["options"] == settings for entry in computed)
        interval = prediction_interval(verdict.values, 1 - SIGNIFICANCE / len(protocol.claims))
        if claim.figure == figure and same and verdict.confirmed and interval:
            low, high = interval
            if not any(low <= value <= high for value in verdict.control_values):
                intervals[claim.claim] = [low, high]
    return intervals
