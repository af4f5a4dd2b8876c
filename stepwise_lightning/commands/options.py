"""The help of ``stepwise fit``: the options that most runs need, those of this package's classes first."""

from __future__ import annotations

import re
import textwrap
from inspect import Parameter, getdoc, signature
from typing import Any

import lightning as L
import yaml

from stepwise_lightning.callbacks.online_evaluation import OnlineKNN, OnlineLinearProbe
from stepwise_lightning.callbacks.spectrum_logger import SpectrumLogger
from stepwise_lightning.commands import TRAINING
from stepwise_lightning.data import FixedCropPairs, TwoViewDataModule
from stepwise_lightning.encoders import MLP, Encoder, LinearEncoder, Projector, ResNet
from stepwise_lightning.losses import barlow_twins_loss, simclr_loss, vicreg_loss
from stepwise_lightning.modules import BarlowTwins, JointEmbedding, SimCLR, VICReg
from stepwise_lightning.runs import LastCheckpoint

__all__ = ["options_of_classes", "short_help"]

_MODEL, _ENCODER, _DATA = "model", "model.encoder", "data"
_PLACES: list[tuple[str, str, type, tuple[Any, ...]]] = [  # heading, option, class, who else describes its arguments
    ("Every model", _MODEL, JointEmbedding, ()),
    ("--model BarlowTwins", _MODEL, BarlowTwins, (barlow_twins_loss,)),
    ("--model VICReg", _MODEL, VICReg, (vicreg_loss,)),
    ("--model SimCLR", _MODEL, SimCLR, (simclr_loss,)),
    ("--model.encoder stepwise_lightning.Encoder", _ENCODER, Encoder, (ResNet, Projector)),
    ("--model.encoder stepwise_lightning.LinearEncoder", _ENCODER, LinearEncoder, ()),
    ("--model.encoder stepwise_lightning.MLP", _ENCODER, MLP, ()),
    ("--data TwoViewDataModule", _DATA, TwoViewDataModule, ()),
    ("--data FixedCropPairs", _DATA, FixedCropPairs, (TwoViewDataModule,)),
    ("SpectrumLogger", "spectrum", SpectrumLogger, ()),
    ("LastCheckpoint", "checkpoint", LastCheckpoint, ()),
    ("OnlineKNN", "knn", OnlineKNN, ()),
    ("OnlineLinearProbe", "probe", OnlineLinearProbe, ()),
]
# Lightning describes each in a paragraph.
_TRAINER = {
    "max_steps": "optimiser steps",
    "max_epochs": "epochs, where steps are not given",
    "accelerator": "cpu, gpu or auto",
    "devices": "how many of them",
    "strategy": "ddp for several",
    "precision": "32-true, 64-true, bf16-mixed, …",
    "log_every_n_steps": "how often the loss is written",
    "default_root_dir": "where runs without a logger lie",
}
_INDENT, _WIDTH = " " * 30, 110


def options_of_classes() -> dict[str, list[str]]:
    """Return, for the name of each argument, the options that can have it, such as ``model.encoder``."""
    places: dict[str, list[str]] = {name: ["trainer"] for name in signature(L.Trainer).parameters}
    for _, option, cls, _ in _PLACES:
        for name in signature(cls).parameters:
            if option not in places.setdefault(name, []):
                places[name].append(option)
    return places


def short_help(command: str) -> str:
    """Return the help of one of Lightning's commands, or of ``forecast``."""
    own = ""
    if command == "forecast":
        own = f"{_line('pairs', 'how many pairs of views to take features of; at least 8 times as many as features')}\n"
        own += f"{_line('picture', 'where to draw it (forecast.png)')}\n"
    text = f"""usage: stepwise {command} --config CONFIG [--config CONFIG …] [options]

{TRAINING[command].capitalize()}. CONFIG is a file, or the name of a configuration of the package
('stepwise --help' lists them). Of several the later ones change what they name; callbacks go by their class.

options:
  --config CONFIG
{_line("ckpt_path", "a checkpoint; for fit, 'last' goes on with the newest run of this name, or begins one")}
{own}{_line("seed_everything", "of whatever has no seed of its own")}
  --print_config              print the whole configuration, with every default, and end
  --model, --data CLASS       of this package, or the dotted path of another
  --model.help, --data.help CLASS
                              all arguments of a class
  --trainer.callbacks+ CLASS  one more callback
"""
    for heading, option, cls, others in _PLACES:
        if command in ("fit", "forecast") or option in (_MODEL, _ENCODER, _DATA):
            text += f"\n{heading}:\n" + _arguments(option, cls, (cls, *others))
    text += "\nTrainer, of Lightning's (every argument of it is an option):\n"
    return text + "".join(f"{_line(f'trainer.{name}', meaning)}\n" for name, meaning in _TRAINER.items())


def _arguments(option: str, cls: type, described_by: tuple[Any, ...]) -> str:
    texts: dict[str, str] = {}
    for source in reversed(described_by):
        texts |= _descriptions(getdoc(source) or "")
    lines, every = [], signature(JointEmbedding).parameters
    for name, parameter in signature(cls).parameters.items():
        of_every_model = cls is not JointEmbedding and issubclass(cls, JointEmbedding) and name in every
        if parameter.kind is Parameter.VAR_KEYWORD or name == "encoder" or of_every_model:
            continue
        text = re.sub(r":\w+:`(?:.*\.)?(\w+)`", r"\1", texts.get(name, "")).replace("``", "")
        lines.append(_line(f"{option}.{name}", f"{text.removesuffix('.')} ({_shown(parameter)})"))
    return "\n".join(lines) + "\n"


def _shown(parameter: Parameter) -> str:
    """Return the default as YAML has it."""
    if parameter.default is Parameter.empty:
        return "required"
    default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
    return yaml.safe_dump(default, default_flow_style=True).removesuffix("\n...\n").strip()


def _descriptions(docstring: str) -> dict[str, str]:
    """Return what the section ``Args:`` of a docstring says of each argument."""
    section = re.search(r"^Args:\n((?: .*\n|\n)+)", docstring + "\n", re.MULTILINE)
    entries = re.findall(r"^ {4}([\w, ]+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def _line(option: str, text: str) -> str:
    head = f"  --{option} "
    filled = textwrap.fill(text, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
    if len(head) < len(_INDENT):
        return head + filled[len(head) :]
    return f"{head.rstrip()}\n{filled}" if text.strip() else head.rstrip()
