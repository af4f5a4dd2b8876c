"""The command line: ``stepwise fit`` and ``stepwise forecast --config configs/barlow_twins_photos.yaml``."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden

import stepwise_lightning
from stepwise_lightning.callbacks.progress import LineProgress, Plan, outcome
from stepwise_lightning.callbacks.save_config import SaveRun
from stepwise_lightning.callbacks.spectrum_logger import SpectrumLogger
from stepwise_lightning.commands import TRAINING
from stepwise_lightning.commands.callbacks import as_configurations, merged
from stepwise_lightning.commands.configurations import named
from stepwise_lightning.commands.forecasting_trainer import ForecastingTrainer, as_little_as_a_forecast_needs
from stepwise_lightning.commands.options import options_of_classes, short_help
from stepwise_lightning.errors import UserError, condensed, one_line
from stepwise_lightning.runs import AtomicCheckpointIO, LastCheckpoint
from stepwise_lightning.runs.latest import continue_newest, newest_checkpoint
from stepwise_lightning.signals import INTERRUPTED

# All of them, now: classes that have been imported can be named without their module.
for _name in stepwise_lightning.__all__:
    getattr(stepwise_lightning, _name)
# The least that the Trainer can do with, and does not check.
_LEAST = {"accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "gradient_clip_val": 0, "log_every_n_steps": 0}
_ADVERTISEMENTS = re.compile(
    r"^💡 Tip: |^(TPU|HPU) available: |^GPU available: False|^Seed set to |^`Trainer.fit` stopped: "
)
_DEPRECATIONS = (
    # Lightning 2.6 with torch 2.15.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # On machines with many cores, also where images lie in memory.
    "The '(train|val|test)_dataloader' does not have many workers which may be a bottleneck",
)
_EXAMPLES = {
    "model": "BarlowTwins, SimCLR, VICReg",
    "encoder": "stepwise_lightning.encoders.Encoder, ….LinearEncoder, ….MLP, ….ResNet",
    "data": "TwoViewDataModule, FixedCropPairs",
}


class _Parser(LightningArgumentParser):
    """Reports a mistake in one line instead of pages of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        program = (getattr(ex, "subcommand_parser", None) or self).prog.replace(" [options]", "")
        # That of a class has the name of the file that runs.
        program = program if program.startswith("stepwise") else "stepwise"
        self.exit(2, f"{program}: error: {_told(message)} (see --help)\n")

    def print_help(self, *arguments: Any, **options: Any) -> None:
        """Print the help of a command: what most runs need."""
        command = self.prog.split()[-1]
        if command in TRAINING:
            print(short_help(command), end="")
        else:
            super().print_help(*arguments, **options)

    def merge_config(self, cfg_from: Namespace, cfg_to: Namespace) -> Namespace:
        """Merge, and keep the callbacks that a second configuration does not name."""
        config = super().merge_config(cfg_from, cfg_to)
        before, changes = (given.get("trainer.callbacks") for given in (cfg_to, cfg_from))
        if isinstance(before, list) and isinstance(changes, list):
            config["trainer.callbacks"] = merged(before, changes)
        return config


class _CLI(LightningCLI):
    """Lets every run survive what can be survived, finds the run to continue, and reads checkpoints as data.

    As data, always: tensors and plain values, which name nothing to be imported or run.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return ``forecast``, and those of Lightning's that these modules have: ``predict`` is `stepwise embed`."""
        lightning = LightningCLI.subcommands() | {"forecast": {"model", "datamodule"}}
        return {name: lightning[name] for name in TRAINING}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and refuse what Lightning would stumble over later."""
        self.config = parser.parse_args(as_configurations(named(sys.argv[1:])))
        config = self.config[self.config.subcommand]
        if config.trainer is None:
            raise UserError("trainer is empty: give it options, such as max_steps, or leave it out")
        for name, least in _LEAST.items():
            if config.trainer[name] is not None and config.trainer[name] < least:
                raise UserError(f"trainer.{name} must be at least {least}, got {config.trainer[name]}")
        if not 0 <= config.seed_everything < 2**32:
            raise UserError(f"seed_everything must be at least 0 and below 2**32, got {config.seed_everything}")
        if config.get("weights_only") is False:
            raise UserError("weights_only=false would let a checkpoint run code, and is not accepted: leave it out")

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the hyperparameters in a checkpoint replace the configuration's: silently, and with any
        # class that they name.
        pass

    def before_instantiate_classes(self) -> None:
        config = self.config.get(str(self.subcommand))
        if self.subcommand == "forecast":
            if config.ckpt_path == "last":
                config.ckpt_path = newest_checkpoint(config)
            as_little_as_a_forecast_needs(config)
        if self.subcommand == "fit" and config.ckpt_path == "last":
            step = continue_newest(config)
            if step is not None:
                self.save_config_kwargs = {"config_filename": f"config_step_{step}.yaml", "overwrite": True}
        if self.subcommand == "fit" and config.ckpt_path and Path(config.ckpt_path).is_file():
            _check_settings(_restored_settings(config.ckpt_path), _settings(config.model))

    def before_fit(self) -> None:
        """Refuse to train on nothing; a module may bring its own data."""
        if self.datamodule is None and not is_overridden("train_dataloader", self.model):
            raise UserError(f"data is missing: give --data, one of {_EXAMPLES['data']}, or the dotted path of a class")

    def after_fit(self) -> None:
        """Say where the run lies and what was found."""
        loggers = [c for c in self.trainer.callbacks if isinstance(c, SpectrumLogger)]  # type: ignore[attr-defined]
        lines = outcome(self.trainer, loggers)  # a broadcast: every rank must ask
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            print("\n" + "\n".join(lines))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        if self.subcommand == "forecast":
            return super().instantiate_trainer(**kwargs)
        given = self._get(self.config_init, "trainer")
        callbacks, plugins = (_as_list(given.get(name)) for name in ("callbacks", "plugins"))
        if self.subcommand != "fit":  # it is not another run, and leaves nothing that looks like one
            kwargs["logger"] = False
        wanted = given.get("enable_checkpointing") is not False
        if wanted and not any(isinstance(callback, LastCheckpoint) for callback in callbacks):
            callbacks.append(LastCheckpoint())
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        callbacks.append(Plan())
        if not sys.stdout.isatty() and given.get("enable_progress_bar") is not False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, TQDMProgressBar)]
            callbacks += [] if any(isinstance(callback, ProgressBar) for callback in callbacks) else [LineProgress()]
        if given.get("enable_model_summary") is None:  # the plan has what matters of it
            kwargs["enable_model_summary"] = False
        return super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # Left alone, Lightning trusts checkpoints from the internet, and torch all of them if the environment says so.
        safely = {} if subcommand == "forecast" else {"weights_only": True}  # forecast knows no other way
        return super()._prepare_subcommand_kwargs(subcommand) | safely


def _as_list(values: Any) -> list[Any]:
    return list(values) if isinstance(values, (list, tuple)) else [] if values is None else [values]


def main() -> None:
    """Run ``stepwise``; any class of this package or another can be named as model, data or callback.

    Modules in the working directory are found, as with ``python -m``.

    A mistake in the configuration, missing data, a checkpoint that does not fit, diverging training, a full disk or a
    lost process end it with one line on standard error and exit status 2 or 1 (:mod:`stepwise_lightning.errors`); a bug
    keeps its traceback. A run that has saved itself because of a signal ends with exit status 75; Ctrl-C outside of
    training with 130.
    """
    if not sys.flags.safe_path and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # where the command lies is, in its place
    _silence_libraries()
    try:
        _CLI(
            L.LightningModule,
            trainer_class=ForecastingTrainer,
            save_config_callback=SaveRun,
            parser_class=_Parser,
            parser_kwargs={"prog": "stepwise"},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
        )
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        text = one_line(error)
        if text is None:
            raise
        sys.exit(f"\nstepwise: error: {text}")  # a progress bar may have left its line open


def _silence_libraries() -> None:
    """Keep away what Lightning says of its makers' other products, of GPUs that are not there, and of its own age."""

    def is_of_interest(record: logging.LogRecord) -> bool:
        return not _ADVERTISEMENTS.search(record.getMessage())

    # the second speaks for the first where another library has imported the package of that name
    names = ("lightning.pytorch.utilities.rank_zero", "pytorch_lightning.utilities.rank_zero")
    for name in (*names, "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(is_of_interest)
    for message in _DEPRECATIONS:
        warnings.filterwarnings("ignore", message)


def _settings(model: Any) -> dict[str, Any]:
    arguments = getattr(model, "init_args", None)  # a class without any has none
    return {} if arguments is None else arguments.as_dict()


def _restored_settings(path: str) -> dict[str, Any]:
    checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    settings = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    return settings if isinstance(settings, dict) else {}


def _check_settings(trained: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse to resume with other settings: the optimiser's would come from the checkpoint all the same."""
    for name in sorted(trained.keys() & asked.keys()):
        if _plain(trained[name]) != _plain(asked[name]):
            raise UserError(
                f"the checkpoint was trained with {name}={trained[name]!r}, not {asked[name]!r}: resume it with its "
                "own configuration (config.yaml in the folder of its run), where only trainer and data may change"
            )


def _plain(value: Any) -> Any:
    """Return a setting with lists for its tuples, which YAML does not have."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _told(message: str) -> str:
    """Condense a parser's message, and say what was probably meant."""
    text = condensed(message)
    if option := re.search(r"[Oo]ption '([\w.]+)'|[Uu]nrecognized arguments: --([\w.]+)", text):
        return text + _suggestion(option[1] or option[2])
    keys = re.findall(r'key "(\w+)"', text)
    name = re.search(r"Expected a dot import path string: (\S+)", text)
    if name and keys and keys[-1] in _EXAMPLES:
        return f"unknown {keys[-1]} {name[1]!r}; choose from: {_EXAMPLES[keys[-1]]}, or give the dotted path of a class"
    return text


def _suggestion(option: str) -> str:
    """Say what an option was probably meant to be: one of the Trainer, or of a class of this package."""
    places = options_of_classes()
    known = {*places, "trainer", "model", "data", "seed_everything", "ckpt_path", "class_path", "init_args"}
    wrong = next((part for part in option.split(".") if part not in known), None)
    if wrong is None:  # a right name in a wrong place
        right = [f"--{place}.{option.rpartition('.')[2]}" for place in places.get(option.rpartition(".")[2], ())]
        return f"; did you mean {' or '.join(right)}?" if right else ""
    near = get_close_matches(wrong, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
