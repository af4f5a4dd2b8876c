"""Training commands: ``stepwise fit``, ``validate``, ``test`` and ``forecast``, on Lightning's command line."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden

import stepwise_lightning
from stepwise_lightning.callbacks.forecast_logger import ForecastLogger
from stepwise_lightning.callbacks.progress import LineProgress, Plan, outcome, seeds_in_use
from stepwise_lightning.callbacks.save_config import SaveRun
from stepwise_lightning.callbacks.spectrum_logger import SpectrumLogger
from stepwise_lightning.commands import TRAINING
from stepwise_lightning.commands.callbacks import adapted
from stepwise_lightning.commands.cli_parser import EXAMPLES, CLIParser, parse
from stepwise_lightning.commands.forecasting_trainer import ForecastingTrainer, configure_for_forecast
from stepwise_lightning.commands.reporting import is_first_report
from stepwise_lightning.commands.threads import threads_of_run
from stepwise_lightning.data import TwoViewDataModule
from stepwise_lightning.data.seeded_datamodule import SeededDataModule
from stepwise_lightning.errors import INTERRUPTED, NotFoundError, UserError, condensed, one_line
from stepwise_lightning.runs import AtomicCheckpointIO, LastCheckpoint
from stepwise_lightning.runs.folders import create_logger_folders
from stepwise_lightning.runs.latest import newest_checkpoint, pointer_file, resume_latest
from stepwise_lightning.runs.saved import configuration_of, saved_checkpoint

# Import all classes now: classes that are imported can be named without their module.
for _name in stepwise_lightning.__all__:
    getattr(stepwise_lightning, _name)
_ADVERTISEMENTS = re.compile(
    r"^💡 Tip: |^(TPU|HPU) available: |^GPU available: False|^Seed set to |^`Trainer.fit` stopped: "
)
_DEPRECATIONS = (
    # Lightning 2.6 with torch 2.15.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # The name of this option of DDP in earlier versions of torch, which the configurations use.
    r"`broadcast_buffers` is deprecated",
    # FLOPs, which need an attribute of the module.
    "When using the `ThroughputMonitor`, you need to define a `flops_per_batch` attribute",
    # On machines with many cores, also for images in memory.
    "The '(train|val|test)_dataloader' does not have many workers which may be a bottleneck",
)


class _CLI(LightningCLI):
    """Parser and runner of one command.

    Runs are resumed, saved atomically and reported in plain lines. Checkpoints are always read as data: tensors and
    plain values, which name nothing to import or run. Only the parser of this command is built (``run=False``), and the
    configuration is serialised once.
    """

    def __init__(self, command: str, arguments: list[str]) -> None:
        self.command = command
        super().__init__(
            L.LightningModule,
            trainer_class=ForecastingTrainer,
            save_config_callback=SaveRun,
            parser_class=CLIParser,
            parser_kwargs={"prog": f"stepwise {command}", "allow_abbrev": True},  # jsonargparse 5 does not by default
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            args=arguments,
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of the Trainer's method, such as ``ckpt_path``, and the precision of float32 products."""
        parser.add_argument("--float32_matmul_precision", type=Literal["highest", "high", "medium"] | None)
        skip = self.subcommands().get(self.command, {"model", "datamodule"})
        self._method_arguments = parser.add_method_arguments(ForecastingTrainer, self.command, skip=set(skip))

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line."""
        self.config = parse(parser, list(args))  # type: ignore[arg-type]

    def _dump_config(self) -> None:
        if not hasattr(self, "config_dump"):
            self.config_text = self.parser.dump(self.config, skip_none=False, skip_validation=True)
            self.config_dump = yaml.safe_load(self.config_text)

    def before_instantiate_classes(self) -> None:
        """Set the precision of float32 products, and find and check the checkpoint to resume from."""
        config = self.config
        if config.float32_matmul_precision:
            torch.set_float32_matmul_precision(config.float32_matmul_precision)
        if self.command == "fit":
            self._pointer = pointer_file(config)
            step = resume_latest(config) if config.ckpt_path == "last" else None
            if step is not None:
                self.save_config_kwargs = {"config_filename": f"config_step_{step}.yaml", "overwrite": True}
        elif config.ckpt_path == "last":
            config.ckpt_path = newest_checkpoint(config)
        if config.ckpt_path and "://" not in config.ckpt_path and not config.ckpt_path.startswith("file:"):
            if not Path(config.ckpt_path).is_file():
                raise NotFoundError(f"checkpoint file not found: {config.ckpt_path}")
            if self.command == "fit":
                self._dump_config()
                _check_checkpoint(config.ckpt_path, self.config_dump)
        if self.command == "forecast":
            configure_for_forecast(config)

    def instantiate_trainer(self, **options: Any) -> L.Trainer:
        """Build the Trainer, with the callbacks and plugins of every run."""
        if self.command != "forecast":
            options |= self._trainer_options(self._get(self.config_init, "trainer"))
        if self.command == "fit":
            self._dump_config()
            self.save_config_kwargs |= {"text": self.config_text, "pointer": self._pointer}
        else:
            self.save_config_callback = None
        try:
            return super().instantiate_trainer(**options)
        except UserError:
            raise
        except (ValueError, TypeError, OSError) as error:  # Lightning's checks of the arguments
            raise UserError(condensed(str(error))) from error

    def _trainer_options(self, trainer: Any) -> dict[str, Any]:
        options: dict[str, Any] = {}
        callbacks, plugins = (_as_list(trainer.get(name)) for name in ("callbacks", "plugins"))
        if self.command != "fit":  # an evaluation writes nothing that looks like a run
            options["logger"] = False
        for option, kind in (("enable_checkpointing", Checkpoint), ("enable_progress_bar", ProgressBar)):
            if trainer.get(option) is False:  # Lightning would refuse the callbacks of the configuration
                callbacks = [callback for callback in callbacks if not isinstance(callback, kind)]
        saves = trainer.get("enable_checkpointing") is not False
        if saves and not any(isinstance(callback, LastCheckpoint) for callback in callbacks):
            callbacks.append(LastCheckpoint())
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        callbacks = adapted(callbacks, self.model)
        callbacks.append(Plan(seeds_in_use(self.config.as_dict())))
        if not sys.stdout.isatty() and trainer.get("enable_progress_bar") is not False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, TQDMProgressBar)]
            callbacks += [] if any(isinstance(callback, ProgressBar) for callback in callbacks) else [LineProgress()]
        if trainer.get("enable_model_summary") is None:  # Plan prints the number of parameters
            options["enable_model_summary"] = False
        return options | {"callbacks": callbacks, "plugins": plugins}

    def run(self) -> None:
        """Run the command."""
        arguments = {name: self.config_init[name] for name in self._method_arguments}
        if self.command != "forecast":
            # By default Lightning trusts checkpoints from the internet, and torch follows an environment variable.
            arguments["weights_only"] = True
        if self.datamodule is not None:
            arguments["datamodule"] = self.datamodule
        if self.command == "fit":
            self._check_fit()
        with threads_of_run(self.trainer, self.model) if self.command == "fit" else nullcontext():
            getattr(self.trainer, self.command)(self.model, **arguments)
        if self.command == "fit":
            self._report()

    def _check_fit(self) -> None:
        if self.datamodule is None and not is_overridden("train_dataloader", self.model):
            raise UserError(f"data is missing: give --data, one of {EXAMPLES['data']}, or the dotted path of a class")
        self._check_data()
        create_logger_folders(self.trainer)

    def _check_data(self) -> None:
        """Raise for settings that do not fit the data, before the run has a folder."""
        data, trainer = self.datamodule, self.trainer
        if not isinstance(data, SeededDataModule) or data.hparams["download"]:  # downloaded when training starts
            return
        data.check(trainer.num_nodes * trainer.num_devices)
        loggers = [each for each in trainer.callbacks if isinstance(each, SpectrumLogger)]  # type: ignore[attr-defined]
        if isinstance(data, TwoViewDataModule) and any(
            isinstance(each.probe, str) and each.probe == "auto" for each in loggers
        ):
            data.probe_pairs()

    def _report(self) -> None:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        thresholds = [c.threshold for c in callbacks if isinstance(c, ForecastLogger) and c.forecasts]
        loggers = [c for c in callbacks if isinstance(c, SpectrumLogger)]
        lines = outcome(self.trainer, loggers, *thresholds[:1])  # a broadcast
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            print("\n" + "\n".join(lines))


def _as_list(values: Any) -> list[Any]:
    return list(values) if isinstance(values, (list, tuple)) else [] if values is None else [values]


def main(arguments: list[str] | None = None) -> None:
    """Run a training command; any class can be the model, the data or a callback, by its dotted path.

    Modules in the working directory are found, as with ``python -m``.

    A mistake in the configuration, missing data, a checkpoint that does not fit, diverging training, a full disk or a
    lost process end the program with one line on standard error and exit status 2 or 1
    (:mod:`stepwise_lightning.errors`); a bug keeps its traceback. A run that a signal stopped after it was saved ends
    with exit status 75; Ctrl-C outside of training ends with 130.

    Args:
        arguments: the command and its options, by default those of the command line.

    """
    command, *options = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command not in TRAINING:
        print(f"stepwise: error: unknown command {command!r}; choose from: {', '.join(TRAINING)}", file=sys.stderr)
        sys.exit(2)
    if not sys.flags.safe_path and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # the folder of the console script is there instead
    _silence_libraries()
    try:
        _CLI(command, options).run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        text = one_line(error)
        if text is None:
            raise
        sys.exit(
            f"\nstepwise: error: {text}" if is_first_report(text) else 1
        )  # the cursor may be at the end of a progress bar


def _silence_libraries() -> None:
    """Filter messages of Lightning about other products and absent GPUs, and its deprecation warnings."""

    def is_of_interest(record: logging.LogRecord) -> bool:
        return not _ADVERTISEMENTS.search(record.getMessage())

    # if another library has imported pytorch_lightning, its logger prints these messages
    names = ("lightning.pytorch.utilities.rank_zero", "pytorch_lightning.utilities.rank_zero")
    for name in (*names, "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(is_of_interest)
    for message in _DEPRECATIONS:
        warnings.filterwarnings("ignore", message)


def _check_checkpoint(path: str, config: dict[str, Any]) -> None:
    """Refuse to resume with another seed or other settings of the model: those of the checkpoint would be used.

    Raises:
        ValueError: the checkpoint cannot be read, or has other settings.

    """
    checkpoint = saved_checkpoint(path)
    configured = config["model"].get("init_args", {})  # absent for a class without arguments
    seed = config["seed_everything"]
    trained = checkpoint.get("hyper_parameters")
    trained = trained if isinstance(trained, dict) else {}
    with suppress(UserError):  # no config.yaml: a run from Python
        trained = {"seed_everything": configuration_of(Path(path)).get("seed_everything", seed)} | trained
        configured = {"seed_everything": seed} | configured
    for name in sorted(trained.keys() & configured.keys()):
        if _plain(trained[name]) != _plain(configured[name]):
            raise UserError(
                f"the checkpoint was trained with {name}={trained[name]!r}, not {configured[name]!r}: resume with the "
                "configuration of the run (config.yaml in its folder), and change only trainer and data"
            )


def _plain(value: Any) -> Any:
    """Return a setting with tuples as lists, as in YAML."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
