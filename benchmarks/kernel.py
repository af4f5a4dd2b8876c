"""What the kernel theory costs, as ratios measured in one run: ``make benchmark``.

1. ContrastiveKernelPCA, 2000 pairs of 20×20 crops, RBF, 10 modes, against the dense route (matrix square root and full
   eigendecomposition): at least 30 times as fast, eigenvalues within 1e-10; and against its own kernel products (limit
   1.5).
2. 8000 pairs of 16×16 crops: peak memory when half of the kernel matrix is held (limit 0.7 of the whole) and when it is
   streamed (limit 1 GB), with the same eigenvalues.
3. Where scikit-learn is installed: time and peak memory against KernelPCA with the randomised solver, equal numbers of
   points and components.
4. EmpiricalNTK of a 2048-wide MLP, 100 inputs and 10 outputs, against contracting one full Jacobian (at least 10 times
   as fast, under 1 GB), and of ResNet-18 on 64 images (under 2 GB).

One thread. Memory is the growth of the process's peak (read from Linux's /proc), each measured in a process of its own.

``--stream PAIRS`` instead fits so many pairs of 16×16 crops of ``--data`` without holding their kernel matrix, on all
cores or a GPU, and prints time, peak memory and residuals; 50 000 pairs take half an hour or so on two cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import sys
import time
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from timing import fresh_peak_bytes, peak_bytes, within
from torch import Tensor

from stepwise_lightning import MLP, Encoder, FixedCropPairs
from stepwise_lightning.theory import ContrastiveKernelPCA, EmpiricalNTK, rbf_kernel
from stepwise_lightning.theory.block_lanczos import KernelOperator

# About the median distance between such crops, in units of standard deviations per pixel.
LENGTH_SCALE_PER_PIXEL = 0.6


class TimedOperator(KernelOperator):
    """Kernel products that add up their time."""

    seconds, count = 0.0, 0

    def __init__(self, *arguments: Any) -> None:
        start = time.perf_counter()
        super().__init__(*arguments)
        TimedOperator.seconds += time.perf_counter() - start

    def matmul(self, vectors: Tensor) -> Tensor:
        """Time one product."""
        start = time.perf_counter()
        result = super().matmul(vectors)
        TimedOperator.seconds += time.perf_counter() - start
        TimedOperator.count += 1
        return result


def crops(pairs: int, size: int) -> tuple[Tensor, Tensor, partial[Tensor]]:
    """Return pairs of random crops of photographs, repeated as often as it takes, and an RBF kernel."""
    parts = []
    for seed in range(-(-pairs // 2000)):
        data = FixedCropPairs(num_pairs=min(2000, pairs), crop_size=size, seed=seed)
        data.setup()
        parts.append((data.x1.flatten(1), data.x2.flatten(1)))
    x1, x2 = (torch.cat(views)[:pairs] for views in zip(*parts, strict=True))
    return x1, x2, partial(rbf_kernel, length_scale=LENGTH_SCALE_PER_PIXEL * x1.shape[1] ** 0.5)


def dense_route(x1: Tensor, x2: Tensor, kernel: partial[Tensor]) -> Tensor:
    """Return the top ten eigenvalues as the paper's formula is written: (1/2n) K̃^{1/2} P K̃^{1/2}."""
    z = torch.cat([x1, x2])
    weights, basis = torch.linalg.eigh(kernel(z, z))
    root = (basis * weights.clamp(min=0).sqrt()) @ basis.T
    return torch.linalg.eigh(root @ root.roll(len(x1), 0) / len(z)).eigenvalues.flip(0)[:10]


def in_a_process(function: Any, *arguments: Any) -> dict[str, Any]:
    """Run in a fresh process, and add the growth of its peak memory in bytes."""
    with get_context("spawn").Pool(1) as pool:
        result = pool.apply(_measured, (function, arguments))
        pool.close()  # and let it end by itself: scikit-learn tidies up then
        pool.join()
    return result


def _measured(function: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    torch.set_num_threads(1)
    prepared = function(*arguments)  # returns what is to be measured
    before, start = fresh_peak_bytes(), time.perf_counter()
    result = prepared()
    return {"seconds": time.perf_counter() - start, "bytes": peak_bytes() - before, "result": result}


def fit(pairs: int, size: int, max_bytes: int) -> Any:
    """Prepare a fit that returns its eigenvalues."""
    x1, x2, kernel = crops(pairs, size)
    return lambda: ContrastiveKernelPCA(kernel, 10, max_bytes, progress=False).fit(x1, x2).eigenvalues_.tolist()


def their_fit(pairs: int, size: int) -> Any:
    """Prepare a fit of scikit-learn's KernelPCA on as many points."""
    from sklearn.decomposition import KernelPCA

    x1, x2, kernel = crops(pairs, size)
    z, gamma = torch.cat([x1, x2]).double().numpy(), 0.5 / kernel.keywords["length_scale"] ** 2
    model = KernelPCA(10, kernel="rbf", gamma=gamma, eigen_solver="randomized", random_state=0)
    return lambda: model.fit(z).eigenvalues_.tolist()


def mlp_kernel(max_bytes: int, full: bool) -> Any:
    """Prepare the tangent kernel of a wide MLP: blocked, or by contracting its Jacobian one output at a time."""
    module, x = (
        MLP(3072, [2048], 10).double(),
        torch.randn(100, 3072, generator=torch.Generator().manual_seed(0)).double(),
    )
    if not full:
        return lambda: EmpiricalNTK(module, max_bytes=max_bytes)(x, x).diagonal().tolist()

    def contracted() -> list[float]:
        kernel = torch.zeros(100, 100, dtype=torch.float64)
        jacobian = torch.empty(100, sum(p.numel() for p in module.parameters()), dtype=torch.float64)  # 5 GB
        for output in range(10):
            for row, f in zip(jacobian, module(x)[:, output], strict=True):
                gradients = torch.autograd.grad(f, list(module.parameters()), retain_graph=True)
                torch.cat([g.flatten() for g in gradients], out=row)
            kernel += jacobian @ jacobian.T / 10
        return kernel.diagonal().tolist()

    return contracted


def resnet_kernel(max_bytes: int) -> Any:
    """Prepare the tangent kernel of ResNet-18 on 64 images, one output, in float32."""
    module = Encoder(1, "resnet18").eval()
    x = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    kernel = EmpiricalNTK(module, max_bytes=max_bytes, dtype=torch.float32)
    return lambda: kernel(x, x).diagonal().tolist()


def speed() -> bool:
    """Print the time of 2000 pairs against the dense route and the kernel products."""
    x1, x2, kernel = crops(2000, 20)
    seconds, shares = [], []
    for _ in range(6):
        TimedOperator.seconds = 0.0
        start = time.perf_counter()
        model = ContrastiveKernelPCA(kernel, 10, progress=False).fit(x1, x2, TimedOperator)
        seconds.append(time.perf_counter() - start)
        shares.append(seconds[-1] / TimedOperator.seconds)
    ours, share = (statistics.median(values[1:]) for values in (seconds, shares))  # the first warms up
    start = time.perf_counter()
    eigenvalues = dense_route(x1, x2, kernel)
    dense = time.perf_counter() - start
    print(f"\n2000 pairs of 20×20 crops, RBF, 10 modes: {ours:.2f} s (median of 5), dense route {dense:.0f} s")
    ok = within("dense route / ours", dense / ours, 30, least=True)
    ok &= within("ours / its own kernel products", share, 1.5)
    difference = (model.eigenvalues_ - eigenvalues).abs().max() / eigenvalues[0]
    return ok & within("largest difference of an eigenvalue / largest eigenvalue", float(difference), 1e-10)


def memory(pairs: int) -> bool:
    """Print peak memory, held and streamed, and against scikit-learn."""
    matrix = 8 * (2 * pairs) ** 2
    held, streamed = (in_a_process(fit, pairs, 16, size) for size in (2 * matrix, 300 * 2**20))
    print(f"\n{pairs} pairs of 16×16 crops; kernel matrix {matrix / 2**30:.2f} GB; "
          f"held {held['seconds']:.0f} s, streamed {streamed['seconds']:.0f} s")  # fmt: skip
    ok = within("peak memory held / kernel matrix", held["bytes"] / matrix, 0.7)
    ok &= within("peak memory streamed, GB", streamed["bytes"] / 1e9, 1.0)
    pairwise = zip(held["result"], streamed["result"], strict=True)
    ok &= within(
        "largest difference of an eigenvalue / largest", max(abs(a - b) for a, b in pairwise) / held["result"][0], 1e-10
    )
    if importlib.util.find_spec("sklearn") is None:
        print("  not compared: scikit-learn is not installed (pip install scikit-learn)")
        return ok
    theirs = in_a_process(their_fit, pairs, 16)
    within("scikit-learn's KernelPCA / ours, time", theirs["seconds"] / held["seconds"])
    within("scikit-learn's KernelPCA / ours, peak memory", theirs["bytes"] / held["bytes"])
    return ok


def tangent_kernels() -> bool:
    """Print the cost of empirical tangent kernels."""
    ours, full = in_a_process(mlp_kernel, 2**29, False), in_a_process(mlp_kernel, 2**29, True)
    print(f"\ntangent kernel of a 2048-wide MLP, 100 inputs, 10 outputs: {ours['seconds']:.2f} s")
    ok = within("contracting the Jacobian / ours, time", full["seconds"] / ours["seconds"], 10, least=True)
    ok &= within("peak memory, GB", ours["bytes"] / 1e9, 1.0)
    pairwise = zip(ours["result"], full["result"], strict=True)
    ok &= within("largest relative difference", max(abs(a / b - 1) for a, b in pairwise), 1e-10)
    resnet = in_a_process(resnet_kernel, 2**30)
    print(f"tangent kernel of ResNet-18, 64 images of 32×32, 1 output, float32: {resnet['seconds']:.0f} s")
    return ok & within("peak memory, GB", resnet["bytes"] / 1e9, 2.0)


def stream(pairs: int, data: str) -> bool:
    """Print what a fit costs whose kernel matrix is far too large to hold."""
    drawn = FixedCropPairs(data, num_pairs=pairs, crop_size=16)
    drawn.setup()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x1, x2 = (view.flatten(1).to(device) for view in (drawn.x1, drawn.x2))
    kernel = partial(rbf_kernel, length_scale=LENGTH_SCALE_PER_PIXEL * x1.shape[1] ** 0.5)
    before, start = fresh_peak_bytes(), time.perf_counter()
    model = ContrastiveKernelPCA(kernel, 10, max_bytes=2**30).fit(x1, x2, TimedOperator)
    seconds = time.perf_counter() - start
    one, products = TimedOperator.seconds / TimedOperator.count, TimedOperator.count
    print(f"\n{pairs} pairs of 16×16 crops, streamed: {seconds:.0f} s on {torch.get_num_threads()} threads, {device}; "
          f"{products} products with the kernel matrix of {one:.0f} s")  # fmt: skip
    print("  eigenvalues:", *(f"{value:.6g}" for value in model.eigenvalues_.tolist()))
    residuals = (model.residuals_ / model.eigenvalues_[0]).tolist()
    print("  residuals / largest eigenvalue:", *(f"{residual:.1e}" for residual in residuals))
    ok = within("time / its own kernel products", seconds / TimedOperator.seconds, 1.5)
    return ok & within("peak memory, GB", (peak_bytes() - before) / 1e9, 1.0)


def main() -> int:
    """Print the ratios; return 1 if one misses its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8000, help="of the memory test (default: 8000)")
    parser.add_argument("--stream", type=int, metavar="PAIRS", help="fit so many pairs, streamed, and nothing else")
    parser.add_argument("--data", default="photos", help="a folder of at least as many images (default: photos)")
    options = parser.parse_args()
    if options.stream:
        return 0 if stream(options.stream, options.data) else 1
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    ok = tangent_kernels()
    ok &= speed()
    return 0 if memory(options.pairs) & ok else 1


if __name__ == "__main__":
    sys.exit(main())
