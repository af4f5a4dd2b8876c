"""Layer-wise tangent kernels of convolutions and normalisations equal explicit Jacobians."""

import re

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from example_networks import IMAGES, SEQUENCES, VECTORS, custom, explicit_kernel, jacobian, linear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepwise_lightning.theory import EmpiricalNTK

torch.manual_seed(2)
ROWS, VOLUMES = torch.randn(4, 4, 9, dtype=torch.float64), torch.randn(3, 4, 5, 4, 5, dtype=torch.float64)
LARGE = torch.randn(4, 4, 9, 8, dtype=torch.float64)


def convolution(layer: type[nn.Module], x: Tensor, *sizes, **options) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(layer(x.shape[1], *sizes, **options), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    module(x)
    return module, x


def min_bytes(module: nn.Module, x: Tensor) -> int:
    with pytest.raises(ValueError, match="at least [0-9]+$") as error:
        EmpiricalNTK(module, max_bytes=1)(x, x)
    return int(re.findall("[0-9]+", str(error.value))[-1])


CONVOLUTIONS = {
    "plain": (nn.Conv2d, LARGE, 6, 3),
    "one position": (nn.Conv2d, LARGE, 6, (9, 8)),
    "few positions": (nn.Conv2d, LARGE, 30, (7, 7)),
    "stride": (nn.Conv2d, LARGE, 6, 3, 2, 1),
    "dilation, stride": (nn.Conv2d, LARGE, 6, 3, 2, 3, 2),
    "groups": (nn.Conv2d, LARGE, 6, 3, 1, 1, 1, 2),
    "depthwise, stride": (nn.Conv2d, LARGE, 4, 3, 2, 1, 1, 4),
    "groups, few positions": (nn.Conv2d, LARGE, 30, 7, 2, 0, 1, 2),
    "anisotropic": (nn.Conv2d, LARGE, 6, (2, 3), (2, 1), (0, 2), (1, 2)),
    "one dimension": (nn.Conv1d, ROWS, 6, 3, 2, 1),
    "three dimensions": (nn.Conv3d, VOLUMES, 6, 3, 2, 1, 1, 2),
    "three dimensions, few positions": (nn.Conv3d, VOLUMES, 40, (4, 4, 5)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_equal_explicit_jacobian_for_any_max_bytes(name):
    """Ample and minimum memory; all and some parameters."""
    layer, x, *sizes = CONVOLUTIONS[name]
    module, x = convolution(layer, x, *sizes)
    expected, minimum = explicit_kernel(module, x, x), min_bytes(module, x)
    for max_bytes in (2**30, 3 * minimum, minimum):
        kernel = EmpiricalNTK(module, max_bytes=max_bytes)
        torch.testing.assert_close(kernel(x, x), expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(kernel(x[:3], x[2:]), expected[:3, 2:], rtol=1e-10, atol=1e-12)
    for some in ("0.weight", "0.bias"):
        expected = explicit_kernel(module, x, x, [some])
        torch.testing.assert_close(EmpiricalNTK(module, some)(x, x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, "same", (1, 0)])
def test_padding_modes_equal_explicit_jacobian(mode, padding):
    module, x = convolution(nn.Conv2d, LARGE, 3, (4, 3), padding=padding, padding_mode=mode, dilation=(1, 2))
    torch.testing.assert_close(EmpiricalNTK(module)(x, x), explicit_kernel(module, x, x), rtol=1e-10, atol=1e-12)


def conv(*sizes, **options) -> nn.Conv2d:
    torch.manual_seed(sum(sizes))
    return nn.Conv2d(*sizes, **options)


def with_norm(layer: nn.Module, *before: nn.Module) -> nn.Module:
    """Return a network with a normalisation layer of random weights, bias and running statistics."""
    torch.manual_seed(0)
    for values in (*layer.parameters(), *layer.buffers()):
        if values.is_floating_point():
            values.data.uniform_(0.5, 1.5)
    return nn.Sequential(*before, layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)).eval()


def twice(self, x):
    return self.a(self.a(x).tanh()).flatten(1)


def change_in_place(self, x):
    h = self.a(x)
    return self.b(h) + h.relu_()


NETWORKS = {
    "called twice": (lambda: custom(twice, a=conv(3, 3, 3)), IMAGES),
    "weights shared": (
        lambda: custom(lambda s, x: (s.a(x) + F.conv2d(x.tanh(), s.a.weight)).flatten(1), a=conv(3, 2, 3)),
        IMAGES,
    ),
    "weights shared, transposed": (
        lambda: custom(lambda s, x: F.conv_transpose2d(s.a(x).tanh(), s.a.weight).flatten(1), a=conv(3, 2, 3)),
        IMAGES,
    ),
    "functional only": (lambda: custom(lambda s, x: F.conv2d(x, s.a.weight).flatten(1), a=conv(3, 2, 3)), IMAGES),
    "transposed": (lambda: nn.Sequential(conv(3, 2, 3), nn.ConvTranspose2d(2, 3, 2), nn.Flatten()), IMAGES),
    "in a list, one of two": (
        lambda: custom(lambda s, x: s.many[1](x).flatten(1), many=nn.ModuleList([conv(3, 2, 3), conv(3, 4, 3)])),
        IMAGES,
    ),
    "checkpointed": (
        lambda: custom(
            lambda s, x: checkpoint(s.a, x, use_reentrant=False).flatten(1),
            a=nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4).eval(), nn.ReLU(inplace=True), conv(4, 2, 3)),
        ),
        IMAGES,
    ),
    "with a hook": (
        lambda: (lambda m: (m[0].register_forward_hook(lambda _m, _x, y: 2 * y), m)[1])(
            nn.Sequential(conv(3, 2, 3), nn.Tanh(), nn.Flatten())
        ),
        IMAGES,
    ),
    "channels last": (
        lambda: nn.Sequential(conv(3, 4, 3), nn.ReLU(), conv(4, 4, 3), nn.Flatten()).to(
            memory_format=torch.channels_last
        ),
        IMAGES.to(memory_format=torch.channels_last),
    ),
    "in-place activation": (
        lambda: nn.Sequential(conv(3, 4, 3), nn.ReLU(inplace=True), conv(4, 4, 3), nn.Flatten()),
        IMAGES,
    ),
    "residual": (
        lambda: custom(lambda s, x: (s.a(x) + x).relu().flatten(1), a=conv(3, 3, 3, padding=1)),
        IMAGES,
    ),
    "pixels as samples": (
        lambda: custom(lambda s, x: s.a(x.flatten(0, 1)[:, None]).unflatten(0, (-1, 3)).flatten(1), a=conv(1, 2, 3)),
        IMAGES,
    ),
    "reordered samples": (lambda: custom(lambda s, x: s.a(x.flip(0)).flip(0).flatten(1), a=conv(3, 2, 3)), IMAGES),
    "unbatched calls": (
        lambda: custom(lambda s, x: torch.stack([s.a(v) for v in x]).flatten(1), a=conv(3, 2, 3)),
        IMAGES,
    ),
    "detached output": (
        lambda: custom(lambda s, x: (s.a(x).detach() + s.b(x)).flatten(1), a=conv(3, 2, 3), b=conv(3, 2, 3)),
        IMAGES,
    ),
    "half precision": (lambda: nn.Sequential(conv(3, 2, 3), nn.Flatten()).half(), IMAGES),
    "batch norm of vectors": (lambda: with_norm(nn.BatchNorm1d(6)), VECTORS),
    "batch norm of images": (lambda: with_norm(nn.BatchNorm2d(4), conv(3, 4, 3)), IMAGES),
    "batch norm of rows": (lambda: with_norm(nn.BatchNorm1d(4)), ROWS),
    "batch norm of volumes": (lambda: with_norm(nn.BatchNorm3d(4)), VOLUMES),
    "batch norm without weights": (lambda: with_norm(nn.BatchNorm2d(4, affine=False), conv(3, 4, 3)), IMAGES),
    "batch norm twice": (
        lambda: custom(lambda s, x: s.a(s.a(x).tanh()).flatten(1), a=with_norm(nn.BatchNorm2d(3), conv(3, 3, 1))[1]),
        IMAGES,
    ),
    "group norm": (lambda: with_norm(nn.GroupNorm(2, 4), conv(3, 4, 3)), IMAGES),
    "layer norm of vectors": (lambda: with_norm(nn.LayerNorm(6), linear()), VECTORS),
    "layer norm of tokens": (lambda: with_norm(nn.LayerNorm(6), linear()), SEQUENCES),
    "layer norm of images": (lambda: with_norm(nn.LayerNorm([4, 4]), conv(3, 4, 3)), IMAGES),
    "layer norm without bias": (lambda: with_norm(nn.LayerNorm(6, bias=False)), SEQUENCES),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", NETWORKS)
def test_kernel_equals_explicit_jacobian(name):
    make, x = NETWORKS[name]
    module = make()
    with torch.no_grad():
        module(x.to(next(module.parameters()).dtype))  # lazy layers
    expected = explicit_kernel(module, x, x)
    kernel = EmpiricalNTK(module)
    torch.testing.assert_close(kernel(x, x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(kernel(x[:3], x[2:]), expected[:3, 2:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [3, 6])
def test_x_and_y_may_have_different_image_sizes(size):
    module = nn.Sequential(conv(4, 3, 3), nn.Tanh(), conv(3, 30, size - 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x, y = LARGE[:3, :, :size, :size], LARGE[1:, :, 1:]
    left, right = (jacobian(module, z) for z in (x, y))
    expected = torch.einsum("kop,lop->kl", left, right) / left.shape[1]
    torch.testing.assert_close(EmpiricalNTK(module)(x, y), expected, rtol=1e-10, atol=1e-12)


def test_layer_output_changed_in_place_raises():
    module = custom(change_in_place, a=linear(), b=linear(6, 6, bias=False))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        EmpiricalNTK(module)(VECTORS, VECTORS)


def test_layerwise_route_needs_less_memory_than_per_sample_gradients():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(64, 1)
    )
    x = torch.randn(5, 64, 1, 1)
    minimum = min_bytes(module.eval(), x)
    kernel = EmpiricalNTK(module, max_bytes=minimum)(x, x)
    module[0].register_forward_hook(lambda *_: None)
    assert min_bytes(module, x) > 50 * minimum
    torch.testing.assert_close(EmpiricalNTK(module)(x, x), kernel, rtol=1e-10, atol=0)


def test_float32_sums_over_millions_of_weights_keep_six_digits():
    torch.manual_seed(0)
    slopes = torch.rand(2**22)
    module = custom(
        lambda s, x: x * (s.weights * s.slopes).sum(), weights=nn.Parameter(torch.zeros(2**22)), slopes=slopes
    )
    x = torch.tensor([[0.3], [0.7]])
    kernel = EmpiricalNTK(module, dtype=torch.float32)(x, x)
    torch.testing.assert_close(kernel, slopes.double().square().sum() * (x @ x.T).double(), rtol=1e-6, atol=0)
