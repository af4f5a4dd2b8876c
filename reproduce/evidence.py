"""Write the table of confirmed claims into ``docs/evidence.md``: ``python -m reproduce.evidence``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import reproduce.protocol as protocols
from reproduce.protocol import Protocol, Verdict, computed_results, is_complete, read_records, verdicts
from stepwise_lightning.files import atomic_write_text

PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"
BEGIN, END = "<!-- written by python -m reproduce.evidence: begin -->\n", "<!-- end -->\n"
HEADER = (
    "| claim | bound | holds | probability at least | run: median (range) | control | run minus control [95 %] | p | "
    "verdict |"
)


def confirmed_table(protocol: Protocol, records: dict[int, dict[str, Any]]) -> str:
    """Return the verdicts on the primary claims as a Markdown table."""
    lines = [HEADER, "|---" * (HEADER.count("|") - 1) + "|"]
    return "\n".join([*lines, *map(_row, verdicts(protocol, records))])


def _row(verdict: Verdict) -> str:
    primary, difference = verdict.primary, verdict.difference
    relation = {"<=": "≤", ">=": "≥"}[primary.relation]
    cells = (
        f"`{primary.figure}`, `{primary.claim}`",
        f"{relation} {primary.bound:.4g}",
        f"{verdict.successes} of {len(verdict.results)}",
        f"{verdict.probability:.3f}",
        _summary(verdict.values),
        f"{primary.control}: {_summary(verdict.control_values)}",
        f"{difference.estimate:.3g} [{difference.low:.3g}, {difference.high:.3g}]",
        f"{verdict.p:.2g}",
        "confirmed" if verdict.confirmed else "**fails**",
    )
    return "| " + " | ".join(cells).replace("|Γ|", "\\|Γ\\|") + " |"


def incomplete_table(protocol: Protocol, records: dict[int, dict[str, Any]]) -> str:
    """Return the results of the seeds computed so far as a Markdown table, without verdicts."""
    lines = ["| claim | seeds computed | holds |", "|---|---|---|"]
    for claim in protocol.claims:
        results = computed_results(protocol, records, claim)
        holds = sum(result.holds for result in results)
        lines.append(f"| `{claim.figure}`, `{claim.claim}` | {len(results)} of {claim.seeds} | {holds} |")
    return "\n".join(lines)


def _summary(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def confirmed_section() -> str:
    """Return the part of the page that records determine: a table for each data set."""
    protocol, parts = Protocol.read(), []
    for name in protocol.data_sets:
        records = read_records(protocols.RESULTS / name, protocol)
        if records:
            complete = is_complete(protocol, records)
            commits = sorted({str(record["commit"])[:8] for record in records.values()})
            state = "" if complete else " Incomplete: there is no verdict before all seeds are computed."
            table = (confirmed_table if complete else incomplete_table)(protocol, records)
            text = f"Commit {', '.join(commits)}.{state}\n\n{table}"
        else:
            text = "Not computed yet."
        parts.append(f"\n### {name}\n\n{text}\n")
    return f"\nProtocol {protocol.digest[:16]}.\n{''.join(parts)}\n"


def write_section() -> None:
    """Replace the section of the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    atomic_write_text(PAGE, before + BEGIN + confirmed_section() + END + rest.partition(END)[2])


if __name__ == "__main__":
    write_section()
