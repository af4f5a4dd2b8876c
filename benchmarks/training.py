"""What watching and Lightning cost when networks are trained, as ratios measured in one run: ``make benchmark``.

1. Spectrum logging, all of it, as a share of training time: limit 1 % for 64 and 512 dimensions, 3 % for 2048, over
   5000 steps of 512 pairs, the shortest run that the GPU configurations are meant for. A step and a measurement (256
   pairs, the default) are timed with ResNet-18 at 32×32; a step is timed with 64 pairs, and counts eight times.
2. A training step with our module, data and Trainer against a bare loop over the same encoder, loss and loader:
   ResNet-18 at 32×32 (limit 1.05), and the small ResNet at 16×16, whose steps are so short that the overhead shows.
3. Images per second of two augmented views against lightly's transforms of equal strength (at least 1).
4. Where there is a GPU: ResNet-50 at 32×32, 512 pairs, mixed precision: images per second, utilisation, logging.

Competitors alternate, and medians over the rounds are compared, so that drift of the machine cancels.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from timing import Stopwatch, within
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from reproduce.common import quiet_lightning
from stepwise_lightning import BarlowTwins, SpectrumLogger, TwoViewDataModule
from stepwise_lightning.encoders import Encoder
from stepwise_lightning.schedule import log_spaced_steps

RUN_STEPS, RUN_PAIRS = 5000, 512


class TimedLogger(SpectrumLogger):
    """A SpectrumLogger that adds up the time spent in its own hooks."""

    seconds = final = 0.0

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Time what is done before a step."""
        start = time.perf_counter()
        super().on_train_batch_start(*arguments)
        self.seconds += time.perf_counter() - start

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Time what is done after a step."""
        start = time.perf_counter()
        super().on_train_batch_end(*arguments)
        self.seconds += time.perf_counter() - start

    def on_train_end(self, *arguments: Any) -> None:
        """Time what is done at the end: the last measurement, files and figures."""
        start = time.perf_counter()
        super().on_train_end(*arguments)
        self.final = time.perf_counter() - start


class Plain(L.LightningModule):
    """The same step, written as in Lightning's tutorials: what Lightning costs without us."""

    def __init__(self, module: BarlowTwins) -> None:
        super().__init__()
        self.encoder, self.method = module.encoder, [module]  # a list hides it from Lightning

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return self.method[0].loss(self.encoder(batch[0]), self.encoder(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the same SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def module(backbone: str, dim: int = 64) -> BarlowTwins:
    """Return the analytical model from a small start."""
    encoder = Encoder(dim, backbone, alpha=1e-3)
    return BarlowTwins(encoder, 1e-3, momentum=0.9, off_diagonal_weight=1.0, normalize=False, center=True)


def photographs(image_size: int, batch: int, **settings: Any) -> TwoViewDataModule:
    """Return the bundled photographs as two views."""
    data = TwoViewDataModule("photos", image_size=image_size, global_batch_size=batch, **settings)
    data.setup("fit")
    return data


def train(model: L.LightningModule, data: TwoViewDataModule, steps: int, **settings: Any) -> float:
    """Return seconds of training through a Trainer, set-up left out."""
    watch = Stopwatch()
    settings = {"accelerator": "cpu", "logger": False} | settings
    callbacks = [watch, *settings.pop("callbacks", [])]
    trainer = L.Trainer(
        max_steps=steps, callbacks=callbacks, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, limit_val_batches=0, **settings,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    return watch.seconds


def bare_loop(method: BarlowTwins, data: TwoViewDataModule, steps: int) -> float:
    """Return seconds of the same training in a plain loop."""
    optimizer = method.configure_optimizers()
    batches = iter(data.train_dataloader())
    start = time.perf_counter()
    for _ in range(steps):
        x1, x2, _ = next(batches)
        loss = method.loss(method(x1), method(x2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def medians(timed: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Run all in turn, so many times, after one round to warm up; return the medians."""
    results = [{name: run() for name, run in timed.items()} for _ in range(rounds + 1)][1:]
    return {name: statistics.median(result[name] for result in results) for name in timed}


def logging_costs(dim: int, steps: int, **settings: Any) -> tuple[float, float, float]:
    """Return seconds of a training step, of a measurement, and of the files and figures at the end."""
    backbone, batch, size = (settings.pop(name) for name in ("backbone", "batch", "image_size"))
    with TemporaryDirectory() as directory:
        spectra = TimedLogger(num_points=steps + 2)
        logger = TensorBoardLogger(directory)
        data = photographs(size, batch)
        seconds = train(module(backbone, dim), data, steps, logger=logger, callbacks=[spectra], **settings)
    measurement = spectra.seconds / (len(spectra.steps) - 1)
    return (seconds - spectra.seconds) / steps, measurement, max(spectra.final - measurement, 0.0)


def logging_share(steps: int) -> bool:
    """Print the share of training time that spectra take."""
    points = len(log_spaced_steps(RUN_STEPS, SpectrumLogger().num_points))
    print(f"\nspectrum logging / training, {RUN_STEPS} steps of {RUN_PAIRS} pairs, {points} measurements of 256 pairs")
    ok = True
    for dim, limit in ((64, 0.01), (512, 0.01), (2048, 0.03)):
        step, measurement, final = logging_costs(dim, steps, backbone="resnet18", batch=64, image_size=32)
        cost = points * measurement + final
        ok &= within(f"{dim} dimensions", cost / (RUN_STEPS * step * RUN_PAIRS / 64), limit)
        within(f"{dim} dimensions, at 64 pairs a step (one measurement / one step: {measurement / step:.2f})",
               cost / (RUN_STEPS * step))  # fmt: skip
    return ok


def step_overhead(rounds: int, tiny_steps: int, steps: int) -> bool:
    """Print our training step against a bare loop."""
    ok = True
    for backbone, size, count, limit in (("resnet18", 32, steps, 1.05), ("resnet_small", 16, tiny_steps, None)):
        data = photographs(size, 64)
        timed = {
            "bare": lambda b=backbone, d=data, n=count: bare_loop(module(b), d, n),
            "ours": lambda b=backbone, d=data, n=count: train(module(b), d, n),
            "plain": lambda b=backbone, d=data, n=count: train(Plain(module(b)), d, n),
        }
        seconds = {name: value / count for name, value in medians(timed, rounds).items()}
        print(f"\n{backbone} at {size}×{size}, 64 pairs; bare step {1e3 * seconds['bare']:.1f} ms, "
              f"ours {1e3 * (seconds['ours'] - seconds['bare']):+.1f} ms, "
              f"plain Lightning {1e3 * (seconds['plain'] - seconds['bare']):+.1f} ms")  # fmt: skip
        ok &= within("our step / bare step", seconds["ours"] / seconds["bare"], limit)
    return ok


class TheirViews(Dataset[Any]):
    """The same photographs through a transform of lightly's, which returns the views of one image."""

    def __init__(self, data: TwoViewDataModule, transform: Callable[[Any], list[Tensor]]) -> None:
        self.images, self.transform = data._images("train"), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x1, x2 = self.transform(self.images.picture(index))
        return x1, x2, int(self.images.labels[index])


def their_loader(data: TwoViewDataModule, size: int, workers: int) -> DataLoader[Any] | None:
    """Return lightly's pipeline with the strengths of our standard augmentation; None where it is not installed."""
    try:
        from lightly.transforms import SimCLRTransform
    except ImportError:
        return None
    transform = SimCLRTransform(
        input_size=size, cj_prob=0.8, cj_strength=1.0, cj_bright=0.4, cj_contrast=0.4, cj_sat=0.2, cj_hue=0.1,
        min_scale=0.2, random_gray_scale=0.2, gaussian_blur=0.5, sigmas=(0.1, 2.0), vf_prob=0.0, hf_prob=0.5,
        rr_prob=0.0, normalize={"mean": list(data.mean), "std": list(data.std)},
    )  # fmt: skip
    return DataLoader(TheirViews(data, transform), 64, shuffle=True, drop_last=True, num_workers=workers)


def seconds_over(loader: Any, batches: int, network: nn.Module | None) -> float:
    """Return seconds for so many batches, trained on where there is a network."""
    iterator = iter(loader)
    next(iterator)  # workers have started
    start = time.perf_counter()
    for _ in range(batches):
        x1, x2, _ = next(iterator)
        if network is not None:
            network(torch.cat([x1, x2])).square().mean().backward()
    return time.perf_counter() - start


def against_lightly(rounds: int, batches: int) -> bool:
    """Print images per second, ours over theirs."""
    ok = True
    for workers in (0, 2):
        ours = photographs(32, 64, num_workers=workers)
        theirs = their_loader(ours, 32, workers)
        if theirs is None:
            print("\nnot compared: lightly is not installed (pip install -e '.[peers]')")
            return True
        print(f"\nimages per second, ours / lightly's; 32×32, standard augmentation, {workers} workers")
        for name, network in (("loader alone", None), ("with the small ResNet", Encoder(64))):
            timed = {
                "ours": lambda d=ours, n=network: seconds_over(d.train_dataloader(), batches, n),
                "theirs": lambda t=theirs, n=network: seconds_over(t, batches, n),
            }
            seconds = medians(timed, rounds)
            ok &= within(name, seconds["theirs"] / seconds["ours"], 1.0, least=True)
    return ok


def throughput(accelerator: str, backbone: str, pairs: int, precision: str, steps: int, workers: int) -> None:
    """Print images per second, utilisation and logging overhead of mixed-precision training."""
    data = photographs(32, pairs, num_workers=workers)
    settings: dict[str, Any] = {"accelerator": accelerator, "precision": precision, "devices": 1}
    train(module(backbone), data, steps, **settings)  # warm up
    seconds = train(module(backbone), data, steps, **settings)
    try:
        busy = f"{torch.cuda.utilization()} %" if accelerator == "gpu" else "not measured"
    except ModuleNotFoundError:
        busy = "not measured (pip install nvidia-ml-py)"
    step, measurement, final = logging_costs(
        64, steps, backbone=backbone, batch=pairs, image_size=32, **settings
    )  # fmt: skip
    points = len(log_spaced_steps(RUN_STEPS, SpectrumLogger().num_points))
    print(f"\n{backbone} at 32×32, {pairs} pairs, {precision}, {workers} workers: "
          f"{2 * pairs * steps / seconds:.0f} images/s, GPU utilisation at the end: {busy}")  # fmt: skip
    within(f"spectrum logging / training, {RUN_STEPS} steps", (points * measurement + final) / (RUN_STEPS * step))


def main() -> int:
    """Print the ratios; return 1 if one misses its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed (default: 5)")
    parser.add_argument("--steps", type=int, default=4, help="steps of ResNet-18 a round (default: 4)")
    parser.add_argument("--tiny-steps", type=int, default=60, help="steps of the small ResNet a round (default: 60)")
    options = parser.parse_args()
    quiet_lightning()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of rounds")
    ok = logging_share(options.steps)
    ok &= step_overhead(options.rounds, options.tiny_steps, options.steps)
    ok &= against_lightly(options.rounds, batches=10)
    if torch.cuda.is_available():
        throughput("gpu", "resnet50", 512, "bf16-mixed", steps=4, workers=8)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
