"""What the three losses are to the figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stepwise_lightning import BarlowTwins, SimCLR, VICReg
from stepwise_lightning.losses import OFF_DIAGONAL_WEIGHT
from stepwise_lightning.modules import JointEmbedding


@dataclass(frozen=True)
class Method:
    """How a loss is called, and how its runs are judged."""

    title: str
    module: type[JointEmbedding]
    matrix: str
    """Whose eigenvalues its steps are counted in: what the loss itself sees."""
    smoke_learning_rate: float
    least_steps: dict[str, int]
    """Distinct steps that every seed must show, by profile; smoke has four dimensions."""
    control: str
    """The variant that must show fewer: with nothing that keeps dimensions apart, or without a small start."""


# By the name that configurations and runs carry.
METHODS = {
    # Drives the eigenvalues of C from 0 to 1.
    "barlow_twins": Method(
        "Barlow Twins", BarlowTwins, "cross_correlation", 0.003, {"smoke": 3, "cpu": 5, "full": 5}, "no_off_diagonal"
    ),
    # Knows no scale but that of its variance.
    "vicreg": Method("VICReg", VICReg, "covariance", 0.001, {"smoke": 2, "cpu": 4, "full": 4}, "no_covariance"),
    # Sees normalised embeddings alone, in whose covariance the arc of the first mode has two eigenvalues: not in this.
    "simclr": Method("SimCLR", SimCLR, "tangent_covariance", 0.0005, {"smoke": 2, "cpu": 4, "full": 4}, "ordinary"),
}
# Each is trained from both.
STARTS = ("small", "ordinary")
# What the variants are called.
VARIANT_TITLES = {
    "small": "small initialisation",
    "ordinary": "ordinary initialisation",
    "wrong_pairs": "wrong pairs",
    "noise_images": "images of noise",
    "no_off_diagonal": "no off-diagonal term",
    "no_covariance": "no covariance term",
    "published_loss": "the published loss",
    "alpha0.01": "start ten times as large",
    "alpha0.1": "start a hundred times as large",
    "standard_augmentation": "standard augmentation",
    "weight_decay": "weight decay 1e-4",
    "schedule": "warm-up and cosine",
}
# By what a run differs from its shipped configuration: files laid over that, and settings of the command line.
VARIANTS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "small": ([], {}),
    "ordinary": (["ordinary.yaml"], {}),
    "alpha0.01": ([], {"model.init_args.encoder.init_args.alpha": 0.01}),
    "alpha0.1": ([], {"model.init_args.encoder.init_args.alpha": 0.1}),
    "standard_augmentation": ([], {"data.init_args.augmentation": "standard"}),
    "weight_decay": ([], {"model.init_args.weight_decay": 1e-4}),
    "schedule": ([], {
        "model.init_args.warmup_steps": 100, "model.init_args.cosine": "true", "trainer.max_steps": 800,
    }),
    "wrong_pairs": ([], {"data.class_path": "reproduce.control_data.WrongPairs"}),
    "noise_images": ([], {"data.class_path": "reproduce.control_data.NoiseImages"}),
    "no_off_diagonal": ([], {"model.init_args.off_diagonal_weight": 0.0}),
    "no_covariance": ([], {"model.init_args.covariance_weight": 0.0}),
    # As published, but for ε: from a small start the gradient would grow with its inverse root.
    "published_loss": ([], {
        "model.init_args.normalize": "true", "model.init_args.off_diagonal_weight": OFF_DIAGONAL_WEIGHT,
        "model.init_args.eps": 0.01,
    }),
}  # fmt: skip
# On CPUs, what is shorter than the 1200 steps of its configuration. From ordinary initialisation all modes have risen
# by then, and the staircase of every seed so far has three steps: one of CIFAR-10 not before step 395. After 400 or 600
# steps every claim of seeds 3 to 5 (both data sets) and 31 to 33 (photographs) is as after these.
CPU_STEPS = dict.fromkeys(
    ("ordinary", "wrong_pairs", "noise_images", "no_off_diagonal", "no_covariance", "published_loss"), 450
)
