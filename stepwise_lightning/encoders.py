"""Encoders: modules that take a batch of images and return embeddings (n, d).

Each takes a ``seed`` and draws its initial weights from a generator of its own: what else consumes random numbers,
another layer's bias or another projector, changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepwise_lightning.errors import UserError
from stepwise_lightning.seeding import checked_seed, isolated_rng

__all__ = ["Encoder", "LinearEncoder", "MLP", "Projector", "ResNet", "scale_last_layer"]


class LinearEncoder(nn.Module):
    """The linear model f(x) = W x on flattened inputs, without a bias.

    Args:
        in_features: m, the number of pixels times channels.
        out_features: d, the embedding dimension.
        init_std: standard deviation of the normal distribution that W is drawn from; None for the ordinary
            initialisation of ``torch.nn.Linear``, uniform on ±1/√m.
        seed: seed of that draw, so that it depends on nothing else.

    Raises:
        ValueError: a dimension below 1, or a standard deviation that is not finite and ≥ 0; when called, inputs of
            another size.

    """

    def __init__(self, in_features: int, out_features: int, init_std: float | None = None, seed: int = 0) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise UserError(f"a linear encoder needs in_features, out_features ≥ 1, got {in_features}, {out_features}")
        if init_std is not None and not 0 <= init_std < float("inf"):
            raise UserError(f"init_std must be finite and ≥ 0, got {init_std}")
        generator = torch.Generator().manual_seed(checked_seed(seed))
        weight = torch.empty(out_features, in_features)
        if init_std is None:
            bound = in_features**-0.5
            weight.uniform_(-bound, bound, generator=generator)
        else:
            weight.normal_(0, init_std, generator=generator)
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, …) inputs with m elements each to (n, d)."""
        _check_inputs(x, self.weight.shape[1])
        # For d ≪ m this order of the product runs about twice as fast on a CPU as x Wᵀ.
        return (self.weight @ x.flatten(1).T).T


class MLP(nn.Sequential):
    """A multilayer perceptron with ReLU on flattened inputs: in_features -> hidden widths -> out_features.

    Args:
        in_features: number of pixels times channels.
        hidden: widths of the hidden layers.
        out_features: d.
        bias: whether the layers have biases.
        seed: of the initial weights.

    Raises:
        ValueError: a width below 1; when called, inputs of another size.

    """

    def __init__(
        self, in_features: int, hidden: Sequence[int], out_features: int, bias: bool = True, seed: int = 0
    ) -> None:
        widths = [in_features, *hidden, out_features]
        if min(widths) < 1:
            raise UserError(
                f"every layer of an MLP needs a width of at least 1, got {widths} (in_features, hidden, out_features)"
            )
        layers: list[nn.Module] = [nn.Flatten()]
        with isolated_rng(checked_seed(seed)):
            for narrow, wide in pairwise(widths):
                layers += [nn.Linear(narrow, wide, bias=bias), nn.ReLU()]
        super().__init__(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, …) inputs with in_features elements each to (n, out_features)."""
        first = self[1]
        assert isinstance(first, nn.Linear)
        _check_inputs(x, first.in_features)
        return super().forward(x)


class ResNet(nn.Module):
    """A torchvision ResNet without its classifier: (n, 3, h, w) to the pooled representation (n, out_features).

    ``resnet_small`` is for CPUs: four stages of one basic block, 8 to 64 channels, 77 352 parameters.

    Args:
        name: ``resnet_small``, ``resnet18``, ``resnet34`` or ``resnet50``.
        small_images: a 3×3 stem without stride or pooling, for images up to about 64 pixels; else torchvision's.
        seed: of the initial weights.

    Attributes:
        out_features: 64, 512, 512 or 2048.
        name, small_images: as given.

    Raises:
        ValueError: an unknown name.

    """

    NAMES = ("resnet_small", "resnet18", "resnet34", "resnet50")

    def __init__(self, name: str = "resnet_small", small_images: bool = True, seed: int = 0) -> None:
        from torchvision import models

        super().__init__()
        if name not in self.NAMES:
            raise UserError(f"unknown ResNet {name!r}; choose from: {', '.join(self.NAMES)}")
        with isolated_rng(checked_seed(seed)):
            network: Any = _small_resnet() if name == "resnet_small" else getattr(models, name)(weights=None)
            if small_images:
                channels = network.conv1.out_channels
                network.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
                nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
                network.maxpool = nn.Identity()
        self.out_features: int = network.fc.in_features
        self.name, self.small_images = name, small_images
        network.fc = nn.Identity()
        # Its convolutions then work on channels-last images, whatever they are given: a step takes a quarter less on a
        # CPU for the small network, a tenth less for ResNet-50.
        self.network = network.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, 3, h, w) to (n, out_features)."""
        return self.network(x)


class Projector(nn.Sequential):
    """``depth`` linear layers with (batch normalisation and) ReLU between them; nothing after the last.

    Args:
        in_features: width of the representation.
        out_features: d.
        depth: number of linear layers; 1 is a linear projector.
        hidden_features: width between them.
        norm: ``batch`` or ``none``, before each ReLU.
        seed: of the initial weights.

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
        seed: int = 0,
    ) -> None:
        if min(in_features, out_features, depth, hidden_features) < 1:
            raise UserError(
                f"a projector needs widths and depth of at least 1, got in_features={in_features}, "
                f"out_features={out_features}, depth={depth}, hidden_features={hidden_features}"
            )
        if norm not in ("batch", "none"):
            raise UserError(f"norm must be 'batch' or 'none', got {norm!r}")
        layers: list[nn.Module] = []
        with isolated_rng(checked_seed(seed)):
            for index in range(depth - 1):
                layers.append(nn.Linear(in_features if index == 0 else hidden_features, hidden_features))
                layers += [nn.BatchNorm1d(hidden_features)] if norm == "batch" else []
                layers.append(nn.ReLU())
            layers.append(nn.Linear(in_features if depth == 1 else hidden_features, out_features))
        super().__init__(*layers)


class Encoder(nn.Module):
    """A ResNet and a projector, from ordinary or small initialisation.

    Args:
        out_features: d, the embedding dimension.
        backbone: see :class:`ResNet`, as ``small_images``.
        small_images: a stem for small images.
        projector_depth: see :class:`Projector`, as ``hidden_features`` and ``norm``.
        hidden_features: of the projector.
        norm: of the projector.
        alpha: scale of the last layer's initial weights, see :func:`scale_last_layer`; 1 is ordinary initialisation.
        bias_norm: norm of the last layer's initial bias, a random direction; None leaves it as torch draws it, scaled
            by ``alpha``.
        seed: of the initial weights.

    Attributes:
        backbone: its output is the hidden representation; ``SpectrumLogger(watch=["encoder.backbone"])`` watches it.
        projector: maps that to the embedding.

    Raises:
        ValueError: see :class:`ResNet`, :class:`Projector`, :func:`scale_last_layer`.

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
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = ResNet(backbone, small_images, seed)
        # Other seeds, or the first rows of equal shape would start alike.
        self.projector = Projector(
            self.backbone.out_features, out_features, projector_depth, hidden_features, norm, seed + 1_000_003
        )
        scale_last_layer(self.projector, alpha, bias_norm, seed + 2_000_003)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, 3, h, w) to embeddings (n, out_features)."""
        return self.projector(self.backbone(x))


@torch.no_grad()
def scale_last_layer(module: nn.Module, alpha: float, bias_norm: float | None = None, seed: int = 0) -> nn.Module:
    """Start small: multiply weights and bias of the last linear layer inside ``module`` by ``alpha``, and return it.

    Only the last layer: with batch normalisation, a scale of the other weights cancels in the forward pass and
    multiplies their effective learning rate by 1/α²; without it, scaling all layers shrinks the tangent kernel too, and
    nothing is learned in any reasonable time.

    Args:
        module: changed in place.
        alpha: α > 0; the outputs become α times what they were.
        bias_norm: if given, the bias becomes a vector of this norm in a random direction. Cosine losses need a
            direction to start from: without one they see embeddings of full rank however small these are.
        seed: of that direction.

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
    bias = bias_of(last)
    if bias_norm is not None and (bias is None or not 0 <= bias_norm < float("inf")):
        raise UserError(f"bias_norm={bias_norm} needs a last layer with a bias, and a finite norm of at least 0")
    last.weight.mul_(alpha)
    if bias is not None and bias_norm is not None:
        direction = torch.randn(bias.shape, generator=torch.Generator().manual_seed(checked_seed(seed)))
        bias.copy_(direction * bias_norm / direction.norm())
    elif bias is not None:
        bias.mul_(alpha)
    return module


def last_linear(module: nn.Module) -> nn.Linear | LinearEncoder | None:
    """Return the linear layer of a module that was registered last; None if there is none."""
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, LinearEncoder))]
    return layers[-1] if layers else None


def bias_of(layer: nn.Linear | LinearEncoder) -> Tensor | None:
    """Return the bias of a layer, None if it has none."""
    return getattr(layer, "bias", None)


def _check_inputs(x: Tensor, in_features: int) -> None:
    if (given := x[0].numel()) != in_features:
        raise UserError(f"in_features is {in_features}, but each input has {given} values: set in_features={given}")


def _small_resnet() -> nn.Module:
    from torchvision.models.resnet import BasicBlock
    from torchvision.models.resnet import ResNet as TorchvisionResNet

    network: Any = TorchvisionResNet(BasicBlock, [1, 1, 1, 1])
    # torchvision fixes the width of the first stage at 64: build the same stages from 8 channels.
    network.inplanes = 8
    network.conv1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
    network.bn1 = nn.BatchNorm2d(8)
    for index, width in enumerate((8, 16, 32, 64)):
        setattr(network, f"layer{index + 1}", network._make_layer(BasicBlock, width, 1, stride=1 if index == 0 else 2))
    network.fc = nn.Linear(64, 1)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return network
