"""Time and peak memory of the kernel theory, as ratios measured in one run: ``make benchmark``.

1. ContrastiveKernelPCA with an RBF kernel, 10 modes and 2000 pairs of 20×20 crops, relative to the dense algorithm
   (matrix square root and full eigendecomposition; at least 30 times as fast, eigenvalues within 1e-10) and to its
   products with the kernel matrix (limit 1.5).
2. Peak memory for 8000 pairs of 16×16 crops with half of the kernel matrix in memory (limit 0.7 of the whole matrix)
   and with recomputed tiles (limit 1 GB), at equal eigenvalues.
3. If scikit-learn is installed: time and peak memory of KernelPCA with the randomised solver, for equal numbers of
   points and components.
4. EmpiricalNTK of a 2048-wide MLP with 100 inputs and 10 outputs, relative to the product of an explicit Jacobian (at
   least 10 times as fast, under 1 GB), and of ResNet-18 with 64 images (under 2 GB).

All use one thread. Memory is the growth of the peak of a separate process, read from Linux's /proc.

``--stream PAIRS`` only fits this number of pairs of 16×16 crops from ``--data``, without storing the kernel matrix, on
all cores or a GPU, and prints time, peak memory and residuals. 50 000 pairs take about half an hour on two cores.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from timing import argument_parser, check, machine, peak_bytes, reset_peak_bytes
from torch import Tensor

from stepwise_lightning import MLP, Encoder, FixedCropPairs
from stepwise_lightning.theory import ContrastiveKernelPCA, EmpiricalNTK, rbf_kernel
from stepwise_lightning.theory.block_lanczos import KernelOperator

# Approximate median distance between crops, in standard deviations per pixel.
LENGTH_SCALE_PER_PIXEL = 0.6


class TimedOperator(KernelOperator):
    """Kernel products that add up their time."""

    seconds, count = 0.0, 0

    def __init__(self, *arguments: Any) -> None:
        start = time.perf_counter()
        super().__init__(*arguments)
        TimedOperator.seconds += time.perf_counter() - start

    def matmul(self, vectors: Tensor) -> Tensor:
        """Multiply and add the time of one product."""
        start = time.perf_counter()
        result = super().matmul(vectors)
        TimedOperator.seconds += time.perf_counter() - start
        TimedOperator.count += 1
        return result


def crops(pairs: int, size: int) -> tuple[Tensor, Tensor, partial[Tensor]]:
    """Return pairs of random crops from as many passes over the photographs as needed, and an RBF kernel."""
    parts = []
    for seed in range(-(-pairs // 2000)):
        data = FixedCropPairs(num_pairs=min(2000, pairs), crop_size=size, seed=seed)
        data.setup()
        parts.append((data.x1.flatten(1), data.x2.flatten(1)))
    x1, x2 = (torch.cat(views)[:pairs] for views in zip(*parts, strict=True))
    return x1, x2, partial(rbf_kernel, length_scale=LENGTH_SCALE_PER_PIXEL * x1.shape[1] ** 0.5)


def dense_eigenvalues(x1: Tensor, x2: Tensor, kernel: partial[Tensor]) -> Tensor:
    """Return the top ten eigenvalues of (1/2n) K̃^{1/2} P K̃^{1/2}, the formula of the paper."""
    z = torch.cat([x1, x2])
    weights, basis = torch.linalg.eigh(kernel(z, z))
    root = (basis * weights.clamp(min=0).sqrt()) @ basis.T
    return torch.linalg.eigh(root @ root.roll(len(x1), 0) / len(z)).eigenvalues.flip(0)[:10]


def run_in_process(function: Any, *arguments: Any) -> dict[str, Any]:
    """Measure ``function(*arguments)`` in a new process: seconds, growth of its peak memory in bytes, and result."""
    with get_context("spawn").Pool(1) as pool:
        result = pool.apply(_measured, (function, arguments))
        pool.close()  # a normal exit lets scikit-learn clean up
        pool.join()
    return result


def _measured(function: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    torch.set_num_threads(1)
    prepared = function(*arguments)
    before, start = reset_peak_bytes(), time.perf_counter()
    result = prepared()
    return {"seconds": time.perf_counter() - start, "bytes": peak_bytes() - before, "result": result}


def fit(pairs: int, size: int, max_bytes: int) -> Any:
    """Return a function that fits and returns the eigenvalues."""
    x1, x2, kernel = crops(pairs, size)
    return lambda: ContrastiveKernelPCA(kernel, 10, max_bytes, progress=False).fit(x1, x2).eigenvalues_.tolist()


def sklearn_fit(pairs: int, size: int) -> Any:
    """Return a function that fits scikit-learn's KernelPCA to the same number of points."""
    from sklearn.decomposition import KernelPCA

    x1, x2, kernel = crops(pairs, size)
    z, gamma = torch.cat([x1, x2]).double().numpy(), 0.5 / kernel.keywords["length_scale"] ** 2
    model = KernelPCA(10, kernel="rbf", gamma=gamma, eigen_solver="randomized", random_state=0)
    return lambda: model.fit(z).eigenvalues_.tolist()


def mlp_kernel(max_bytes: int, full: bool) -> Any:
    """Return a function that computes the tangent kernel of a wide MLP, in blocks or from its ``full`` Jacobian."""
    module, x = (
        MLP(3072, [2048], 10).double(),
        torch.randn(100, 3072, generator=torch.Generator().manual_seed(0)).double(),
    )
    if not full:
        return lambda: EmpiricalNTK(module, max_bytes=max_bytes)(x, x).diagonal().tolist()

    def from_jacobian() -> list[float]:
        kernel = torch.zeros(100, 100, dtype=torch.float64)
        jacobian = torch.empty(100, sum(p.numel() for p in module.parameters()), dtype=torch.float64)  # 5 GB
        for output in range(10):
            for row, f in zip(jacobian, module(x)[:, output], strict=True):
                gradients = torch.autograd.grad(f, list(module.parameters()), retain_graph=True)
                torch.cat([g.flatten() for g in gradients], out=row)
            kernel += jacobian @ jacobian.T / 10
        return kernel.diagonal().tolist()

    return from_jacobian


def resnet_kernel(max_bytes: int) -> Any:
    """Return a function that computes the tangent kernel of ResNet-18: 64 images, one output, float32."""
    module = Encoder(1, "resnet18").eval()
    x = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    kernel = EmpiricalNTK(module, max_bytes=max_bytes, dtype=torch.float32)
    return lambda: kernel(x, x).diagonal().tolist()


def speed() -> bool:
    """Check the time of 2000 pairs relative to the dense algorithm and to the kernel products."""
    x1, x2, kernel = crops(2000, 20)
    seconds, overheads = [], []
    for _ in range(6):
        TimedOperator.seconds = 0.0
        start = time.perf_counter()
        model = ContrastiveKernelPCA(kernel, 10, progress=False).fit(x1, x2, TimedOperator)
        seconds.append(time.perf_counter() - start)
        overheads.append(seconds[-1] / TimedOperator.seconds)
    ours, overhead = (statistics.median(values[1:]) for values in (seconds, overheads))  # without the warm-up
    start = time.perf_counter()
    eigenvalues = dense_eigenvalues(x1, x2, kernel)
    dense = time.perf_counter() - start
    print(f"\n2000 pairs of 20×20 crops, RBF, 10 modes: {ours:.2f} s (median of 5), dense algorithm {dense:.0f} s")
    ok = check("dense algorithm / ours", dense / ours, 30, minimum=True)
    ok &= check("ours / its kernel products", overhead, 1.5)
    difference = (model.eigenvalues_ - eigenvalues).abs().max() / eigenvalues[0]
    return ok & check("largest difference of an eigenvalue / largest eigenvalue", float(difference), 1e-10)


def memory(pairs: int) -> bool:
    """Check peak memory with a stored and a recomputed kernel matrix; print the comparison with scikit-learn."""
    matrix = 8 * (2 * pairs) ** 2
    held, streamed = (run_in_process(fit, pairs, 16, size) for size in (2 * matrix, 300 * 2**20))
    print(f"\n{pairs} pairs of 16×16 crops; kernel matrix {matrix / 2**30:.2f} GB; "
          f"stored {held['seconds']:.0f} s, recomputed {streamed['seconds']:.0f} s")  # fmt: skip
    ok = check("peak memory, stored / kernel matrix", held["bytes"] / matrix, 0.7)
    ok &= check("peak memory, recomputed, GB", streamed["bytes"] / 1e9, 1.0)
    pairwise = zip(held["result"], streamed["result"], strict=True)
    ok &= check(
        "largest difference of an eigenvalue / largest", max(abs(a - b) for a, b in pairwise) / held["result"][0], 1e-10
    )
    if importlib.util.find_spec("sklearn") is None:
        print("  not compared: scikit-learn is not installed (pip install scikit-learn)")
        return ok
    theirs = run_in_process(sklearn_fit, pairs, 16)
    check("scikit-learn's KernelPCA / ours, time", theirs["seconds"] / held["seconds"])
    check("scikit-learn's KernelPCA / ours, peak memory", theirs["bytes"] / held["bytes"])
    return ok


def tangent_kernels() -> bool:
    """Check time and memory of empirical tangent kernels."""
    ours, full = run_in_process(mlp_kernel, 2**29, False), run_in_process(mlp_kernel, 2**29, True)
    print(f"\ntangent kernel of a 2048-wide MLP, 100 inputs, 10 outputs: {ours['seconds']:.2f} s")
    ok = check("explicit Jacobian / ours, time", full["seconds"] / ours["seconds"], 10, minimum=True)
    ok &= check("peak memory, GB", ours["bytes"] / 1e9, 1.0)
    pairwise = zip(ours["result"], full["result"], strict=True)
    ok &= check("largest relative difference", max(abs(a / b - 1) for a, b in pairwise), 1e-10)
    resnet = run_in_process(resnet_kernel, 2**30)
    print(f"tangent kernel of ResNet-18, 64 images of 32×32, 1 output, float32: {resnet['seconds']:.0f} s")
    return ok & check("peak memory, GB", resnet["bytes"] / 1e9, 2.0)


def stream(pairs: int, data: str) -> bool:
    """Check time and memory of a fit whose kernel matrix is much larger than memory."""
    crop_pairs = FixedCropPairs(data, num_pairs=pairs, crop_size=16)
    crop_pairs.setup()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x1, x2 = (view.flatten(1).to(device) for view in (crop_pairs.x1, crop_pairs.x2))
    kernel = partial(rbf_kernel, length_scale=LENGTH_SCALE_PER_PIXEL * x1.shape[1] ** 0.5)
    before, start = reset_peak_bytes(), time.perf_counter()
    model = ContrastiveKernelPCA(kernel, 10, max_bytes=2**30).fit(x1, x2, TimedOperator)
    seconds = time.perf_counter() - start
    per_product = TimedOperator.seconds / TimedOperator.count
    print(f"\n{pairs} pairs of 16×16 crops, recomputed: {seconds:.0f} s on {torch.get_num_threads()} threads, "
          f"{device}; {TimedOperator.count} products with the kernel matrix of {per_product:.0f} s each")  # fmt: skip
    print("  eigenvalues:", *(f"{value:.6g}" for value in model.eigenvalues_.tolist()))
    residuals = (model.residuals_ / model.eigenvalues_[0]).tolist()
    print("  residuals / largest eigenvalue:", *(f"{residual:.1e}" for residual in residuals))
    ok = check("time / its kernel products", seconds / TimedOperator.seconds, 1.5)
    return ok & check("peak memory, GB", (peak_bytes() - before) / 1e9, 1.0)


def main() -> int:
    """Print the ratios; return 1 if one misses its limit."""
    parser = argument_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=8000, help="pairs of the memory test (default: 8000)")
    parser.add_argument(
        "--stream", type=int, metavar="PAIRS", help="only fit this number of pairs without storing the kernel matrix"
    )
    parser.add_argument("--data", default="photos", help="folder with at least PAIRS images (default: photos)")
    options = parser.parse_args()
    if options.stream:
        return 0 if stream(options.stream, options.data) else 1
    torch.set_num_threads(1)
    print(machine())
    ok = tangent_kernels()
    ok &= speed()
    return 0 if memory(options.pairs) & ok else 1


if __name__ == "__main__":
    sys.exit(main())
