"""The command line: ``stepwise fit --config configs/barlow_twins_photos.yaml``."""

from __future__ import annotations

import json
import re
import sys
import traceback
from difflib import get_close_matches
from inspect import isclass, signature
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from stepwise_lightning import callbacks, checkpoints, data, encoders, modules
from stepwise_lightning.checkpoints import AtomicCheckpointIO, LastCheckpoint
from stepwise_lightning.files import full_disk, replace_text
from stepwise_lightning.modules import JointEmbedding
from stepwise_lightning.provenance import provenance
from stepwise_lightning.resume import continue_newest

# What a parser says around the one sentence that matters to whoever mistyped something.
_NOISE = re.compile(
    r"^(?:- )*(Does not validate against|Subtypes:|Errors:|Expected a <class 'NoneType'>|Expected a path but|"
    r"Given value|Problem with given class_path .*:$|$)"
)
_PEER_LOST = re.compile(
    r"Connection (closed|reset) by|Broken pipe|Timed out (waiting|after)|Socket Timeout|failed to (send|recv)|"
    r"NCCL.*(timeout|remote process exited)"
)
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
    """Lets every run survive what can be survived, and finds the run to continue."""

    def before_instantiate_classes(self) -> None:
        config = self.config.get(str(self.subcommand))
        if self.subcommand == "fit" and config.ckpt_path == "last":
            step = continue_newest(config)
            if step is not None:
                self.save_config_kwargs = {"config_filename": f"config_step_{step}.yaml", "overwrite": True}

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        given = self._get(self.config_init, "trainer")
        callbacks, plugins = (_as_list(given.get(name)) for name in ("callbacks", "plugins"))
        wanted = given.get("enable_checkpointing") is not False
        if wanted and not any(isinstance(callback, LastCheckpoint) for callback in callbacks):
            callbacks.append(LastCheckpoint())
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        return super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)


def _as_list(values: Any) -> list[Any]:
    return list(values) if isinstance(values, (list, tuple)) else [] if values is None else [values]


def main() -> None:
    """Run ``stepwise``; any class of this package or another can be named as model, data or callback.

    A mistake in the configuration, missing data, diverging training, a full disk or a lost process end it with one line
    on standard error and exit status 2 or 1; errors inside other libraries keep their traceback. A run that has saved
    itself because of a signal ends with exit status 75.
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
    except (ValueError, ArithmeticError, OSError, RuntimeError, MisconfigurationException) as error:
        if full := full_disk(error):
            error = full
        elif _is_of_another_process(error):
            error = RuntimeError(
                "another process of this run has ended or does not answer: look at what it wrote; --ckpt_path last "
                f"continues from the last checkpoint ({str(error).strip().splitlines()[0]})"
            )
        elif not _is_ours(error):
            raise
        sys.exit(f"\nstepwise: error: {_one_line(str(error))}")  # a progress bar may have left its line open


def _is_ours(error: Exception) -> bool:
    """Whether the error was raised to tell the user something: by this package, or about the configuration."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    by_parser = raised_in.parent.name == "jsonargparse" or raised_in.name in ("cli.py", "torch_io.py")
    return by_parser or raised_in.is_relative_to(Path(__file__).parent) or isinstance(error, MisconfigurationException)


def _is_of_another_process(error: BaseException) -> bool:
    """Whether communication with another process broke down: the back-ends say it in many words."""
    return isinstance(error, RuntimeError) and _PEER_LOST.search(str(error)) is not None


def _one_line(message: str) -> str:
    """Condense a parser's message to what was given, and what was expected."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    text = ": ".join(line.rstrip(":") for line in lines if not _NOISE.match(line))
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
