"""Encoders: modules from a batch of images or vectors to embeddings (n, d).

Initial weights depend on the seed only: they are drawn on the CPU, and moved to torch's default device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import without_autocast
from stepwise_lightning.seeding import checked_seed, default_device, seeded_on_cpu


class LinearEncoder(nn.Module):
    """Linear model f(x) = W x on flattened inputs, without a bias.

    Args:
        in_features: m, the number of pixels times channels.
        out_features: d, the embedding dimension.
        init_std: standard deviation of normal weights; None for uniform weights on ±1/√m, as in ``torch.nn.Linear``.
        seed: seed of the initial weights; None for the global seed (``seed_everything``).

    Raises:
        ValueError: a dimension below 1, a negative or infinite standard deviation; in a call, inputs of another size.

    """

    bias: Tensor | None = None  # as in torch.nn.Linear(bias=False)

    def __init__(
        self, in_features: int, out_features: int, init_std: float | None = None, seed: int | None = None
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise UserError(f"a linear encoder needs in_features, out_features ≥ 1, got {in_features}, {out_features}")
        if init_std is not None and not 0 <= init_std < float("inf"):
            raise UserError(f"init_std must be finite and ≥ 0, got {init_std}")
        with seeded_on_cpu(seed):
            weight, bound = torch.empty(out_features, in_features), in_features**-0.5
            weight = weight.uniform_(-bound, bound) if init_std is None else weight.normal_(0, init_std)
        self.weight = nn.Parameter(weight.to(default_device()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings (n, d) of inputs (n, …) with m elements each."""
        _check_inputs(x, self.weight.shape[1])
        # For d ≪ m this product takes half as long on a CPU as x Wᵀ.
        return (self.weight @ x.flatten(1).T).T


class MLP(nn.Sequential):
    """Multilayer perceptron with ReLU on flattened inputs.

    Args:
        in_features: number of pixels times channels.
        hidden: widths of the hidden layers.
        out_features: d, the embedding dimension.
        bias: add biases to all layers.
        seed: seed of the initial weights; None for the global seed (``seed_everything``).

    Raises:
        ValueError: a width below 1; in a call, inputs of another size.

    """

    def __init__(
        self, in_features: int, hidden: Sequence[int], out_features: int, bias: bool = True, seed: int | None = None
    ) -> None:
        widths = [in_features, *hidden, out_features]
        if min(widths) < 1:
            raise UserError(f"in_features, hidden and out_features need a width of at least 1, got {widths}")
        layers: list[nn.Module] = [nn.Flatten()]
        with seeded_on_cpu(seed):
            for width_in, width_out in pairwise(widths):
                layers += [nn.Linear(width_in, width_out, bias=bias), nn.ReLU()]
        super().__init__(*layers[:-1])
        self.in_features = in_features
        self.to(default_device())

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings (n, out_features) of inputs (n, …) with in_features elements each."""
        _check_inputs(x, self.in_features)
        return super().forward(x)


class ResNet(nn.Module):
    """ResNet of torchvision without its classifier: images (n, 3, h, w) to pooled features (n, out_features).

    Args:
        name: ``resnet_small`` (for CPUs: four stages of one basic block, 8 to 64 channels, 77 352 parameters),
            ``resnet18``, ``resnet34`` or ``resnet50``; with 64, 512, 512 or 2048 features.
        small_images: use a 3×3 stem without stride or pooling, for images up to 64 pixels.
        seed: seed of the initial weights; None for the global seed (``seed_everything``).
        width: channels of the first stage of ``resnet_small``, doubled in each later stage; None for 8.

    Raises:
        ValueError: an unknown name; a width below 1, or of another network than ``resnet_small``.

    """

    NAMES = ("resnet_small", "resnet18", "resnet34", "resnet50")

    def __init__(
        self, name: str = "resnet_small", small_images: bool = True, seed: int | None = None, width: int | None = None
    ) -> None:
        from torchvision import models

        super().__init__()
        if name not in self.NAMES:
            raise UserError(f"unknown ResNet {name!r}; choose from: {', '.join(self.NAMES)}")
        if width is not None and (width < 1 or name != "resnet_small"):
            raise UserError(f"width must be at least 1, and None unless the network is resnet_small, got {width}")
        with seeded_on_cpu(seed):
            network: Any = _small_resnet(width or 8) if name == "resnet_small" else getattr(models, name)(weights=None)
            if small_images:
                channels = network.conv1.out_channels
                network.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
                nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
                network.maxpool = nn.Identity()
        self.out_features: int = network.fc.in_features
        self.name, self.small_images, self.width = name, small_images, width
        network.fc = nn.Identity()
        # Saves a quarter of a step of the small network on a CPU, a tenth of a step of ResNet-50.
        self.network = network.to(default_device(), memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features (n, out_features) of images (n, 3, h, w)."""
        return self.network(x)


def _small_resnet(width: int) -> nn.Module:
    from torchvision.models import resnet

    network: Any = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    # torchvision fixes the width of the first stage at 64: rebuild the stages.
    network.inplanes = width
    network.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    network.bn1 = nn.BatchNorm2d(width)
    for index in range(4):
        stage = network._make_layer(resnet.BasicBlock, width * 2**index, 1, stride=1 if index == 0 else 2)
        setattr(network, f"layer{index + 1}", stage)
    network.fc = nn.Linear(8 * width, 1)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return network


class Projector(nn.Sequential):
    """Linear layers with optional batch normalisation and ReLU between them.

    Under autocast the last layer computes in the dtype of its weights: half precision would round off small differences
    between embeddings that have a large bias, as SimCLR needs (:func:`scale_last_layer`).

    Args:
        in_features: width of the representation.
        out_features: d, the embedding dimension.
        depth: number of linear layers; 1 is a linear projector.
        hidden_features: width of the hidden layers.
        norm: ``batch`` or ``none``, before each ReLU.
        seed: seed of the initial weights; None for the global seed (``seed_everything``).

    Raises:
        ValueError: a width or depth below 1, or an unknown norm.

    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        depth: int = 1,
        hidden_features: int = 128,
        norm: Literal["batch", "none"] = "batch",
        seed: int | None = None,
    ) -> None:
        if min(sizes := (in_features, out_features, depth, hidden_features)) < 1:
            raise UserError(f"in_features, out_features, depth and hidden_features must be at least 1, got {sizes}")
        if norm not in ("batch", "none"):
            raise UserError(f"norm must be 'batch' or 'none', got {norm!r}")
        layers: list[nn.Module] = []
        with seeded_on_cpu(seed):
            widths = [in_features, *[hidden_features] * (depth - 1)]
            for width_in, width_out in pairwise(widths):
                layers += [nn.Linear(width_in, width_out), *[nn.BatchNorm1d(width_out)] * (norm == "batch"), nn.ReLU()]
            layers.append(nn.Linear(widths[-1], out_features))
        super().__init__(*layers)
        self.to(default_device())

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings (n, out_features) of features (n, in_features)."""
        *hidden, last = cast(Iterable[Any], self)
        for layer in hidden:
            x = layer(x)
        with without_autocast(x.device):
            return last(x.to(last.weight.dtype))


class Encoder(nn.Module):
    """ResNet and projector, with ordinary or small initialisation.

    Args:
        out_features: d, the embedding dimension.
        backbone: ``name`` of the :class:`ResNet`, whose other arguments are ``small_images`` and ``width``.
        projector_depth: ``depth`` of the :class:`Projector`, whose other arguments are ``hidden_features``, ``norm``.
        alpha: scale of the last layer, see :func:`scale_last_layer`; 1 is ordinary initialisation.
        bias_norm: norm of the initial bias of the last layer, in a random direction; None scales the bias by ``alpha``.
        seed: seed of the initial weights; None for the global seed (``seed_everything``).

    Attributes:
        backbone: its output is the hidden representation; ``SpectrumLogger(watch=["encoder.backbone"])`` measures it.

    """

    def __init__(
        self,
        out_features: int,
        backbone: str = "resnet_small",
        small_images: bool = True,
        projector_depth: int = 1,
        hidden_features: int = 128,
        norm: Literal["batch", "none"] = "batch",
        alpha: float = 1.0,
        bias_norm: float | None = None,
        seed: int | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__()
        seed = checked_seed(seed)
        self.backbone = ResNet(backbone, small_images, seed, width)
        # Other seeds, because equal seeds would draw equal rows for layers of equal shape.
        self.projector = Projector(
            self.backbone.out_features, out_features, projector_depth, hidden_features, norm, seed + 1_000_003
        )
        scale_last_layer(self.projector, alpha, bias_norm, seed + 2_000_003)

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings (n, out_features) of images (n, 3, h, w)."""
        return self.projector(self.backbone(x))


@torch.no_grad()
def scale_last_layer(
    module: nn.Module, alpha: float, bias_norm: float | None = None, seed: int | None = None
) -> nn.Module:
    """Multiply weights and bias of the last linear layer of ``module`` by ``alpha`` in place; return the module.

    Other layers keep their scale: with batch normalisation, scaling them would only multiply their effective learning
    rate by 1/α²; without it, training would become extremely slow, because the tangent kernel shrinks too.

    Args:
        module: a module with a linear layer.
        alpha: α > 0, the factor of the outputs.
        bias_norm: norm of the new bias, in a random direction. Cosine losses need a bias: without one their input
            has full rank at any scale, because they normalise the embeddings.
        seed: seed of the direction; None for the global seed (``seed_everything``).

    Example:
        >>> from torch import nn
        >>> from stepwise_lightning import scale_last_layer
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> before = network[2].weight.detach().clone()
        >>> bool((scale_last_layer(network, alpha=0.5)[2].weight == 0.5 * before).all())
        True

    Raises:
        ValueError: no linear layer, α not positive and finite, or ``bias_norm`` for a layer without a bias.

    """
    last = last_linear(module)
    if last is None:
        raise UserError(f"{type(module).__name__} has no linear layer to scale")
    if not 0 < alpha < float("inf"):
        raise UserError(f"alpha must be positive and finite, got {alpha}")
    bias = last.bias
    if bias_norm is not None and (bias is None or not 0 <= bias_norm < float("inf")):
        raise UserError(f"bias_norm={bias_norm} needs a last layer with a bias, and a finite norm of at least 0")
    last.weight.mul_(alpha)
    if bias is not None and bias_norm is not None:
        with seeded_on_cpu(seed):
            direction = torch.randn(bias.shape)
        bias.copy_(direction * bias_norm / direction.norm())
    elif bias is not None:
        bias.mul_(alpha)
    return module


def last_linear(module: nn.Module) -> nn.Linear | LinearEncoder | None:
    """Return the linear layer registered last in a module, or None."""
    return next((m for m in reversed(list(module.modules())) if isinstance(m, (nn.Linear, LinearEncoder))), None)


def _check_inputs(x: Tensor, in_features: int) -> None:
    if (count := x[0].numel()) != in_features:
        raise UserError(f"in_features is {in_features}, but each input has {count} values: set in_features={count}")
