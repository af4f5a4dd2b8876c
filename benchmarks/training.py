"""Overhead of Lightning and of spectrum logging in training, as ratios measured in one run: ``make benchmark``.

1. A training step with our module, data and Trainer relative to a plain loop with the same encoder, loss and loader:
   ResNet-18 at 32×32 (limit 1.05), and the small ResNet at 16×16, whose short steps show the overhead; also a minimal
   LightningModule in a Trainer without callbacks.
2. Spectrum logging relative to the training of this ResNet-18 for 5000 steps of 512 pairs, the shortest run of the GPU
   configurations: limit 1 % for 64 and 512 dimensions, 3 % for 2048. A step of 64 pairs is timed and counts eight
   times. Each measurement embeds 256 pairs (the default) and draws figures; the forward pass and the rest are timed
   separately.
3. With a GPU: ResNet-50 at 32×32, 512 pairs, mixed precision: images per second, utilisation, logging.

Competitors alternate; the median ratio over rounds cancels drift of the machine.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from timing import Stopwatch, alternate, argument_parser, check, machine, quiet_lightning, ratio
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stepwise_lightning import BarlowTwins, Encoder, SpectrumLogger, TwoViewDataModule
from stepwise_lightning.data.image_sets import ImageSet
from stepwise_lightning.features import capture
from stepwise_lightning.spectrum.schedule import log_spaced_steps

RUN_STEPS, RUN_PAIRS, BATCH = 5000, 512, 64


class TimedLogger(SpectrumLogger):
    """SpectrumLogger that measures the time of its hooks."""

    seconds = final = 0.0

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Measure the hook before a step."""
        start = time.perf_counter()
        super().on_train_batch_start(*arguments)
        self.seconds += time.perf_counter() - start

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Measure the hook after a step."""
        start = time.perf_counter()
        super().on_train_batch_end(*arguments)
        self.seconds += time.perf_counter() - start

    def on_train_end(self, *arguments: Any) -> None:
        """Measure the hook at the end: last measurement, files and figures."""
        start = time.perf_counter()
        super().on_train_end(*arguments)
        self.final = time.perf_counter() - start


class MinimalModule(L.LightningModule):
    """The same training step as in Lightning's tutorials, for the overhead of Lightning alone."""

    def __init__(self, method: BarlowTwins) -> None:
        super().__init__()
        self.encoder, self.method = method.encoder, [method]  # a list hides it from Lightning

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return self.method[0].loss(self.encoder(batch[0]), self.encoder(batch[1]))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Prevent Lightning's warning about an unused validation set."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with the settings of :func:`new_module`."""
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


class ScaledInputs(L.LightningModule):
    """Module whose inputs are the embeddings, for the time of a measurement without the forward pass of a network."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, z: Tensor) -> Tensor:
        """Return the embeddings."""
        return z * self.scale

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return a loss that shrinks the embeddings."""
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def new_module(backbone: str, dim: int = 64) -> BarlowTwins:
    """Return a Barlow Twins model with a small initialisation."""
    encoder = Encoder(dim, backbone, alpha=1e-3)
    return BarlowTwins(encoder, 1e-3, momentum=0.9, off_diagonal_weight=1.0, normalize=False, center=True)


def photographs(image_size: int, batch: int = BATCH, copies: int = 1, **settings: Any) -> TwoViewDataModule:
    """Return the bundled photographs as two views, each repeated ``copies`` times."""
    data = TwoViewDataModule("photos", image_size=image_size, global_batch_size=batch, **settings)
    data.setup("fit")
    train = data.images("train")
    assert isinstance(train.images, Tensor)
    data._sets["train"] = ImageSet(train.images.repeat(copies, 1, 1, 1), train.labels.repeat(copies), train.class_names)
    return data


def train(
    model: L.LightningModule, steps: int, data: Any, *callbacks: L.Callback, skip: int = 1, **settings: Any
) -> float:
    """Return seconds per step of training with a Trainer, without set-up and the first ``skip`` steps."""
    watch = Stopwatch(skip)
    trainer = L.Trainer(
        max_steps=steps + skip, callbacks=[watch, *callbacks], enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, limit_val_batches=0, **{"accelerator": "cpu", "logger": False} | settings,
    )  # fmt: skip
    trainer.fit(model, data)
    return watch.seconds / steps


def endless(loader: Any) -> Iterator[Any]:
    """Yield batches of endless epochs."""
    for epoch in count():
        loader.sampler.set_epoch(epoch)
        yield from loader


def plain_loop(method: BarlowTwins, steps: int, data: TwoViewDataModule) -> float:
    """Return seconds per step of the same training in a plain loop, without the first step."""
    optimizer = torch.optim.SGD(method.parameters(), lr=1e-3, momentum=0.9)
    start = 0.0
    for x1, x2, _ in islice(endless(data.train_dataloader()), 1 + steps):
        loss = method.loss(method(x1), method(x2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        start = start or time.perf_counter()
    return (time.perf_counter() - start) / steps


def probe(method: BarlowTwins, data: TwoViewDataModule) -> float:
    """Return seconds to embed the 256 probe pairs."""
    pairs = data.probe_pairs()
    start = time.perf_counter()
    capture(method, pairs, [""])
    return time.perf_counter() - start


def step_overhead(
    backbone: str, size: int, steps: int, rounds: int, limit: float | None, minimal: bool = False
) -> tuple[bool, float, float]:
    """Check our step relative to a plain loop; return the verdict and the seconds of our step and of the probe."""
    data = photographs(size)
    timed: dict[str, Callable[[], float]] = {
        "plain": lambda: plain_loop(new_module(backbone), steps, data),
        "ours": lambda: train(new_module(backbone), steps, data),
        "probe": lambda: probe(new_module(backbone), data),
    }
    if minimal:
        timed["minimal"] = lambda: train(MinimalModule(new_module(backbone)), steps, data)
    seconds = alternate(timed, rounds)
    plain, ours = statistics.median(seconds["plain"]), statistics.median(seconds["ours"])
    print(f"\n{backbone} at {size}×{size}, {BATCH} pairs; plain step {1e3 * plain:.1f} ms", flush=True)
    overhead = ratio(seconds["ours"], seconds["plain"])
    ok = check(f"our step / plain step ({1e3 * plain * (overhead - 1):+.1f} ms)", overhead, limit)
    if minimal:
        overhead = ratio(seconds["minimal"], seconds["plain"])
        check(f"minimal LightningModule / plain step ({1e3 * plain * (overhead - 1):+.1f} ms)", overhead)
    return ok, ours, ours * ratio(seconds["probe"], seconds["ours"])


def logging_costs(dim: int, measurements: int) -> tuple[float, float]:
    """Return seconds of a measurement of 256 pairs, without the forward pass, and of writing files and figures."""
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(256, dim, generator=generator) / torch.arange(1, dim + 1)
    z2 = z1 + 0.1 * torch.randn(256, dim, generator=generator) / torch.arange(1, dim + 1)
    spectra = TimedLogger(probe=(z1, z2), num_points=100 * measurements)  # at every step
    loader = DataLoader(TensorDataset(torch.ones(measurements, dim)))
    with TemporaryDirectory() as directory:
        train(
            ScaledInputs(dim), measurements, loader, spectra,
            skip=0, logger=TensorBoardLogger(directory), log_every_n_steps=1,
        )  # fmt: skip
    assert len(spectra.record) == measurements + 1
    measurement = spectra.seconds / measurements
    return measurement, max(spectra.final - measurement, 0.0)


def logging_share(step: float, forward: float, measurements: int) -> bool:
    """Check spectrum logging relative to training, given seconds of a step and of embedding the probe."""
    points = len(log_spaced_steps(RUN_STEPS, SpectrumLogger().num_points))
    print(f"\nspectrum logging / training, {RUN_STEPS} steps, {points} measurements of 256 pairs; "
          f"embedding them takes {forward / step:.2f} steps of {BATCH} pairs")  # fmt: skip
    ok = True
    for dim, limit in ((64, 0.01), (512, 0.01), (2048, 0.03)):
        measurement, figures = logging_costs(dim, measurements)
        share = points * (forward + measurement + figures) / (RUN_STEPS * step)
        case = f"{dim} dimensions (spectra {1e3 * measurement:.0f} ms, figures {1e3 * figures:.0f} ms)"
        ok &= check(f"{case}, {RUN_PAIRS} pairs per step", share * BATCH / RUN_PAIRS, limit)
        check(f"{case}, {BATCH} pairs per step", share)
    return ok


def throughput(accelerator: str, backbone: str, pairs: int, precision: str, steps: int, workers: int) -> None:
    """Print images per second, utilisation and logging overhead of mixed-precision training."""
    # Epochs as long as CIFAR-10's; the first steps tune kernels.
    data = photographs(32, pairs, copies=max(1, 100 * pairs // 2190), num_workers=workers)
    settings: dict[str, Any] = {"accelerator": accelerator, "precision": precision, "devices": 1, "skip": 4}
    busy: list[int] = []
    done = threading.Event()
    sampler = threading.Thread(target=sample_utilization, args=(busy, done))
    sampler.start()
    unlogged = train(new_module(backbone), steps, data, **settings)
    done.set()
    sampler.join()
    with TemporaryDirectory() as directory:
        spectra = SpectrumLogger(num_points=100 * steps)  # at every step
        settings |= {"logger": TensorBoardLogger(directory), "log_every_n_steps": 1}
        logged = train(new_module(backbone), steps, data, spectra, **settings)
    used = f"{statistics.median(busy):.0f} %" if busy else "not measured (on a GPU: pip install nvidia-ml-py)"
    print(f"\n{backbone} at 32×32, {pairs} pairs, {precision}, {workers} workers: "
          f"{2 * pairs / unlogged:.0f} images/s, GPU utilisation {used}")  # fmt: skip
    points = len(log_spaced_steps(RUN_STEPS, SpectrumLogger().num_points))
    check(
        f"spectrum logging without figures / training, {RUN_STEPS} steps",
        points * (logged - unlogged) / (RUN_STEPS * unlogged),
    )


def sample_utilization(busy: list[int], done: threading.Event) -> None:
    """Append the GPU's utilisation in per cent ten times a second until ``done`` is set."""
    while torch.cuda.is_available() and not done.wait(0.1):
        try:
            busy.append(torch.cuda.utilization())
        except ModuleNotFoundError:
            return


def main() -> int:
    """Print the ratios; return 1 if one misses its limit."""
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--smoke", action="store_true", help="use tiny settings on the CPU, as a smoke test")
    options = parser.parse_args()
    quiet_lightning()
    torch.set_num_threads(1)
    print(f"{machine()}; medians of rounds")
    if options.smoke:
        ok, step, forward = step_overhead("resnet_small", 16, 2, 1, 1.05, minimal=True)
        ok &= logging_share(step, forward, 2)
        throughput("cpu", "resnet_small", 4, "bf16-mixed", steps=2, workers=0)
        return 0 if ok else 1
    ok, step, forward = step_overhead("resnet18", 32, 1, (options.rounds + 1) // 2, 1.05)
    ok &= logging_share(step, forward, 20)
    step_overhead("resnet_small", 16, 10, 2 * options.rounds, None, minimal=True)
    if torch.cuda.is_available():
        for precision in ("16-mixed", "bf16-mixed"):
            throughput("gpu", "resnet50", 512, precision, steps=40, workers=8)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
