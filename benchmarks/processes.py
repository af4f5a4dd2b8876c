"""Speed-up and communication of a kernel fit on several processes: ``python benchmarks/processes.py``.

1. ContrastiveKernelPCA on two processes of one thread each (gloo) relative to one: at least 1.7 times as fast, with a
   stored (8000 pairs) and a recomputed kernel matrix (4000 pairs), and eigenvalues within 1e-12. The limit applies to
   the minimum over rounds of the processor time of the busier process, and to wall time only if the load is below ½.
2. Scaling exponents of processor time: at most 2.1 in pairs, 1 in features and 1 in modes.
3. A formula for the time of a product with the kernel matrix, with constants measured here, relative to products of one
   process; and its prediction for 10⁵ and 10⁶ pairs on 1, 8 and 64 GPUs. The prediction is an extrapolation from the
   rates in ``GPU``; nothing runs on a GPU.

With P processes, n pairs, b vectors, d features and K = (2n)² / 2 kernel values, one process takes:

    time = K/P · multiply                          4b flops per value, read twice
         + K/P · (make + d · feature)              if values are recomputed: 2d flops per value, plus overhead
         + 2 · 8 · 2n · b · (P − 1)/P / network    bytes: rows sent to the others, and partial sums for their rows
         + messages · latency

Stored values take 8 K/P bytes. The formula excludes orthogonalisation, of order n b m flops for m vectors, which the
processes divide, and terms of order m³, which they do not.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from kernel import TimedOperator, crops
from timing import argument_parser, check, ratio
from torch import Tensor

from stepwise_lightning.theory import ContrastiveKernelPCA, rbf_kernel
from stepwise_lightning.theory.block_lanczos import KernelOperator
from stepwise_lightning.theory.process_group import one_process

MODES, VECTORS = 10, 24
# Collectives per iteration.
MESSAGES = 10
STORED, RECOMPUTED = 2**32, 16 * 2**20


@dataclass
class Machine:
    """Seconds per kernel value in one process, bytes sent per second, and seconds per message."""

    multiply: float
    make: float
    feature: float
    network: float
    latency: float

    def product(self, pairs: int, features: int, processes: int, held: bool) -> float:
        """Return the seconds of a product from the formula."""
        per_value = self.multiply + (0 if held else self.make + features * self.feature)
        seconds = (2 * pairs) ** 2 / 2 / processes * per_value
        if processes > 1:
            seconds += bytes_sent(pairs, processes) / self.network + MESSAGES * self.latency
        return seconds


# An H100 at 70 % of its data sheet (67 Tflop/s in float64, 3.35 TB/s), with half of an InfiniBand port of 400 Gbit/s.
# An RBF kernel reads and writes a value of 8 bytes about eight times.
FLOPS, MEMORY = 0.7 * 67e12, 0.7 * 3.35e12
GPU = Machine(max(4 * VECTORS / FLOPS, 16 / MEMORY), 8 * 16 / MEMORY, 2 / FLOPS, 25e9, 30e-6)
GPU_BYTES = 70e9


def bytes_sent(pairs: int, processes: int) -> float:
    """Return the bytes that a process sends in a product."""
    return 2 * 8 * 2 * pairs * VECTORS * (processes - 1) / processes


def fit(pairs: int, size: int, max_bytes: int, modes: int = MODES) -> Callable[[], Tensor]:
    """Return a function that fits and returns eigenvalues."""
    x1, x2, kernel = crops(pairs, size)
    return lambda: ContrastiveKernelPCA(kernel, modes, max_bytes, progress=False).fit(x1, x2).eigenvalues_


def timed(compute: Callable[[], Tensor], distributed: bool) -> tuple[float, float, Tensor]:
    """Return wall seconds, processor seconds of the busier process, and the result on rank 0."""
    dist.barrier()
    wall, busy, result = time.perf_counter(), time.process_time(), torch.empty(0)
    if distributed:
        result = compute()
    elif dist.get_rank() == 0:
        with one_process():
            result = compute()
    seconds = torch.tensor([time.perf_counter() - wall, time.process_time() - busy], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds[0]), float(seconds[1]), result


def speed(name: str, pairs: int, max_bytes: int, rounds: int) -> bool:
    """Check the time of two processes relative to one."""
    quiet = os.getloadavg()[0] < 0.5
    compute = fit(pairs, 16, max_bytes)
    runs: dict[bool, list[tuple[float, float, Tensor]]] = {False: [], True: []}
    for index in range(rounds + 1):
        for distributed in (False, True) if index % 2 else (True, False):
            runs[distributed].append(timed(compute, distributed))
    if dist.get_rank() > 0:
        return True
    walls, busy = (
        {distributed: [run[i] for run in runs[distributed][1:]] for distributed in runs} for i in (0, 1)
    )  # without the warm-up
    print(f"\n{pairs} pairs of 16×16 crops, {name}: one process {median(walls[False]):.2f} s, "
          f"two {median(walls[True]):.2f} s")  # fmt: skip
    ratios = [a / b for a, b in zip(busy[False], busy[True], strict=True)]
    print(f"  from {min(ratios):.2f} to {max(ratios):.2f} over {rounds} rounds, processor time")
    min_ratio = min(busy[False]) / min(busy[True])
    ok = check("one process / the busier of two, minimum processor time", min_ratio, 1.7, minimum=True)
    limit = 1.7 if quiet else None
    ok &= check("one process / two, time", ratio(walls[False], walls[True]), limit, minimum=True)
    one, two = (runs[distributed][0][2] for distributed in (False, True))
    return ok & check("largest difference of an eigenvalue / largest", float((one - two).abs().max() / one[0]), 1e-12)


def exponents(small: bool) -> bool:
    """Check the scaling exponents of processor time in pairs, features and modes."""
    pairs, features = ((400, 800), (4, 8)) if small else ((1000, 2000, 4000), (8, 16, 32))
    modes = (5, 10) if small else (5, 10, 20, 40)

    def seconds(number: int, size: int, max_bytes: int, modes: int = MODES) -> float:
        compute = fit(number, size, max_bytes, modes)
        return min(timed(compute, False)[1] for _ in range(3))

    limits = {"pairs, stored": 2.1, "pairs, recomputed": 2.1, "features": 1.0, "modes": 1.0}
    points = {
        "pairs, stored": [(number, seconds(number, 8, STORED)) for number in pairs],
        "pairs, recomputed": [(number, seconds(number, 8, RECOMPUTED)) for number in pairs],
        "features": [(3 * size**2, seconds(pairs[1], size, STORED)) for size in features],
        "modes": [(number, seconds(pairs[1], 8, STORED, number)) for number in modes],
    }
    if dist.get_rank() > 0:
        return True
    print("\nexponents of processor time, one process")
    return all([check(name, slope(points[name]), limit) for name, limit in limits.items()])


def slope(points: list[tuple[int, float]]) -> float:
    """Return the exponent of a power law fitted by least squares."""
    x, y = (torch.tensor([math.log(point[i]) for point in points]) for i in (0, 1))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def min_seconds(call: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """Return the minimum time of six calls."""
    seconds = []
    for _ in range(6):
        start = clock()
        call()
        seconds.append(clock() - start)
    return min(seconds)


def constants() -> Machine:
    """Return the constants of this machine for one thread; the network connects the two processes."""
    size, few, many = 1024, 384, 1536
    tiles = [torch.randn(512, 512).double() for _ in range(100)]  # larger than caches
    vectors = torch.randn(512, VECTORS).double()
    multiply = min_seconds(lambda: [(tile @ vectors, tile.T @ vectors) for tile in tiles]) / len(tiles) / 512**2
    kernel, x = partial(rbf_kernel, length_scale=50.0), torch.randn(size, many).double()
    blocks = [slice(0, 512), slice(512, 1024)]
    times = [
        min_seconds(lambda d=d: [kernel(x[rows, :d], x[columns, :d]) for rows in blocks for columns in blocks])
        / size**2
        for d in (few, many)
    ]
    feature = (times[1] - times[0]) / (many - few)
    rows = torch.zeros(2**17, VECTORS).double()  # 24 MB

    def exchange() -> None:
        dist.all_gather_into_tensor(rows, rows[: len(rows) // 2])
        dist.reduce_scatter_tensor(rows[: len(rows) // 2].clone(), rows)

    network = rows.numel() * 8 / min_seconds(exchange, time.perf_counter)
    latency = min_seconds(lambda: dist.all_reduce(torch.zeros(VECTORS, VECTORS).double()), time.perf_counter)
    return Machine(multiply, times[0] - few * feature, feature, network, latency)


def scaling(pairs: int) -> bool:
    """Check the formula against products of one process; print the constants and the prediction for GPUs."""
    machine = constants()
    if dist.get_rank() > 0:
        return True
    print(f"\none process on this machine: {1e9 * machine.multiply:.2f} ns to multiply a value by {VECTORS} vectors "
          f"in both directions ({4 * VECTORS / machine.multiply / 1e9:.0f} Gflop/s), {1e9 * machine.make:.1f} + "
          f"{1e9 * machine.feature:.3f} d ns to compute a value ({2 / machine.feature / 1e9:.0f} Gflop/s); "
          f"{machine.network / 1e9:.2f} GB/s and {1e3 * machine.latency:.2f} ms per message")  # fmt: skip
    x1, x2, kernel = crops(pairs, 16)
    ok = True
    for name, max_bytes in (("stored", STORED), ("recomputed", RECOMPUTED)):
        with one_process():
            products = KernelOperator(kernel, torch.cat([x1, x2]), max_bytes, False)
        vectors = torch.randn(2 * pairs, VECTORS).double()
        seconds = min_seconds(lambda products=products, vectors=vectors: products.matmul(vectors))
        ok &= check(f"a product / formula, {name}", seconds / machine.product(pairs, 768, 1, name == "stored"), 1.5)
    with one_process():
        ContrastiveKernelPCA(kernel, MODES, progress=False).fit(x1, x2, TimedOperator)
    print(f"\nextrapolation, not run: H100 GPUs, 768 features, {MODES} modes in {TimedOperator.count} products\n"
          "  pairs  GPUs  GB stored each  MB sent per product  product stored  recomputed (sending)  fit")  # fmt: skip
    for number in (10**5, 10**6):
        for gpus in (1, 8, 64):
            print(_row(number, gpus, TimedOperator.count))
    return ok


def _row(pairs: int, gpus: int, products: int) -> str:
    held_bytes = 8 * (2 * pairs) ** 2 / 2 / gpus
    fits = held_bytes <= GPU_BYTES
    stored, recomputed = (GPU.product(pairs, 768, gpus, held) for held in (True, False))
    sent = bytes_sent(pairs, gpus)
    total = recomputed + (products - 1) * (stored if fits else recomputed)  # the first pass computes the stored values
    return (
        f"  {pairs:.0e}  {gpus:4d}  {held_bytes / 1e9:11.1f}{'    ' if fits else ' (no)'}  {sent / 1e6:17.1f}"
        f"  {f'{stored:10.3g} s' if fits else 11 * ' ' + '–'}  {recomputed:8.3g} s"
        f" ({sent / GPU.network / recomputed:.1%})  {total:.3g} s"
    )


def worker(rank: int, directory: str, options: argparse.Namespace) -> None:
    """Run all measurements on this rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    # enough pairs that products with the kernel matrix dominate
    stored, recomputed = (400, 400) if options.smoke else (8000, 4000)
    ok = [
        speed("stored", stored, STORED, options.rounds),
        speed("recomputed", recomputed, RECOMPUTED, options.rounds),
        exponents(options.smoke),
        scaling(recomputed // 4),
    ]
    dist.destroy_process_group()
    sys.exit(0 if all(ok) else 1)


def main() -> int:
    """Print the ratios; return 1 if one misses its limit."""
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--smoke", action="store_true", help="use a few pairs, as a smoke test")
    options = parser.parse_args()
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        ranks = [context.Process(target=worker, args=(rank, directory, options)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    return max(abs(process.exitcode or 0) for process in ranks)


if __name__ == "__main__":
    sys.exit(main())
