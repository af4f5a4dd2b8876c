"""CPU runs on a machine whose GPU cannot be used, files saved on a GPU, and torch's default device."""

from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
from pretend_gpu import PretendGPU
from test_precision import pairs
from tiny_runs import changed, stepwise, write_images
from torch import nn

from stepwise_lightning import MLP, Encoder, LinearEncoder, Projector, ResNet, load_encoder, scale_last_layer
from stepwise_lightning.data import crop_pairs
from stepwise_lightning.runs import provenance
from stepwise_lightning.theory import ContrastiveKernelPCA, rbf_kernel

KERNEL = partial(rbf_kernel, length_scale=5.0)


@contextmanager
def visible_gpu():
    """Pretend that CUDA is available and every use fails, as with a GPU in exclusive mode and in use."""

    def fail(*arguments):
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")

    cuda = dict(is_available=lambda: True, device_count=lambda: 1, is_initialized=lambda: False, _lazy_init=fail)
    cuda |= dict(get_rng_state=fail, get_device_name=fail)
    # Lightning's sanity check and torch's Adam use a visible GPU themselves, on every accelerator.
    sanity_check = mock.patch.object(torch.cuda, "get_rng_state_all", lambda: [])
    check = next(name for name in dir(torch.optim.Optimizer) if name.endswith("_graph_capture_health_check"))
    adam = mock.patch.object(torch.optim.Optimizer, check, lambda optimizer: None)
    with sanity_check, adam, mock.patch.multiple(torch.cuda, **cuda):
        yield


@contextmanager
def saving_on_gpu():
    """Save files with the locations of CUDA tensors."""
    with mock.patch.object(torch.serialization, "location_tag", lambda storage: "cuda:0"):
        yield


@pytest.mark.filterwarnings("ignore:GPU available but not used")
def test_cpu_run_does_not_initialise_cuda(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path)
    callbacks = [
        {"class_path": f"stepwise_lightning.{name}", "init_args": settings}
        for name, settings in {
            "SpectrumLogger": {}, "OnlineLinearProbe": {"watch": "encoder"}, "OnlineKNN": {"watch": "encoder", "k": 2},
            "LastCheckpoint": {"every_n_train_steps": 1},
        }.items()
    ]  # fmt: skip
    config = changed({"trainer.callbacks": callbacks})
    with visible_gpu():
        stepwise("fit", config=config)
        stepwise("fit", "--ckpt_path=last", "--trainer.max_steps=3", config=config)
        assert provenance()["machine"]["gpu"] is None


def test_kernel_model_saved_on_a_gpu_loads_on_the_cpu(tmp_path):
    x1, x2 = pairs()
    model = ContrastiveKernelPCA(KERNEL, 2).fit(x1, x2)
    with saving_on_gpu():
        model.save(tmp_path / "model.pt")
    for options in ({}, {"device": "mps"}):  # which has no float64
        loaded = ContrastiveKernelPCA.load(tmp_path / "model.pt", KERNEL, **options)
        torch.testing.assert_close(loaded.transform(x2), model.transform(x2), rtol=0, atol=0)


def test_run_of_a_gpu_resumes_and_loads_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path)
    with saving_on_gpu():
        stepwise("fit")
    (folder,) = (path.parent for path in tmp_path.glob("runs/**/config.yaml"))
    assert load_encoder(folder)(torch.zeros(1, 3, 4, 4)).shape == (1, 3)
    stepwise("fit", "--ckpt_path=last", "--trainer.max_steps=3")


MODULES = {
    "LinearEncoder": lambda: LinearEncoder(12, 3, seed=1),
    "LinearEncoder with init_std": lambda: LinearEncoder(12, 3, init_std=0.1),
    "MLP": lambda: MLP(12, [4], 3),
    "Projector": lambda: Projector(12, 3, depth=2, hidden_features=4),
    "ResNet": lambda: ResNet(seed=2),
    "Encoder": lambda: Encoder(3, alpha=0.1, bias_norm=1.0),
    "scale_last_layer": lambda: scale_last_layer(nn.Sequential(MLP(12, [4], 3)), 0.1, 1.0, seed=3),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("kind", ["cuda", "mps", "meta"])
def test_weights_do_not_depend_on_the_default_device(kind, name):
    expected = MODULES[name]().state_dict()
    with PretendGPU("cuda" if kind == "meta" else kind) as gpu:
        state = torch.get_rng_state()
        with torch.device(kind):
            module = MODULES[name]()
        assert torch.equal(torch.get_rng_state(), state)
        assert not gpu.draws
        assert {value.device.type for value in module.state_dict().values()} == {kind}
        found = {} if kind == "meta" else {name: value.cpu() for name, value in module.state_dict().items()}
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_draws_of_pairs_do_not_depend_on_the_default_device(kind):
    x1, x2 = pairs()
    images = torch.randint(0, 256, (12, 3, 9, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crops = crop_pairs(images, 5, 6, seed=0)
    with PretendGPU(kind), torch.device(kind):
        for found, expected in zip(crop_pairs(images, 5, 6, seed=0), crops, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
