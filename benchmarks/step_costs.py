"""Count memory, operations and bytes of a training step of each GPU configuration, without a GPU.

The step runs on tensors without values (``FakeTensorMode``): forward passes of both views under autocast, the loss on
the global batch, the backward pass and SGD. Not counted: callbacks, communication, views. Columns of the table:

- weights: bytes of parameters, gradients, momentum and buffers;
- peak: largest number of bytes of live tensors, without workspaces of cuDNN and fragmentation of the allocator;
- FLOPs: two for each multiply-add of convolutions and matrix products;
- traffic: bytes that the operations read and write, without fusion.

``python benchmarks/step_costs.py`` prints the table of docs/costs.md.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from stepwise_lightning import BarlowTwins, Encoder, SimCLR, VICReg
from stepwise_lightning.modules import JointEmbedding

CONFIGS = Path(__file__).parent.parent / "configs"
METHODS: dict[str, type[JointEmbedding]] = {"barlow_twins": BarlowTwins, "vicreg": VICReg, "simclr": SimCLR}
NUM_GPUS = {"cifar10": 1, "stl10": 1, "imagenet": 8}
NAMES = [f"{loss}_{data}" for data in NUM_GPUS for loss in METHODS]
COLUMNS = ("configuration", "GPUs", "pairs per GPU", "precision", "weights", "peak", "FLOPs", "traffic")


class ByteCounter(TorchDispatchMode):
    """Count the bytes of live tensors, and the bytes that operations read and write.

    Attributes:
        live: bytes of live tensors that were tracked or created.
        peak: largest value of ``live``.
        traffic: bytes of the inputs and outputs of all operations except views.

    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.traffic = 0
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def track(self, tensors: Iterable[Tensor]) -> None:
        """Count the storage of each tensor until it is freed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self._storages:
                self._storages.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def _free(self, num_bytes: int) -> None:
        self.live -= num_bytes

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        result = function(*args, **kwargs or {})
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not function.is_view:
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.traffic += sum(tensor.numel() * tensor.element_size() for tensor in inputs + outputs)
        self.track(outputs)
        return result


def step_costs(module: JointEmbedding, view_shape: tuple[int, ...], num_gpus: int, precision: str) -> dict[str, int]:
    """Return the costs of one training step on a GPU, out of ``num_gpus``, for views of shape (n, …).

    The second of two steps is counted, after the momentum exists.
    """
    with FakeTensorMode():
        _without_values(module)
        views = [torch.empty(view_shape), torch.empty(view_shape)]
        optimizer = module.configure_optimizers()
        assert isinstance(optimizer, torch.optim.Optimizer)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                # As many rows as the embeddings gathered from all GPUs.
                z1, z2 = (torch.cat([module(view)] * num_gpus).float() for view in views)
                with torch.autocast("cpu", enabled=False):
                    loss = module.loss(z1, z2)
            loss.backward()
            optimizer.step()

        step()
        counter, flops = ByteCounter(), FlopCounterMode(display=False)
        state = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        weights = [*module.parameters(), *module.buffers(), *state]
        counter.track([*weights, *views])
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        counter.track(gradients)
        fixed = sum(tensor.numel() * tensor.element_size() for tensor in [*weights, *gradients])
        del gradients, state, weights
        with flops, counter:
            step()
    return {"weights": fixed, "peak": counter.peak, "FLOPs": flops.get_total_flops(), "traffic": counter.traffic}


def _without_values(module: nn.Module) -> None:
    """Replace parameters and buffers by tensors of the active FakeTensorMode."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
                    tensors[name] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake


def configured(name: str) -> tuple[JointEmbedding, tuple[int, ...]]:
    """Return the module of ``configs/<name>.yaml`` and the shape of a view on one GPU."""
    config: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    settings = config["model"]["init_args"]
    encoder = Encoder(**settings.pop("encoder")["init_args"])
    loss, _, data = name.rpartition("_")
    size, batch = (config["data"]["init_args"][key] for key in ("image_size", "global_batch_size"))
    return METHODS[loss](encoder, **settings), (batch // NUM_GPUS[data], 3, size, size)


def main() -> None:
    """Print a row of the table for each configuration and precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], metavar="NAME", help=", ".join(NAMES))
    for row in (COLUMNS, ["---"] * len(COLUMNS)):
        print("| " + " | ".join(row) + " |")
    for name in parser.parse_args().names or NAMES:
        num_gpus = NUM_GPUS[name.rpartition("_")[2]]
        for precision in ("32-true", "bf16-mixed"):
            module, shape = configured(name)
            costs = step_costs(module, shape, num_gpus, precision)
            units = [
                f"{costs[key] / unit:.3g} {suffix}"
                for key, unit, suffix in (
                    ("weights", 1e9, "GB"), ("peak", 1e9, "GB"), ("FLOPs", 1e12, "T"), ("traffic", 1e9, "GB")
                )
            ]  # fmt: skip
            print("| " + " | ".join([name, str(num_gpus), str(shape[0]), precision, *units]) + " |", flush=True)


if __name__ == "__main__":
    main()
