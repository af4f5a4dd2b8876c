"""Help of the training commands: the options that most runs need, first those of the classes of this package."""

from __future__ import annotations

import re
import textwrap
from inspect import Parameter, getdoc, signature
from typing import Any

import lightning as L
import yaml

from stepwise_lightning.callbacks.online_evaluation import OnlineKNN, OnlineLinearProbe
from stepwise_lightning.callbacks.spectrum_logger import SpectrumLogger
from stepwise_lightning.commands import COMMANDS
from stepwise_lightning.data import FixedCropPairs, TwoViewDataModule
from stepwise_lightning.encoders import MLP, Encoder, LinearEncoder, Projector, ResNet
from stepwise_lightning.losses import barlow_twins_loss, simclr_loss, spectral_contrastive_loss, vicreg_loss
from stepwise_lightning.modules import BarlowTwins, JointEmbedding, SimCLR, SpectralContrastive, VICReg
from stepwise_lightning.modules.acceleration import AcceleratedBarlowTwins
from stepwise_lightning.runs import LastCheckpoint

_MODEL, _ENCODER, _DATA = "model", "model.encoder", "data"
_PLACES: list[tuple[str, str, type, tuple[Any, ...]]] = [  # heading, option, class, others that document its arguments
    ("Every model (loss, driven_matrix: JointEmbedding only)", _MODEL, JointEmbedding, ()),
    ("--model BarlowTwins", _MODEL, BarlowTwins, (barlow_twins_loss,)),
    ("--model AcceleratedBarlowTwins", _MODEL, AcceleratedBarlowTwins, ()),
    ("--model VICReg", _MODEL, VICReg, (vicreg_loss,)),
    ("--model SimCLR", _MODEL, SimCLR, (simclr_loss,)),
    ("--model SpectralContrastive", _MODEL, SpectralContrastive, (spectral_contrastive_loss,)),
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
# Lightning documents each in a paragraph.
_TRAINER = {
    "max_steps": "optimiser steps",
    "max_epochs": "epochs, if max_steps is not given",
    "accelerator": "cpu, gpu or auto",
    "devices": "number of devices",
    "strategy": "ddp for several devices",
    "precision": "32-true, 64-true, bf16-mixed, …",
    "log_every_n_steps": "interval between logged losses",
    "default_root_dir": "folder of runs without a logger",
}
_CKPT_PATH = "a checkpoint, or 'last': the latest run of this name, or a new run if there is none"
_SEED = "seed of weights, order of images and augmentations; seeds of components have priority (0)"
_MATMUL = "high for TF32 in float32 matrix products on GPUs; highest, high or medium"
_INDENT, _WIDTH = " " * 30, 110


def options_of_classes() -> dict[str, list[str]]:
    """Return for each argument name the options that have this argument, such as ``model.encoder``."""
    places: dict[str, list[str]] = {name: ["trainer"] for name in signature(L.Trainer).parameters}
    for _, option, cls, _ in _PLACES:
        for name in signature(cls).parameters:
            if option not in places.setdefault(name, []):
                places[name].append(option)
    return places


def short_help(command: str) -> str:
    """Return the help of a training command."""
    forecast = ""
    if command == "forecast":
        forecast = (
            f"{_line('pairs', 'number of pairs to measure features on; at least 8 times the number of features')}\n"
        )
        forecast += f"{_line('picture', 'file of the figure (forecast.png)')}\n"
        forecast += (
            f"{_line('loss', 'loss of a module of another package: a name, or the dotted path of a function')}\n"
        )
    description = COMMANDS[command][1]
    text = f"""usage: stepwise {command} --config CONFIG [--config CONFIG …] [options]

{description[0].upper()}{description[1:]}.

CONFIG is a file, or the name of a configuration of the package ('stepwise --help' lists them). A later --config
overrides values of earlier ones; callbacks are merged by class.

options:
  --config CONFIG
{_line("ckpt_path", _CKPT_PATH)}
{forecast}{_line("seed_everything", _SEED)}
{_line("float32_matmul_precision", _MATMUL)}
  --print_config              print the complete configuration, with every default, and exit
  --model, --data CLASS       a class of this package, or the dotted path of another
  --model.help, --data.help CLASS
                              all arguments of a class
  --trainer.callbacks+ CLASS  add a callback
"""
    for heading, option, cls, others in _PLACES:
        if command in ("fit", "forecast") or option in (_MODEL, _ENCODER, _DATA):
            text += f"\n{heading}:" + (_arguments(option, cls, (cls, *others)) or " no other arguments\n")
    text += "\nLightning's Trainer (every argument is an option):\n"
    return text + "".join(f"{_line(f'trainer.{name}', meaning)}\n" for name, meaning in _TRAINER.items())


def _arguments(option: str, cls: type, described_by: tuple[Any, ...]) -> str:
    texts: dict[str, str] = {}
    for source in reversed(described_by):
        texts |= _descriptions(getdoc(source) or "")
    lines, every = [], signature(JointEmbedding).parameters
    for name, parameter in signature(cls).parameters.items():
        of_every_model = cls is not JointEmbedding and issubclass(cls, JointEmbedding) and name in every
        unused = cls is BarlowTwins and name == "acceleration"  # kept for configurations of earlier versions
        if parameter.kind is Parameter.VAR_KEYWORD or name == "encoder" or of_every_model or unused:
            continue
        text = re.sub(r":\w+:`(?:.*\.)?(\w+)`", r"\1", texts.get(name, "")).replace("``", "")
        lines.append(_line(f"{option}.{name}", f"{text.removesuffix('.')} ({_shown(parameter)})"))
    return "".join(f"\n{line}" for line in lines) + "\n" * bool(lines)


def _shown(parameter: Parameter) -> str:
    """Return the default of a parameter in YAML."""
    if parameter.default is Parameter.empty:
        return "required"
    default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
    return yaml.safe_dump(default, default_flow_style=True).removesuffix("\n...\n").strip()


def _descriptions(docstring: str) -> dict[str, str]:
    """Return the descriptions in the section ``Args:`` of a docstring, by argument."""
    section = re.search(r"^Args:\n((?: .*\n|\n)+)", docstring + "\n", re.MULTILINE)
    entries = re.findall(r"^ {4}([\w, ]+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def _line(option: str, text: str) -> str:
    head = f"  --{option} "
    filled = textwrap.fill(text, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
    if len(head) < len(_INDENT):
        return head + filled[len(head) :]
    return f"{head.rstrip()}\n{filled}" if text.strip() else head.rstrip()
