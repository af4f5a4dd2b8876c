"""The command line: ``stepwise fit --config configs/barlow_twins_photos.yaml``."""

from __future__ import annotations

import json
import pickle
import re
import signal
import sys
import traceback
from difflib import get_close_matches
from inspect import isclass, signature
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

from stepwise_lightning import callbacks, checkpoints, data, encoders, modules
from stepwise_lightning.checkpoints import AtomicCheckpointIO, LastCheckpoint
from stepwise_lightning.files import full_disk, replace_text
from stepwise_lightning.modules import JointEmbedding
from stepwise_lightning.provenance import provenance
from stepwise_lightning.results import reason
from stepwise_lightning.resume import continue_newest

# What a parser says around the one sentence that matters to whoever mistyped something.
_NOISE = re.compile(
    r"^(?:- )*(Does not validate against|Errors:|Expected a <class 'NoneType'>|Expected a path but|"
    r"Subtypes:|Subclass types expect one of|a class path \(str\)|a dict with|Given value|"
    r"Problem with given class_path .*:$|$)"
)
# What this package raises to tell the user something; anything else is its mistake, and keeps its traceback.
_TOLD = (ValueError, ArithmeticError, OSError, RuntimeError)
# The least that the Trainer can do with, and does not check.
_LEAST = {"accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "gradient_clip_val": 0, "log_every_n_steps": 0}
_PEER_LOST = re.compile(
    r"Connection (closed|reset) by|Broken pipe|Timed out (waiting|after)|(Application|Socket|Read|Write) timeout|"
    r"Socket (unexpectedly )?closed|failed to (send|recv)|NCCL.*(timeout|remote process exited)",
    re.IGNORECASE,
)
_INTERRUPTED = 128 + signal.SIGINT  # as shells say it
_EXAMPLES = {
    "model": "BarlowTwins, SimCLR, VICReg",
    "encoder": "stepwise_lightning.encoders.Encoder, ….LinearEncoder, ….MLP, ….ResNet",
    "data": "TwoViewDataModule, FixedCropPairs",
}


class SaveRun(SaveConfigCallback):
    """Writes ``config.yaml`` (complete, as run) and ``provenance.json`` (versions, commit, machine) beside the logs.

    A run that is continued in its folder keeps them, and gets another pair, ``config_step_300.yaml`` and so on.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write both files on rank 0."""
        super().setup(trainer, pl_module, stage)
        directory = trainer.log_dir  # a broadcast: every rank must ask
        if trainer.is_global_zero and directory is not None:
            name = self.config_filename.replace("config", "provenance").replace(".yaml", ".json")
            replace_text(Path(directory, name), json.dumps(provenance(), indent=2) + "\n")


class _Parser(LightningArgumentParser):
    """Reports a mistake in one line instead of pages of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        self.exit(2, f"{parser.prog.replace(' [options]', '')}: error: {_one_line(message)} (see --help)\n")


class _CLI(LightningCLI):
    """Lets every run survive what can be survived, finds the run to continue, and reads checkpoints as data.

    As data, always: tensors and plain values, which name nothing to be imported or run.
    """

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and refuse what Lightning would stumble over later."""
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        if config.trainer is None:
            raise ValueError("trainer is empty: give it options, such as max_steps, or leave it out")
        for name, least in _LEAST.items():
            if config.trainer[name] is not None and config.trainer[name] < least:
                raise ValueError(f"trainer.{name} must be at least {least}, got {config.trainer[name]}")
        if not 0 <= config.seed_everything < 2**32:
            raise ValueError(f"seed_everything must be at least 0 and below 2**32, got {config.seed_everything}")
        if config.weights_only is False:
            raise ValueError("weights_only=false would let a checkpoint run code, and is not accepted: leave it out")

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the hyperparameters in a checkpoint replace the configuration's: silently, and with any
        # class that they name.
        pass

    def before_instantiate_classes(self) -> None:
        config = self.config.get(str(self.subcommand))
        if self.subcommand == "fit" and config.ckpt_path == "last":
            step = continue_newest(config)
            if step is not None:
                self.save_config_kwargs = {"config_filename": f"config_step_{step}.yaml", "overwrite": True}
        if self.subcommand == "fit" and config.ckpt_path and Path(config.ckpt_path).is_file():
            _check_settings(_restored_settings(config.ckpt_path), config.model.init_args.as_dict())

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        given = self._get(self.config_init, "trainer")
        callbacks, plugins = (_as_list(given.get(name)) for name in ("callbacks", "plugins"))
        wanted = given.get("enable_checkpointing") is not False
        if wanted and not any(isinstance(callback, LastCheckpoint) for callback in callbacks):
            callbacks.append(LastCheckpoint())
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        return super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # Left alone, Lightning trusts checkpoints from the internet, and torch all of them if the environment says so.
        return super()._prepare_subcommand_kwargs(subcommand) | {"weights_only": True}


def _as_list(values: Any) -> list[Any]:
    return list(values) if isinstance(values, (list, tuple)) else [] if values is None else [values]


def main() -> None:
    """Run ``stepwise``; any class of this package or another can be named as model, data or callback.

    A mistake in the configuration, missing data, a checkpoint that does not fit, diverging training, a full disk or a
    lost process end it with one line on standard error and exit status 2 or 1; errors inside other libraries keep their
    traceback. A run that has saved itself because of a signal ends with exit status 75; Ctrl-C outside of training with
    130.
    """
    try:
        _CLI(
            JointEmbedding,
            L.LightningDataModule,
            save_config_callback=SaveRun,
            parser_class=_Parser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
        )
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except Exception as error:
        text = _explained(error)
        if text is None:
            raise
        sys.exit(f"\nstepwise: error: {text}")  # a progress bar may have left its line open


def _restored_settings(path: str) -> dict[str, Any]:
    checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    settings = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    return settings if isinstance(settings, dict) else {}


def _check_settings(trained: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse to resume with other settings: the optimiser's would come from the checkpoint all the same."""
    for name in sorted(trained.keys() & asked.keys()):
        if trained[name] != asked[name]:
            raise ValueError(
                f"the checkpoint was trained with {name}={trained[name]!r}, not {asked[name]!r}: resume it with its "
                "own configuration (config.yaml in the folder of its run), where only trainer and data may change"
            )


def _explained(error: Exception) -> str | None:
    """Return one line for what was raised to tell the user something; None for what went wrong inside a library."""
    if full := full_disk(error):
        return _one_line(str(full))
    if _is_of_another_process(error):
        return (
            "another process of this run has ended or does not answer: look at what it wrote; --ckpt_path last "
            f"continues from the last checkpoint ({str(error).strip().splitlines()[0]})"
        )
    frames = traceback.extract_tb(error.__traceback__)
    raised_in, message = Path(frames[-1].filename), str(error)
    if re.match(r"Caught \w+ in DataLoader worker", message):  # torch raises it again, with the worker's traceback
        raised_in, message = Path(re.findall(r'File "(.+?)", line', message)[-1]), message.splitlines()[-1]
        message = message.partition(": ")[2]
    ours = raised_in.is_relative_to(Path(__file__).parent) and isinstance(error, _TOLD)
    if ours:
        return _one_line(message)
    restoring = any(re.match("_?(resume|restore)", frame.name) for frame in frames)
    libraries = Path(L.__file__).parents[1]  # where the user's own code, and its hooks, are not
    if restoring and raised_in.is_relative_to(libraries) and not isinstance(error, FileNotFoundError):
        return f"the checkpoint cannot be restored ({_reason(error)}): is it damaged, or of another model?"
    lightning = raised_in.parent.name == "jsonargparse" or raised_in.is_relative_to(libraries / "lightning")
    checked = (ValueError, TypeError, OSError, MisconfigurationException)
    return _one_line(message) if lightning and (isinstance(error, checked) or raised_in.name == "cli.py") else None


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL (\S+)", str(error))
        return "it holds more than tensors and plain values" + (f", namely {found[1]}" if found else "")
    return reason(error)


def _is_of_another_process(error: BaseException) -> bool:
    """Whether communication with another process broke down: the back-ends say it in many words."""
    return isinstance(error, RuntimeError) and _PEER_LOST.search(str(error)) is not None


def _one_line(message: str) -> str:
    """Condense a parser's message to what was given, and what was expected."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    text = ": ".join(line.rstrip(":") for line in lines if not _NOISE.match(line))
    text = re.sub(r"(?<=[^\"]): Not a valid subclass of \w+\.?", "", text)  # where the reason stands before it
    text = re.sub(r'(": Not a valid subclass of \w+)', r"\1 (class_path and, if any, init_args)", text, count=1)
    if found := re.search(r"[Oo]ption '([\w.]+)'", text):
        return text + _suggestion(found[1])
    keys = re.findall(r'key "(\w+)"', text)
    if (found := re.search(r"Expected a dot import path string: (\S+)", text)) and keys and keys[-1] in _EXAMPLES:
        return (
            f"unknown {keys[-1]} {found[1]!r}; choose from: {_EXAMPLES[keys[-1]]}, or give the dotted path of a class"
        )
    return text


def _suggestion(option: str) -> str:
    """Say what an option was probably meant to be: one of the Trainer, or of a class of this package."""
    classes: list[type] = [L.Trainer]
    for module in (modules, encoders, data, callbacks, checkpoints):
        classes += [thing for thing in vars(module).values() if isclass(thing) and thing.__module__ == module.__name__]
    known = {name for cls in classes for name in signature(cls).parameters}
    known |= {"trainer", "model", "data", "seed_everything", "ckpt_path", "class_path", "init_args"}
    wrong = next((part for part in option.split(".") if part not in known), option)
    near = get_close_matches(wrong, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
