"""Model card of a run: method, data, spectrum, steps, accuracy and versions, from the files of the run."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepwise_lightning.commands.summary import COLUMNS, table
from stepwise_lightning.errors import NotFoundError
from stepwise_lightning.runs.saved import checkpoint_of, configuration_of, saved_checkpoint
from stepwise_lightning.spectrum.record import SpectrumRecord

_ACCURACY = re.compile(r"(val|test)/(knn|probe)_top\d")  # of the callbacks OnlineKNN and OnlineLinearProbe


def model_card(run: str | Path, code: list[str]) -> str:
    """Return a model card in Markdown; contents without a file in the folder of the run are left out.

    Spectrum and accuracies are the last ones until the step of the checkpoint.

    Args:
        run: the folder of a run, ``runs/<name>/<version>``, or a checkpoint in it.
        code: Python code that loads the weights.

    Raises:
        ValueError, FileNotFoundError: the configuration or the checkpoint cannot be read.

    """
    checkpoint = checkpoint_of(run)
    folder = checkpoint.absolute().parent.parent
    configuration = configuration_of(checkpoint)
    rows = {name: _described(configuration.get(part)) for name, part in (("method", "model"), ("data", "data"))}
    step = saved_checkpoint(checkpoint)["global_step"]
    rows["steps"] = f"{step}, seed {configuration.get('seed_everything')}"
    rows["accuracy"] = ", ".join(_accuracies(folder, step)) or "no accuracy of k-NN or a probe in the files of the run"
    rows |= _provenance(folder / "provenance.json")
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    front = ["---", "library_name: stepwise_lightning", "tags: [self-supervised-learning]", "---"]
    title = f"# {'/'.join(folder.parts[-2:])}"
    table_lines = ["| | |", "|---|---|", *lines, *_spectrum(folder, step)]
    parts = [*front, title, "", *table_lines, "", "```python", *code, "```", ""]
    return "\n".join(parts)


def _described(part: Any) -> str:
    """Return the class and the arguments of a part of a configuration."""
    if not isinstance(part, dict):
        return ""
    settings = json.dumps(part.get("init_args") or {}, default=str).replace("|", "\\|")
    return f"`{part.get('class_path')}` {settings}"


def _accuracies(folder: Path, step: int) -> list[str]:
    """Return the last value of each accuracy within the first ``step`` steps, and its step."""
    last: dict[str, tuple[int, float]] = {}
    for name, logged, value in _scalars(folder):
        # Validation during training is logged with the index of the step before it, tests with the number of steps.
        number = logged + name.startswith("val/")
        if _ACCURACY.fullmatch(name) and last.get(name, (0,))[0] <= number <= step:
            last[name] = number, float(value)
    return [f"{name} {value:.4g} (step {number})" for name, (number, value) in last.items()]


def _scalars(folder: Path) -> Iterator[tuple[str, int, float | str]]:
    """Yield name, step and value of the scalars in the files of TensorBoard and of CSVLogger."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    for name in events.Tags()["scalars"]:
        yield from ((name, event.step, event.value) for event in events.Scalars(name))
    for path in folder.glob("metrics*.csv"):
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
            step = int(row.pop("step"))
            yield from ((name, step, value) for name, value in row.items() if value)


def _provenance(path: Path) -> dict[str, str]:
    """Return versions, commit and date of the run."""
    if not path.is_file():
        return {}
    saved = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in saved["versions"].items())
    return {"versions": versions, "commit": saved["commit"] or "", "date": saved["date"]}


def _spectrum(folder: Path, step: int) -> list[str]:
    """Return a table with the steps of each matrix and its final eigenvalues, from the measurements until ``step``."""
    try:
        record = SpectrumRecord.load(folder)
    except NotFoundError:
        return []
    record.keep(int((record.steps <= step).sum()))
    heading = [*COLUMNS[1:], "final eigenvalues"]
    lines = ["", f"| {' | '.join(heading)} |", f"|{'---|' * len(heading)}"]
    for _, matrix, *cells in table({"": record}):
        values = " ".join(f"{value:.3g}" for value in record.eigenvalues(matrix)[-1, :10].tolist())
        lines.append(f"| {' | '.join((matrix, *cells, values))} |")
    return [*lines, "", "Times are learning rate × steps; at most ten eigenvalues are listed."]
