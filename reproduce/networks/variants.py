"""What the three losses are to the figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stepwise_lightning import BarlowTwins, SimCLR, VICReg
from stepwise_lightning.losses import LOSSES, OFF_DIAGONAL_WEIGHT, Loss
from stepwise_lightning.modules import JointEmbedding


@dataclass(frozen=True)
class Method:
    """Module of a loss, and the criteria for its runs."""

    module: type[JointEmbedding]
    smoke_learning_rate: float
    least_steps: dict[str, int]
    """Least number of distinct steps for every seed, by profile; smoke has four dimensions."""
    control: str
    """Variant that must show fewer steps: without a term that decorrelates dimensions, or without a small start."""

    @property
    def loss(self) -> Loss:
        """Name, title and driven matrix."""
        return LOSSES[str(self.module.loss_name)]

    @property
    def title(self) -> str:
        """Name of the loss in figures."""
        return self.loss.title

    @property
    def matrix(self) -> str:
        """Matrix in whose eigenvalues steps are counted."""
        return self.loss.driven_matrix


# By the names of the losses, in configurations and run folders.
METHODS = {
    method.loss.name: method
    for method in (
        Method(BarlowTwins, 0.003, {"smoke": 3, "cpu": 5, "full": 5}, "no_off_diagonal"),
        Method(VICReg, 0.001, {"smoke": 2, "cpu": 4, "full": 4}, "no_covariance"),
        Method(SimCLR, 0.0005, {"smoke": 2, "cpu": 4, "full": 4}, "ordinary"),
    )
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
