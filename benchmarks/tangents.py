"""Processor time of tangent kernels, as ratios measured in one run.

1. EmpiricalNTK relative to neural-tangents' structured derivatives, one thread, float64, equal values: a 2048-wide MLP
   with 100 inputs and 10 outputs (at least 1.5 times as fast), and three convolutions of 32 channels with 16 images of
   16×16 and 10 outputs (at least 5 times as fast).
2. ResNet-18 on 64 images of 32×32, float32: layer by layer relative to gradients per sample in the same memory, which
   networks with hooks get (at least 8 times as fast), and relative to all gradients in memory, with torch.func.

neural-tangents needs an old jax and numpy 1, in a separate environment (Python 3.11 or 3.12)::

    python3.11 -m venv .venv-tangents
    .venv-tangents/bin/pip install jax==0.4.20 jaxlib==0.4.20 'numpy<2' 'neural-tangents>=0.6.5,<0.7'
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from timing import alternate, argument_parser, check, machine, processor_seconds, ratio
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from stepwise_lightning import MLP, Encoder
from stepwise_lightning.theory import EmpiricalNTK


def normal_inputs(*shape: int) -> Tensor:
    """Return normal inputs from a fixed seed, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def convolutions() -> nn.Module:
    """Return three convolutions of 32 channels, average pooling, and a linear layer."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, 32, 32):
        layers += [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).double()


@contextmanager
def peer(python: Path, module: nn.Module, x: Tensor, directory: Path) -> Iterator[Callable[[], float]]:
    """Yield a function that computes the kernel once with neural-tangents and returns its processor time."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    values = [
        value.detach().numpy()
        for layer in layers
        for value in (layer.weight.T if isinstance(layer, nn.Linear) else layer.weight, layer.bias)
    ]
    np.savez(directory / "inputs.npz", x.numpy(), *values)
    command = [str(python), str(Path(__file__).with_name("tangents_peer.py")), str(directory / "inputs.npz")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin and process.stdout
        stdin, stdout = process.stdin, process.stdout

        def read_line() -> str:
            if not (line := stdout.readline()):
                raise SystemExit(f"error: {' '.join(command)} exited early: run it to see the error")
            return line

        def run_once() -> float:
            stdin.write("\n")
            stdin.flush()
            return float(read_line())

        read_line()
        yield run_once
        stdin.close()


def against_peer(name: str, module: nn.Module, x: Tensor, python: Path, rounds: int, limit: float) -> bool:
    """Check the time and values relative to neural-tangents."""
    kernel, results = EmpiricalNTK(module), []
    with TemporaryDirectory() as directory:
        with peer(python, module, x, Path(directory)) as theirs:
            ours = lambda: processor_seconds(lambda: results.append(kernel(x, x)))  # noqa: E731
            seconds = alternate({"ours": ours, "theirs": theirs}, rounds)
        expected = torch.from_numpy(np.load(Path(directory, "inputs.npy")))
    ratios = sorted(b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
    our_time, their_time = (statistics.median(seconds[name]) for name in ("ours", "theirs"))
    print(f"\n{name}: {our_time:.3f} s, neural-tangents {their_time:.3f} s; rounds {ratios[0]:.3g} to {ratios[-1]:.3g}")
    ok = check("neural-tangents / ours, processor time", ratio(seconds["theirs"], seconds["ours"]), limit, minimum=True)
    # neural-tangents also averages over outputs
    difference = (results[-1] - expected).abs().max() / expected.abs().max()
    return ok & check("largest difference / largest value", float(difference), 1e-10)


def all_gradients(module: nn.Module, x: Tensor) -> Tensor:
    """Return the kernel of a network with one output from all gradients in memory, 2.9 GB for ResNet-18."""
    parameters = dict(module.named_parameters())

    def output(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(module, values, (sample[None],))[0, 0]

    per_sample = vmap(grad(output), in_dims=(None, 0), chunk_size=8)({k: p.detach() for k, p in parameters.items()}, x)
    kernel = torch.zeros(len(x), len(x), dtype=torch.float64)
    for gradients in per_sample.values():
        kernel += gradients.flatten(1) @ gradients.flatten(1).T
    return kernel


def resnet() -> bool:
    """Check the speed-up of the layer-wise kernel of ResNet-18."""
    x = normal_inputs(64, 3, 32, 32).float()
    module, hooked = (Encoder(1, "resnet18").eval() for _ in range(2))
    for layer in hooked.modules():
        layer.register_forward_hook(lambda *_: None)
    results: dict[str, Tensor] = {}

    def timed(name: str, kernel: Callable[[], Tensor]) -> float:
        return processor_seconds(lambda: results.update({name: kernel()}))

    kernel, general = (EmpiricalNTK(network, dtype=torch.float32) for network in (module, hooked))
    kernel(x[:8], x[:8])
    ours = statistics.median(timed("ours", lambda: kernel(x, x)) for _ in range(3))
    all_at_once = timed("all gradients", lambda: all_gradients(module, x))
    per_sample = timed("per sample", lambda: general(x, x))
    print(f"\nResNet-18, 64 images of 32×32, 1 output, float32: {ours:.1f} s; per sample {per_sample:.0f} s")
    ok = check("per sample in the same memory / ours, processor time", per_sample / ours, 8, minimum=True)
    check("torch.func, all gradients in memory / ours, processor time", all_at_once / ours)
    for name in ("all gradients", "per sample"):
        difference = (results["ours"] - results[name]).norm() / results[name].norm()
        ok &= check(f"difference from {name}, relative", float(difference), 1e-5)
    return ok


def main() -> int:
    """Print the ratios; return 1 if one misses its limit."""
    parser = argument_parser(__doc__, rounds=7)
    parser.add_argument("--peer", type=Path, default=".venv-tangents/bin/python", help="Python with neural-tangents")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    ok = True
    if options.peer.exists():
        mlp, images = MLP(3072, [2048], 10).double(), normal_inputs(16, 3, 16, 16)
        ok &= against_peer("MLP", mlp, normal_inputs(100, 3072), options.peer, options.rounds, 1.5)
        ok &= against_peer("three convolutions", convolutions(), images, options.peer, options.rounds, 5)
    else:
        print(f"  not compared: no {options.peer} (see --help)")
    return 0 if resnet() & ok else 1


if __name__ == "__main__":
    sys.exit(main())
