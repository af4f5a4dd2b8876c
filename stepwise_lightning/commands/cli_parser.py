"""Parser of the training commands, which reports mistakes in one line."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from stepwise_lightning.commands import TRAINING
from stepwise_lightning.commands.callbacks import as_configurations, with_merged_callbacks
from stepwise_lightning.commands.configurations import names, with_files
from stepwise_lightning.commands.options import options_of_classes, short_help
from stepwise_lightning.commands.reporting import is_first_report
from stepwise_lightning.errors import UserError, condensed

EXAMPLES = {
    "model": "BarlowTwins, SimCLR, SpectralContrastive, VICReg",
    "encoder": "stepwise_lightning.encoders.Encoder, ….LinearEncoder, ….MLP, ….ResNet",
    "data": "TwoViewDataModule, FixedCropPairs",
}
# Smallest values that the Trainer accepts, but does not check.
_MINIMUM = {
    "accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "gradient_clip_val": 0, "log_every_n_steps": 0
}  # fmt: skip


class CLIParser(LightningArgumentParser):
    """Parser of a training command that reports a mistake in one line instead of pages of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with one line and status 2."""
        # the parser of a class is named after the Python file that runs
        program = self.prog if self.prog.startswith("stepwise") else "stepwise"
        text = f"{program}: error: {_with_suggestion(message)} (see --help)\n"
        self.exit(2, text if is_first_report(text) else None)

    def print_help(self, *arguments: Any, **options: Any) -> None:
        """Print the options that most runs need."""
        command = self.prog.split()[-1]
        if command in TRAINING:
            print(short_help(command), end="")
        else:
            super().print_help(*arguments, **options)


def parse(parser: LightningArgumentParser, arguments: list[str]) -> Namespace:
    """Parse the arguments of a training command, and check values that Lightning does not check.

    Raises:
        SystemExit: the parser does not accept an argument, or a value is out of range.

    """
    try:
        arguments = with_merged_callbacks(as_configurations(with_files(arguments)))
        if not arguments:
            raise UserError(f"give --config, a file or one of {', '.join(names())}")
        config = parser.parse_args(arguments)
        _check(config)
    except (ValueError, TypeError, KeyError, OSError) as error:
        parser.error(str(error), error)
    return config


def _check(config: Namespace) -> None:
    if config.trainer is None:
        raise UserError("trainer is empty: give it options, such as max_steps, or leave it out")
    for name, minimum in _MINIMUM.items():
        if config.trainer[name] is not None and config.trainer[name] < minimum:
            raise UserError(f"trainer.{name} must be at least {minimum}, got {config.trainer[name]}")
    if not 0 <= config.seed_everything < 2**32:
        raise UserError(f"seed_everything must be at least 0 and below 2**32, got {config.seed_everything}")
    if config.get("weights_only") is False:
        raise UserError("weights_only=false would let a checkpoint run code, and is not accepted: leave it out")


def _with_suggestion(message: str) -> str:
    """Condense a message of the parser, and suggest the option or class that was probably meant."""
    text = condensed(message)
    # The second wording is that of jsonargparse below 4.46.
    if re.search(r"arguments are required: model$|[Oo]ption 'model' is required", text):
        return f"no model: give --config, a file or one of {', '.join(names())}; or --model, {EXAMPLES['model']}"
    if option := re.search(r"[Oo]ption '([\w.]+)'|[Uu]nrecognized arguments: --([\w.]+)", text):
        return text + _suggestion(option[1] or option[2])
    keys = re.findall(r'key "(\w+)"', text)
    if keys and keys[-1] == "loss":
        return f"{text}; give the dotted path of a function loss(z1, z2), or class_path and init_args"
    name = re.search(r"Expected a dot import path string: (\S+)", text)
    if name and keys and keys[-1] in EXAMPLES:
        return f"unknown {keys[-1]} {name[1]!r}; choose from: {EXAMPLES[keys[-1]]}, or give the dotted path of a class"
    return text


def _suggestion(option: str) -> str:
    """Return the option of the Trainer, or of a class of this package, that is closest to an unknown one."""
    places = options_of_classes()
    known = {*places, "trainer", "model", "data", "seed_everything", "ckpt_path", "class_path", "init_args"}
    unknown = next((part for part in option.split(".") if part not in known), None)
    section, _, name = option.rpartition(".")
    if unknown is not None:
        name = _closest(unknown, known) or ""
        is_section = any(section in of_name for of_name in places.values())
        if not name or not is_section or section in places.get(name, [section]):
            return f"; did you mean {name!r}?" if name else ""
    valid = [f"--{place}.{name}" for place in places.get(name, ())]  # a valid name in the wrong section
    return f"; did you mean {' or '.join(valid)}?" if valid else ""


def _closest(unknown: str, known: set[str]) -> str | None:
    """Return the name with these last initials or this word, such as learning_rate for ``lr``, or the closest name."""
    initials = [name for name in known if "".join(word[:1] for word in name.split("_")).endswith(unknown)]
    words = [name for name in known if f"_{unknown}_" in f"_{name}_"]
    near = get_close_matches(unknown, known, n=1)
    return min(initials or words or near, key=lambda name: (len(name), name), default=None)
