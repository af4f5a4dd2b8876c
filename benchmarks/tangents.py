"""What tangent kernels cost, as ratios of processor time measured in one run.

1. EmpiricalNTK against neural-tangents' structured derivatives, in turn, one thread and float64 each: a 2048-wide MLP,
   100 inputs and 10 outputs (at least 1.5 times as fast), and three convolutions of 32 channels, 16 images of 16×16 and
   10 outputs (at least 5 times); with the same values.
2. ResNet-18 on 64 images of 32×32, float32: layer by layer against gradients per sample in the same memory (at least 8
   times as fast), which networks get whose layers have hooks; and against all gradients by torch.func, held together.

neural-tangents needs an old jax, and that numpy 1, so that it gets an environment of its own (Python 3.11 or 3.12)::

    python3.11 -m venv .venv-tangents
    .venv-tangents/bin/pip install jax==0.4.20 jaxlib==0.4.20 'numpy<2' 'neural-tangents>=0.6.5,<0.7'
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from timing import alternate, ratio, within
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from stepwise_lightning import MLP, Encoder
from stepwise_lightning.theory import EmpiricalNTK


def drawn(*shape: int) -> Tensor:
    """Return normal inputs, always the same, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def convolutions() -> nn.Module:
    """Return three convolutions of 32 channels, an average, and a linear layer."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, 32, 32):
        layers += [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).double()


def processor_seconds(call: Callable[[], Any]) -> float:
    """Return the processor time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


@contextmanager
def peer(python: Path, module: nn.Module, x: Tensor, directory: Path) -> Iterator[Callable[[], float]]:
    """Give a function that lets neural-tangents compute the kernel once, and returns its processor time."""
    layers = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    values = [
        value.detach().numpy()
        for part in layers
        for value in (part.weight.T if isinstance(part, nn.Linear) else part.weight, part.bias)
    ]
    np.savez(directory / "given.npz", x.numpy(), *values)
    command = [str(python), str(Path(__file__).with_name("tangents_peer.py")), str(directory / "given.npz")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin and process.stdout
        stdin, stdout = process.stdin, process.stdout

        def answer() -> str:
            if not (line := stdout.readline()):
                raise SystemExit(f"error: {' '.join(command)} ended: run it to see why")
            return line

        def once() -> float:
            stdin.write("\n")
            stdin.flush()
            return float(answer())

        answer()
        yield once
        stdin.close()


def against_peer(name: str, module: nn.Module, x: Tensor, python: Path, rounds: int, limit: float) -> bool:
    """Print the ratio to neural-tangents, and how far the values are from each other."""
    kernel, results = EmpiricalNTK(module), []
    with TemporaryDirectory() as directory:
        with peer(python, module, x, Path(directory)) as theirs:
            ours = lambda: processor_seconds(lambda: results.append(kernel(x, x)))  # noqa: E731
            seconds = alternate({"ours": ours, "theirs": theirs}, rounds)
        expected = torch.from_numpy(np.load(Path(directory, "given.npy")))
    ratios = sorted(b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
    our_time, their_time = (statistics.median(seconds[who]) for who in ("ours", "theirs"))
    print(f"\n{name}: {our_time:.3f} s, neural-tangents {their_time:.3f} s; rounds {ratios[0]:.3g} to {ratios[-1]:.3g}")
    ok = within("neural-tangents / ours, processor time", ratio(seconds["theirs"], seconds["ours"]), limit, least=True)
    # theirs is averaged over outputs too
    difference = (results[-1] - expected).abs().max() / expected.abs().max()
    return ok & within("largest difference / largest value", float(difference), 1e-10)


def all_gradients(module: nn.Module, x: Tensor) -> Tensor:
    """Return the kernel of a network with one output from the gradients of all samples, 2.9 GB for ResNet-18."""
    parameters = dict(module.named_parameters())

    def output(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(module, values, (sample[None],))[0, 0]

    per_sample = vmap(grad(output), in_dims=(None, 0), chunk_size=8)({k: p.detach() for k, p in parameters.items()}, x)
    kernel = torch.zeros(len(x), len(x), dtype=torch.float64)
    for gradients in per_sample.values():
        kernel += gradients.flatten(1) @ gradients.flatten(1).T
    return kernel


def resnet() -> bool:
    """Print what is gained by taking ResNet-18 layer by layer."""
    x = drawn(64, 3, 32, 32).float()
    module, hooked = (Encoder(1, "resnet18").eval() for _ in range(2))
    for part in hooked.modules():
        part.register_forward_hook(lambda *_: None)
    results: dict[str, Tensor] = {}

    def timed(name: str, kernel: Callable[[], Tensor]) -> float:
        return processor_seconds(lambda: results.update({name: kernel()}))

    kernel, general = (EmpiricalNTK(network, dtype=torch.float32) for network in (module, hooked))
    kernel(x[:8], x[:8])
    ours = statistics.median(timed("ours", lambda: kernel(x, x)) for _ in range(3))
    held = timed("held", lambda: all_gradients(module, x))
    per_sample = timed("per sample", lambda: general(x, x))
    print(f"\nResNet-18, 64 images of 32×32, 1 output, float32: {ours:.1f} s; per sample {per_sample:.0f} s")
    ok = within("per sample in the same memory / ours, processor time", per_sample / ours, 8, least=True)
    within("torch.func, all gradients held / ours, processor time", held / ours)
    for name in ("held", "per sample"):
        difference = (results["ours"] - results[name]).norm() / results[name].norm()
        ok &= within(f"difference from {name}, relative", float(difference), 1e-5)
    return ok


def main() -> int:
    """Print the ratios; return 1 if one misses its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often each is timed (default: 7)")
    parser.add_argument("--peer", type=Path, default=".venv-tangents/bin/python", help="the Python of neural-tangents")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    ok = True
    if options.peer.exists():
        mlp, images = MLP(3072, [2048], 10).double(), drawn(16, 3, 16, 16)
        ok &= against_peer("MLP", mlp, drawn(100, 3072), options.peer, options.rounds, 1.5)
        ok &= against_peer("three convolutions", convolutions(), images, options.peer, options.rounds, 5)
    else:
        print(f"  not compared: no {options.peer} (see --help)")
    return 0 if resnet() & ok else 1


if __name__ == "__main__":
    sys.exit(main())
