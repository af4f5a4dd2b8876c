"""Reference numbers of the smoke profile, one file per figure in ``reproduce/expected/``.

``python -m reproduce.reference OUT`` writes them from the output of ``python -m reproduce all --profile smoke --seeds 0
--out OUT``; ``tests/reproduce/test_all_figures.py`` compares new runs with them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

EXPECTED = Path(__file__).parent / "expected"
# (relative, absolute). ResNet training amplifies the round-off differences between machines and versions of torch: the
# same code measured a growth of 4.2 and 6.0, and an alignment of 0.09 and 0.16, on two machines. Counts of modes and
# steps may differ by one.
TOLERANCES = {
    "linear_model": (0.05, 1e-3), "start_scale": (0.05, 1e-3), "kernel_pca": (0.0, 1e-3), "kernel_mlp": (0.05, 0.01),
    "faster_modes": (0.25, 0.01), "any_loss": (0.0, 0.01),
    "standard_init": (0.6, 0.1),  # separations of 3.1 and 4.6 on two machines
}  # fmt: skip
RESNET_TOLERANCE = (0.4, 0.1)


def write_references(out: str | Path) -> list[Path]:
    """Write a reference for every finished figure in ``out``, and return the paths."""
    written = []
    for source in sorted(Path(out).glob("*/claims.json")):
        document = json.loads(source.read_text(encoding="utf-8"))
        name = document["name"]
        numbers = {
            claim["name"]: {"measured": claim["measured"], "tolerance": _tolerance(name, claim["measured"])}
            for claim in document["claims"]
        }
        facts = {key: document[key] for key in ("name", "data_set", "seeds", "options", "versions", "machine", "date")}
        written.append(EXPECTED / f"{name}.json")
        written[-1].write_text(json.dumps(facts | {"numbers": numbers}, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return written


def differences(document: dict[str, Any]) -> list[str]:
    """Return one line per number in a figure's ``claims.json`` that differs from the reference."""
    reference = json.loads((EXPECTED / f"{document['name']}.json").read_text(encoding="utf-8"))
    for key in ("data_set", "seeds", "options"):
        if document[key] != reference[key]:
            return [f"{document['name']}: {key} are {document[key]}, but the reference has {reference[key]}"]
    numbers = {claim["name"]: claim["measured"] for claim in document["claims"]}
    if unmatched := sorted(numbers.keys() ^ reference["numbers"].keys()):
        return [f"{document['name']}: claims {unmatched} are missing in the figure or in the reference"]
    lines = []
    for name, number in numbers.items():
        measured, tolerance = reference["numbers"][name].values()
        if not abs(number - measured) <= tolerance:
            lines.append(f"{document['name']}, {name}: {number:.5g} instead of {measured:.5g} ± {tolerance:.2g}")
    return lines


def _tolerance(figure: str, measured: float) -> float:
    relative, absolute = TOLERANCES.get(figure, RESNET_TOLERANCE)
    is_count = figure not in TOLERANCES and float(measured).is_integer()
    return 1.0 if is_count else max(relative * abs(measured), absolute)


if __name__ == "__main__":
    print(*write_references(sys.argv[1]), sep="\n")
