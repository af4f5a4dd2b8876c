"""Model card of a run: method, data, spectrum, steps, accuracy and versions, from the files of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stepwise_lightning.commands.summary import COLUMNS, table
from stepwise_lightning.errors import NotFoundError
from stepwise_lightning.runs.saved import checkpoint_of, configuration_of, saved_checkpoint
from stepwise_lightning.spectrum.record import SpectrumRecord


def model_card(run: str | Path, code: list[str]) -> str:
    """Return a model card in Markdown; contents without a file in the folder of the run are left out.

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
    rows["steps"] = f"{saved_checkpoint(checkpoint).get('global_step')}, seed {configuration.get('seed_everything')}"
    rows["accuracy"] = ", ".join(f"{name} {value:.4g}" for name, value in _accuracies(folder).items())
    rows |= _provenance(folder / "provenance.json")
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    front = ["---", "library_name: stepwise_lightning", "tags: [self-supervised-learning]", "---"]
    title = f"# {'/'.join(folder.parts[-2:])}"
    parts = [*front, title, "", "| | |", "|---|---|", *lines, *_spectrum(folder), "", "```python", *code, "```", ""]
    return "\n".join(parts)


def _described(part: Any) -> str:
    """Return the class and the arguments of a part of a configuration."""
    if not isinstance(part, dict):
        return ""
    settings = json.dumps(part.get("init_args") or {}, default=str).replace("|", "\\|")
    return f"`{part.get('class_path')}` {settings}"


def _accuracies(folder: Path) -> dict[str, float]:
    """Return the last value of each metric of validation and test in TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(("val/", "test/"))]
    return {tag: events.Scalars(tag)[-1].value for tag in tags}


def _provenance(path: Path) -> dict[str, str]:
    """Return versions, commit and date of the run."""
    if not path.is_file():
        return {}
    saved = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in saved["versions"].items())
    return {"versions": versions, "commit": saved["commit"] or "", "date": saved["date"]}


def _spectrum(folder: Path) -> list[str]:
    """Return a table with the steps of each matrix and its final eigenvalues."""
    try:
        record = SpectrumRecord.load(folder)
    except NotFoundError:
        return []
    heading = [*COLUMNS[1:], "final eigenvalues"]
    lines = ["", f"| {' | '.join(heading)} |", f"|{'---|' * len(heading)}"]
    for _, matrix, *cells in table({"": record}):
        values = " ".join(f"{value:.3g}" for value in record.eigenvalues(matrix)[-1, :10].tolist())
        lines.append(f"| {' | '.join((matrix, *cells, values))} |")
    return [*lines, "", "Times are learning rate × steps; at most ten eigenvalues are listed."]
