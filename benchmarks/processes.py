"""What sharing a kernel fit among processes gains, and what it costs: ``python benchmarks/processes.py``.

1. ContrastiveKernelPCA on two processes of one thread each (gloo) against one: at least 1.7 times as fast, with the
   kernel matrix held (8000 pairs) and recomputed (4000), eigenvalues within 1e-12. On a machine that does other work
   too, processor time of the busier process stands for time, the least of the rounds, and time is judged only where
   the load is below ½.
2. Scaling exponents of processor time: in pairs at most 2.1, in features and in modes at most 1.
3. The time of a product with the kernel matrix as a formula, its constants measured here, against products of one
   process; and what it gives for 10⁵ and 10⁶ pairs on 1, 8 and 64 GPUs. Nothing is run on a GPU for that: it is an
   extrapolation from the rates that ``GPU`` states.

Of one process among P, n pairs, b vectors, d features, K = (2n)² / 2 kernel values:

    time = K/P · multiply                          4b flops a value, the value read twice
         + K/P · (make + d · feature)              where values are recomputed: 2d flops, and all that is not a product
         + 2 · 8 · 2n · b · (P − 1)/P / network    bytes: its rows to the others, and what it has summed for theirs
         + messages · latency

Where they are held, 8 K/P bytes are. Left out is orthogonalisation, of order n b m flops with m the vectors so far,
which is shared too; what is not shared is of order m³.
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
from timing import ratio, within
from torch import Tensor

from stepwise_lightning.theory import ContrastiveKernelPCA, rbf_kernel
from stepwise_lightning.theory.block_lanczos import KernelOperator
from stepwise_lightning.theory.process_group import one_process

MODES, VECTORS = 10, 24
# Collectives in one step of the iteration.
MESSAGES = 10
HELD, RECOMPUTED = 2**32, 16 * 2**20


@dataclass
class Machine:
    """Seconds of one process for a kernel value, bytes a second that it sends, seconds a message."""

    multiply: float
    make: float
    feature: float
    network: float
    latency: float

    def product(self, pairs: int, features: int, processes: int, held: bool) -> float:
        """Return the seconds of a product, by the formula."""
        a_value = self.multiply + (0 if held else self.make + features * self.feature)
        seconds = (2 * pairs) ** 2 / 2 / processes * a_value
        if processes > 1:
            seconds += bytes_sent(pairs, processes) / self.network + MESSAGES * self.latency
        return seconds


# An H100 by its data sheet, 67 Tflop/s in float64 and 3.35 TB/s, seven tenths of each; half of an InfiniBand port of
# 400 Gbit/s for each. In an RBF kernel a value passes memory about eight times, 8 bytes in and 8 out.
FLOPS, MEMORY = 0.7 * 67e12, 0.7 * 3.35e12
GPU = Machine(max(4 * VECTORS / FLOPS, 16 / MEMORY), 8 * 16 / MEMORY, 2 / FLOPS, 25e9, 30e-6)
GPU_BYTES = 70e9


def bytes_sent(pairs: int, processes: int) -> float:
    """Return what a process sends in a product."""
    return 2 * 8 * 2 * pairs * VECTORS * (processes - 1) / processes


def fit(pairs: int, size: int, max_bytes: int, modes: int = MODES) -> Callable[[], Tensor]:
    """Return a fit to be timed, which returns eigenvalues."""
    x1, x2, kernel = crops(pairs, size)
    return lambda: ContrastiveKernelPCA(kernel, modes, max_bytes, progress=False).fit(x1, x2).eigenvalues_


def timed(use: Callable[[], Tensor], shared: bool) -> tuple[float, float, Tensor]:
    """Return seconds, processor seconds of the busier process, and the result on rank 0."""
    dist.barrier()
    wall, busy, result = time.perf_counter(), time.process_time(), torch.empty(0)
    if shared:
        result = use()
    elif dist.get_rank() == 0:
        with one_process():
            result = use()
    seconds = torch.tensor([time.perf_counter() - wall, time.process_time() - busy], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds[0]), float(seconds[1]), result


def speed(name: str, pairs: int, max_bytes: int, rounds: int) -> bool:
    """Print the time of two processes against one."""
    quiet = os.getloadavg()[0] < 0.5
    use = fit(pairs, 16, max_bytes)
    runs: dict[bool, list[tuple[float, float, Tensor]]] = {False: [], True: []}
    for index in range(rounds + 1):
        for shared in (False, True) if index % 2 else (True, False):
            runs[shared].append(timed(use, shared))
    if dist.get_rank() > 0:
        return True
    walls, busy = (
        {shared: [run[i] for run in runs[shared][1:]] for shared in runs} for i in (0, 1)
    )  # the first warms up
    print(f"\n{pairs} pairs of 16×16 crops, {name}: one process {median(walls[False]):.2f} s, "
          f"two {median(walls[True]):.2f} s")  # fmt: skip
    ratios = [a / b for a, b in zip(busy[False], busy[True], strict=True)]
    print(f"  from {min(ratios):.2f} to {max(ratios):.2f} over {rounds} rounds, processor time")
    least_busy = min(busy[False]) / min(busy[True])
    ok = within("one process / the busier of two, least processor time", least_busy, 1.7, least=True)
    limit = 1.7 if quiet else None
    ok &= within("one process / two, time", ratio(walls[False], walls[True]), limit, least=True)
    one, two = (runs[shared][0][2] for shared in (False, True))
    return ok & within("largest difference of an eigenvalue / largest", float((one - two).abs().max() / one[0]), 1e-12)


def exponents(small: bool) -> bool:
    """Print how processor time grows with pairs, with features and with modes."""
    pairs, features = ((400, 800), (4, 8)) if small else ((1000, 2000, 4000), (8, 16, 32))
    modes = (5, 10) if small else (5, 10, 20, 40)

    def seconds(number: int, size: int, max_bytes: int, modes: int = MODES) -> float:
        use = fit(number, size, max_bytes, modes)
        return min(timed(use, False)[1] for _ in range(3))

    limits = {"pairs, held": 2.1, "pairs, recomputed": 2.1, "features": 1.0, "modes": 1.0}
    points = {
        "pairs, held": [(number, seconds(number, 8, HELD)) for number in pairs],
        "pairs, recomputed": [(number, seconds(number, 8, RECOMPUTED)) for number in pairs],
        "features": [(3 * size**2, seconds(pairs[1], size, HELD)) for size in features],
        "modes": [(number, seconds(pairs[1], 8, HELD, number)) for number in modes],
    }
    if dist.get_rank() > 0:
        return True
    print("\nexponents of processor time, one process")
    return all([within(name, slope(points[name]), limit) for name, limit in limits.items()])


def slope(points: list[tuple[int, float]]) -> float:
    """Return the exponent of a power law, by least squares."""
    x, y = (torch.tensor([math.log(point[i]) for point in points]) for i in (0, 1))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def least(use: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """Return the least seconds of a few calls."""
    seconds = []
    for _ in range(6):
        start = clock()
        use()
        seconds.append(clock() - start)
    return min(seconds)


def constants() -> Machine:
    """Return this machine's, of one thread; the network is that between its two processes."""
    size, few, many = 1024, 384, 1536
    tiles = [torch.randn(512, 512).double() for _ in range(100)]  # more than caches hold
    vectors = torch.randn(512, VECTORS).double()
    multiply = least(lambda: [(tile @ vectors, tile.T @ vectors) for tile in tiles]) / len(tiles) / 512**2
    kernel, x = partial(rbf_kernel, length_scale=50.0), torch.randn(size, many).double()
    blocks = [slice(0, 512), slice(512, 1024)]
    made = [
        least(lambda d=d: [kernel(x[rows, :d], x[columns, :d]) for rows in blocks for columns in blocks]) / size**2
        for d in (few, many)
    ]
    feature = (made[1] - made[0]) / (many - few)
    rows = torch.zeros(2**17, VECTORS).double()  # 24 MB

    def exchange() -> None:
        dist.all_gather_into_tensor(rows, rows[: len(rows) // 2])
        dist.reduce_scatter_tensor(rows[: len(rows) // 2].clone(), rows)

    network = rows.numel() * 8 / least(exchange, time.perf_counter)
    latency = least(lambda: dist.all_reduce(torch.zeros(VECTORS, VECTORS).double()), time.perf_counter)
    return Machine(multiply, made[0] - few * feature, feature, network, latency)


def scaling(pairs: int) -> bool:
    """Print the constants, the formula against products of one process, and what it gives for GPUs."""
    machine = constants()
    if dist.get_rank() > 0:
        return True
    print(f"\none process here: {1e9 * machine.multiply:.2f} ns to multiply a value by {VECTORS} vectors both ways "
          f"({4 * VECTORS / machine.multiply / 1e9:.0f} Gflop/s), {1e9 * machine.make:.1f} + "
          f"{1e9 * machine.feature:.3f} d ns to make one ({2 / machine.feature / 1e9:.0f} Gflop/s); "
          f"{machine.network / 1e9:.2f} GB/s and {1e3 * machine.latency:.2f} ms a message between two")  # fmt: skip
    x1, x2, kernel = crops(pairs, 16)
    ok = True
    for name, max_bytes in (("held", HELD), ("recomputed", RECOMPUTED)):
        with one_process():
            products = KernelOperator(kernel, torch.cat([x1, x2]), max_bytes, False)
        vectors = torch.randn(2 * pairs, VECTORS).double()
        share = least(lambda products=products, vectors=vectors: products.matmul(vectors))
        ok &= within(f"a product / formula, {name}", share / machine.product(pairs, 768, 1, name == "held"), 1.5)
    with one_process():
        ContrastiveKernelPCA(kernel, MODES, progress=False).fit(x1, x2, TimedOperator)
    print(f"\nextrapolated, not run: H100s, 768 features, {MODES} modes in {TimedOperator.count} products as here\n"
          "  pairs  GPUs  GB held by each  MB sent a product  product held  recomputed (sending)  fit")  # fmt: skip
    for number in (10**5, 10**6):
        for gpus in (1, 8, 64):
            print(_row(number, gpus, TimedOperator.count))
    return ok


def _row(pairs: int, gpus: int, products: int) -> str:
    held_bytes = 8 * (2 * pairs) ** 2 / 2 / gpus
    fits = held_bytes <= GPU_BYTES
    held, made = (GPU.product(pairs, 768, gpus, held) for held in (True, False))
    sent = bytes_sent(pairs, gpus)
    total = made + (products - 1) * (held if fits else made)  # to hold values they are made once
    return (
        f"  {pairs:.0e}  {gpus:4d}  {held_bytes / 1e9:11.1f}{'    ' if fits else ' (no)'}  {sent / 1e6:17.1f}"
        f"  {f'{held:10.3g} s' if fits else 11 * ' ' + '–'}  {made:8.3g} s ({sent / GPU.network / made:.1%})"
        f"  {total:.3g} s"
    )


def worker(rank: int, meeting_point: str, options: argparse.Namespace) -> None:
    """Measure on one of two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}/meet", rank=rank, world_size=2)
    # so many that the matrix, not what every process does alike, is most of the work
    held, recomputed = (400, 400) if options.smoke else (8000, 4000)
    ok = [
        speed("held", held, HELD, options.rounds),
        speed("recomputed", recomputed, RECOMPUTED, options.rounds),
        exponents(options.smoke),
        scaling(recomputed // 4),
    ]
    dist.destroy_process_group()
    sys.exit(0 if all(ok) else 1)


def main() -> int:
    """Print the ratios; return 1 if one misses its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of two processes against one (default: 5)")
    parser.add_argument("--smoke", action="store_true", help="a few pairs, to see that it runs")
    options = parser.parse_args()
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as meeting_point:
        ranks = [context.Process(target=worker, args=(rank, meeting_point, options)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    return max(abs(process.exitcode or 0) for process in ranks)


if __name__ == "__main__":
    sys.exit(main())
