"""Trained networks on a GPU with inputs and outputs on the CPU."""

import torch
from pretend_gpu import PretendGPU, is_on_device

from stepwise_lightning.encoders import MLP
from stepwise_lightning.trained import OnAccelerator


def test_network_runs_on_the_gpu_between_tensors_on_the_cpu():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    expected = MLP(4, [3], 2, seed=0)(x)
    for kind in ("cuda", "mps"):
        with PretendGPU(kind):
            for accelerator in ("auto", "gpu", "cpu"):
                network = OnAccelerator(MLP(4, [3], 2, seed=0), accelerator)
                output = network(x.requires_grad_())
                assert is_on_device(network.module[1].weight) == (accelerator != "cpu")
                assert not is_on_device(output) and torch.equal(output, expected)
                assert not is_on_device(torch.autograd.grad(output.sum(), x)[0])
