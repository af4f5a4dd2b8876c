"""Spectra of Lightning's demo modules, its GAN example and torchvision models."""

from collections import OrderedDict
from importlib import import_module

import pytest
import torch
import torchmetrics
import torchvision
from attached import PACKAGES, QUIET, check
from torch import nn
from torch.nn.functional import binary_cross_entropy, cross_entropy, nll_loss
from torch.utils.data import DataLoader, TensorDataset

from stepwise_lightning import SpectrumLogger

pytestmark = [pytest.mark.parametrize("package", PACKAGES), *QUIET]


def demos(package, name):
    return import_module(f"{'lightning.pytorch' if package == 'lightning' else package}.demos.{name}")


def own_output():
    return [(SpectrumLogger(), {"": lambda module, x: module(x)})]


# ---- demos ----


@pytest.mark.parametrize("name", ["BoringModel", "ManualOptimBoringModel", "DemoModel"])
def test_boring_model(name, package, tmp_path):
    boring = demos(package, "boring_classes")
    build = getattr(boring, name)

    def loader():
        return DataLoader(boring.RandomDataset(32, 64), batch_size=8, shuffle=True)

    check(PACKAGES[package], build, loader, tmp_path, own_output(), 16, lambda batch: [batch], limit_val_batches=2)


@pytest.mark.parametrize("data", ["BoringDataModule", "BoringDataModuleNoLen"])
def test_batches_of_one_sample_with_a_larger_probe(data, package, tmp_path):
    boring, probe = demos(package, "boring_classes"), torch.randn(20, 32)
    attached = [(SpectrumLogger(probe=probe), {"": lambda module, x: module(x)})]
    options = {"max_steps": 40, "max_epochs": -1, "limit_val_batches": 1}
    check(PACKAGES[package], boring.BoringModel, getattr(boring, data), tmp_path, attached, 40, [probe], **options)


TOKENS = torch.randint(50, (24, 7), generator=torch.Generator().manual_seed(0))


def token_batches():
    return DataLoader(TensorDataset(TOKENS[:, :-1], TOKENS[:, 1:]), batch_size=8, shuffle=True)


def nothing():
    """Replace the download of a text."""


def log_probabilities(module, tokens):
    return module(tokens, tokens).view(len(tokens), -1)


def states(module, tokens):
    return module.model.rnn(module.model.encoder(tokens))[0]


def test_transformer_on_tokens(package, tmp_path):
    watched = {"model.embedding": lambda module, x: module.model.embedding(x), "log_probabilities": log_probabilities}
    logger = SpectrumLogger(watch=["model.embedding", log_probabilities], output=False)

    def build():
        module = demos(package, "transformer").LightningTransformer(vocab_size=50)
        module.prepare_data = nothing
        return module

    # Tokens and targets have the same shape, so the logger treats them as two views.
    check(PACKAGES[package], build, token_batches, tmp_path, [(logger, watched)], 6, lambda batch: batch)


def test_stateful_lstm(package, tmp_path):
    watched = {"model.encoder": lambda module, x: module.model.encoder(x), "states": states}
    logger = SpectrumLogger(watch=["model.encoder", states], output=False)
    lstm = demos(package, "lstm")

    def build():
        module = lstm.LightningLSTM(vocab_size=50)
        module.model = lstm.SimpleLSTM(vocab_size=50, ninp=12, nhid=12, nlayers=2)
        module.prepare_data = nothing
        return module

    check(PACKAGES[package], build, token_batches, tmp_path, [(logger, watched)], 6, lambda batch: batch)


# ---- Lightning's example of a GAN ----

LATENT, SHAPE = 6, (1, 8, 8)


class Generator(nn.Module):
    """The example with narrower layers."""

    def __init__(self):
        super().__init__()

        def block(width, out, normalize=True):
            return [
                nn.Linear(width, out), *([nn.BatchNorm1d(out, 0.8)] if normalize else []),
                nn.LeakyReLU(0.2, inplace=True),
            ]  # fmt: skip

        self.model = nn.Sequential(*block(LATENT, 12, False), *block(12, 24), nn.Linear(24, 64), nn.Tanh())

    def forward(self, z):
        return self.model(z).view(z.size(0), *SHAPE)


class Discriminator(nn.Module):
    """The example with narrower layers."""

    def __init__(self):
        super().__init__()
        hidden = [
            nn.Linear(64, 24),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(24, 12),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        self.model = nn.Sequential(*hidden, nn.Linear(12, 1), nn.Sigmoid())

    def forward(self, img):
        return self.model(img.view(img.size(0), -1))


def gan(package):
    class GAN(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.discriminator = Generator(), Discriminator()

        def forward(self, z):
            return self.generator(z)

        def training_step(self, batch):
            imgs, _ = batch
            optimizer_g, optimizer_d = self.optimizers()
            z = torch.randn(imgs.shape[0], LATENT).type_as(imgs)

            self.toggle_optimizer(optimizer_g)
            valid, fake = torch.ones_like(imgs[:, 0, 0, :1]), torch.zeros_like(imgs[:, 0, 0, :1])
            g_loss = binary_cross_entropy(self.discriminator(self(z)), valid)
            self.log("g_loss", g_loss, prog_bar=True)
            self.manual_backward(g_loss)
            optimizer_g.step()
            optimizer_g.zero_grad()
            self.untoggle_optimizer(optimizer_g)

            self.toggle_optimizer(optimizer_d)
            real_loss = binary_cross_entropy(self.discriminator(imgs), valid)
            fake_loss = binary_cross_entropy(self.discriminator(self(z).detach()), fake)
            d_loss = (real_loss + fake_loss) / 2
            self.log("d_loss", d_loss, prog_bar=True)
            self.manual_backward(d_loss)
            optimizer_d.step()
            optimizer_d.zero_grad()
            self.untoggle_optimizer(optimizer_d)

        def configure_optimizers(self):
            opt_g = torch.optim.Adam(self.generator.parameters(), lr=0.002, betas=(0.5, 0.999))
            opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=0.001, betas=(0.5, 0.999))
            return [opt_g, opt_d], []

    return GAN()


def images(shape, count=24, classes=5):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(count, *shape, generator=generator)
    return lambda: DataLoader(TensorDataset(pictures, torch.arange(count) % classes), batch_size=8, shuffle=True)


def test_gan_with_manual_optimization(package, tmp_path):
    latents = torch.randn(16, LATENT, generator=torch.Generator().manual_seed(1))
    generator = SpectrumLogger(probe=latents)
    build, loader = (lambda: gan(PACKAGES[package])), images(SHAPE)
    # Two optimizers, three batches, two epochs.
    attached = [(generator, {"": lambda module, z: module.generator(z)})]
    check(PACKAGES[package], build, loader, tmp_path, attached, 12, [latents])
    assert generator.record.losses.isnan().all()
    assert float(generator.record.times[-1]) == pytest.approx(6 * 0.002, rel=1e-12)
    discriminator = SpectrumLogger(watch=["discriminator.model.2"], output=False)
    with pytest.raises(ValueError, match="cannot run on a view of shape"):
        check(PACKAGES[package], build, loader, tmp_path, [(discriminator, {})], 12)
    features = SpectrumLogger(watch=[discriminator_features, "discriminator"], output=False)
    watched = {
        "discriminator_features": discriminator_features,
        "discriminator": lambda module, img: module.discriminator(img),
    }
    check(PACKAGES[package], build, loader, tmp_path, [(features, watched)], 12, lambda batch: batch[:1])


def discriminator_features(module, img):
    return module.discriminator.model[:3](img.flatten(1))


# ---- classifiers ----


def classifier(package, model, loss=cross_entropy, rate=0.05):
    class Classifier(package.LightningModule):
        """Classifier with a metric of torchmetrics, which has a state."""

        def __init__(self):
            super().__init__()
            self.model, self.loss = model(), loss
            self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)

        def forward(self, x):
            return self.model(x)

        def training_step(self, batch, batch_idx):
            x, y = batch
            scores = self(x)
            self.accuracy(scores, y)
            self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
            loss = self.loss(scores, y)
            self.log("loss", loss)
            return OrderedDict(loss=loss, scores=scores.detach())

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=rate, momentum=0.9)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)}

    return Classifier()


def vit():
    options = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24, "dropout": 0.1}
    return torchvision.models.VisionTransformer(image_size=32, patch_size=8, num_classes=10, **options)


MODELS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), "avgpool"),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=10), "avgpool"),
    "shufflenet_v2_x0_5": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10), "conv5"),
    "vision_transformer": (vit, "encoder.ln"),
}


@pytest.mark.parametrize("name", MODELS)
def test_torchvision_model(name, package, tmp_path):
    model, part = MODELS[name]
    if part == "encoder.ln":
        watched = {"": lambda module, x: module(x)}
        attached = [(SpectrumLogger(), watched)]
    else:
        attached = [
            (SpectrumLogger(watch=[f"model.{part}"]), {"": lambda module, x: module(x), f"model.{part}": hooked(part)})
        ]
    build = lambda: classifier(PACKAGES[package], model)  # noqa: E731
    check(PACKAGES[package], build, images((3, 32, 32)), tmp_path, attached, 6, lambda batch: batch[:1])


def hooked(part):
    """Return a function from module and view to the activations of a submodule."""

    def embed(module, view):
        outputs = []
        handle = module.model.get_submodule(part).register_forward_hook(
            lambda *arguments: outputs.append(arguments[-1])
        )
        module(view)
        handle.remove()
        return outputs[0]

    return embed


def test_mnist_network_of_the_demo(package, tmp_path):
    """Spectra of a network with dropout."""
    net = demos(package, "boring_classes").Net
    build = lambda: classifier(PACKAGES[package], net, nll_loss, 0.001)  # noqa: E731
    attached = [(SpectrumLogger(), {"": lambda module, x: module(x)})]
    check(PACKAGES[package], build, images((1, 28, 28)), tmp_path, attached, 6, lambda batch: batch[:1])
