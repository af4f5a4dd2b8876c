"""Which run ``--ckpt_path last`` goes on with: the newest of its name, where its logger really writes."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import instantiate_class
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from stepwise_lightning.errors import UserError, reason
from stepwise_lightning.runs.folders import CHECKPOINTS, VERSIONS, WITHOUT_LOGGER, free_name, saved_step
from stepwise_lightning.runs.loggers import folder_of

_TOKEN = "stepwise-version"  # stands for a version when a logger is asked where it would write
_TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"


def continue_newest(config: Any) -> int | None:
    """Point the configuration of ``stepwise fit --ckpt_path last`` to the newest run of its name.

    Where runs lie is asked of the first logger: one is made for it, and not used. With TensorBoard's and CSV's, and
    without a logger, the newest run is the one with the highest number that has begun to train; with others the one
    that was saved last. It goes on in its own folder from its newest checkpoint, and with W&B and MLflow as the same
    run there; where the version cannot be set, in a new folder, which one line says. Without a checkpoint yet, a
    new run is started.

    Args:
        config: of ``fit``; ``ckpt_path`` and the loggers' versions are changed.

    Returns:
        The step that it goes on from, None if it starts anew.

    Raises:
        ValueError: the logger cannot be asked where its runs lie, or a checkpoint cannot be read.

    """
    root, loggers, runs = _configured_runs(config)
    run, begun, place = _newest_place(runs)
    saved = None if place is None else _newest_checkpoint(place)
    if saved is None:
        rank_zero_info(f"no checkpoint in {runs} yet: starting anew")
        config.ckpt_path = None
        return None
    step, config.ckpt_path = saved[0], str(saved[1].absolute())  # ~ is no home in a path that exists
    in_place = begun and (not loggers or runs.argument is not None or runs.only)
    rank_zero_info(f"continuing {place} from step {step}{'' if in_place else ', in a new folder: it cannot be set'}")
    if loggers and in_place and run is not None:
        _set_versions(loggers, runs, run, root)
        if config.trainer.logger in (None, True):
            config.trainer.logger = loggers[0]
        if not config.trainer.fast_dev_run:
            _keep_metrics(loggers, root, step)
    return step


def newest_checkpoint(config: Any) -> str:
    """Return the path of the newest checkpoint of a configuration's newest run, which stays as it is.

    Raises:
        ValueError: there is none; or as :func:`continue_newest`.

    """
    runs = _configured_runs(config)[2]
    place = _newest_place(runs)[2]
    saved = None if place is None else _newest_checkpoint(place)
    if saved is None:
        raise UserError(f"no checkpoint in {runs} yet: train first, or leave --ckpt_path out")
    return str(saved[1].absolute())


@dataclass
class _Runs:
    """The folders of one logger's runs: ``parent/version/below``, or ``only`` one."""

    parent: Path
    below: Path = Path()
    argument: str | None = None  # of the logger's class, that sets the version
    numbered: bool = False
    only: bool = False  # the version is given, or there is none: parent is the folder of the run
    before: Path | None = None  # where version 0.1.0 has put the checkpoints of such runs, all into one folder

    def __str__(self) -> str:
        return str(self.parent / self.below / CHECKPOINTS if self.only else self.parent)

    def newest(self) -> Path | None:
        """Return the folder of the newest run that has begun to train: an evaluation leaves one without checkpoints."""
        if self.only:
            return self.parent
        begun = [path for path in self.parent.glob("[!.]*") if (path / self.below / CHECKPOINTS).is_dir()]
        if self.numbered:
            begun = [path for path in begun if _number(path) is not None]
        return max(begun, key=self._age, default=None)

    def _age(self, run: Path) -> float:
        number = _number(run)
        if self.numbered and number is not None:
            return number
        folder = run / self.below / CHECKPOINTS
        return max(path.stat().st_mtime_ns for path in (folder, *folder.glob("[!.]*.ckpt")))


def _configured_runs(config: Any) -> tuple[Path, list[Any], _Runs]:
    root = Path(config.trainer.default_root_dir or ".").expanduser()
    loggers = _loggers(config.trainer.logger, root)
    runs = _runs_of(loggers[0], root) if loggers else _Runs(root / WITHOUT_LOGGER, numbered=True, before=root)
    return root, loggers, runs


def _newest_place(runs: _Runs) -> tuple[Path | None, bool, Path | None]:
    """Return the newest run, whether it has begun, and the folder of its checkpoints."""
    run = runs.newest()
    begun = run is not None and (run / runs.below / CHECKPOINTS).is_dir()
    return run, begun, run / runs.below if run is not None and begun else runs.before


def _number(run: Path) -> int | None:
    number = run.name.removeprefix("version_")
    return int(number) if run.name.startswith("version_") and number.isdecimal() else None


def _loggers(configured: Any, root: Path) -> list[Any]:
    """Return the loggers of a configuration as a list; Lightning's default one is written out."""
    if configured in (None, True):
        return [Namespace(class_path=_TENSORBOARD, init_args=Namespace(save_dir=str(root), name="lightning_logs"))]
    if not configured:
        return []
    return list(configured) if isinstance(configured, (list, tuple)) else [configured]


def _arguments(logger: Any) -> dict[str, Any]:
    arguments = getattr(logger, "init_args", None)
    return {} if arguments is None else arguments.as_dict()


def _made(logger: Any, **changes: Any) -> Any:
    """Return a logger that is asked, and not used."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return instantiate_class((), {"class_path": logger.class_path, "init_args": _arguments(logger) | changes})
    except Exception as error:  # whatever a class makes of its arguments
        raise UserError(
            f"--ckpt_path last cannot ask {logger.class_path} where its runs lie ({reason(error)}): give the path of a "
            "checkpoint"
        ) from error


def _kind(logger: Any) -> set[str]:
    return {base.__name__ for base in type(logger).__mro__}  # lightning's and pytorch_lightning's share no class


def _runs_of(logger: Any, root: Path) -> _Runs:
    """Return where the runs of a configured logger lie."""
    made, arguments = _made(logger), _arguments(logger)
    if "MLFlowLogger" in _kind(made):
        return _runs_of_mlflow(made, arguments, root)
    settable = "version" in signature(type(made).__init__).parameters or "version" in arguments
    numbered = bool(_kind(made) & {"TensorBoardLogger", "CSVLogger"})
    before = None if numbered else Path(made.save_dir or root, CHECKPOINTS).parent
    given = arguments.get("version")
    if given is None and "WandbLogger" in _kind(made):
        given = arguments.get("id")
    if given is not None:
        return _Runs(folder_of(made, root), only=True, before=before)
    if settable:
        folder = folder_of(_made(logger, version=_TOKEN), root)
        return _around(folder, lambda part: part == _TOKEN, "version", numbered, before)
    version = made.version
    names = {str(version), f"version_{version}"}
    return _around(folder_of(made, root), names.__contains__, None, numbered, before)


def _around(folder: Path, is_version: Any, argument: str | None, numbered: bool, before: Path | None) -> _Runs:
    places = [index for index, part in enumerate(folder.parts) if is_version(part)]
    if not places:
        return _Runs(folder, only=True, before=before)
    parts = folder.parts
    return _Runs(Path(*parts[: places[-1]]), Path(*parts[places[-1] + 1 :]), argument, numbered, before=before)


def _runs_of_mlflow(logger: Any, arguments: dict[str, Any], root: Path) -> _Runs:
    """Return where MLflow's runs lie; their logger would begin one if it were asked for its name."""
    from mlflow.tracking import MlflowClient  # type: ignore[import-not-found,unused-ignore]

    save_dir = Path(logger.save_dir or root)
    experiment = None
    if not logger.save_dir or save_dir.is_dir():  # where there is nothing yet, the client would not look
        client = MlflowClient(f"file:{logger.save_dir}" if logger.save_dir else arguments["tracking_uri"])
        experiment = client.get_experiment_by_name(arguments.get("experiment_name") or "lightning_logs")
    parent = save_dir / (experiment.experiment_id if experiment else "no experiment")
    given = arguments.get("run_id")
    if given is not None:
        return _Runs(parent / given, only=True, before=save_dir)
    return _Runs(parent, argument="run_id", before=save_dir)


def _newest_checkpoint(run: Path) -> tuple[int, Path] | None:
    """Return step and path of the newest checkpoint of a run's folder, if it has one.

    That is the one of the highest step; where several runs were saved to one folder, the last one's last.
    """
    folder = run / CHECKPOINTS
    last = sorted(folder.glob("last*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    paths = last[-1:] if len(last) > 1 else list(folder.glob("[!.]*.ckpt"))
    return max(((saved_step(path), path) for path in paths), default=None)


def _set_versions(loggers: list[Any], runs: _Runs, run: Path, root: Path) -> None:
    """Let the first logger go on in the folder of ``run``, and the others where they were then."""
    if runs.argument is not None:
        number = _number(run)
        version: int | str = run.name
        if number is not None and runs.argument == "version":  # of a folder version_3, the version is 3 or version_3
            numbered = folder_of(_made(loggers[0], version=number), root)
            version = number if numbered == run / runs.below else version
        loggers[0].init_args[runs.argument] = version
    noted = run / runs.below / CHECKPOINTS / VERSIONS
    versions = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else []
    for logger, version in zip(loggers[1:], versions[1:], strict=False):
        arguments = getattr(logger, "init_args", Namespace())
        for name in ("version", "run_id"):
            if name in arguments and arguments[name] is None:
                arguments[name] = version


def _keep_metrics(loggers: list[Any], root: Path, step: int) -> None:
    """Move the ``metrics.csv`` of a CSVLogger aside, which it would delete when it goes on in its folder."""
    for logger in loggers:
        made = _made(logger)
        if "CSVLogger" in _kind(made) and getattr(rank_zero_only, "rank", 0) == 0:
            warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
            folder = folder_of(made, root)
            if (folder / "metrics.csv").is_file():
                name = free_name(f"metrics_to_step_{step}", lambda name: (folder / f"{name}.csv").exists())  # noqa: B023
                (folder / "metrics.csv").rename(folder / f"{name}.csv")
