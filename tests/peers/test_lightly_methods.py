"""Spectra of the methods in lightly's examples, built from its heads, losses and transforms."""

import pytest
from attached import PACKAGES, QUIET, check, write_photographs
from lightly.data import LightlyDataset
from lightly.transforms import (
    BYOLTransform,
    BYOLView1Transform,
    BYOLView2Transform,
    DINOTransform,
    FastSiamTransform,
    MAETransform,
    MoCoV2Transform,
    SimCLRTransform,
    SimSiamTransform,
    SwaVTransform,
    VICRegTransform,
)
from lightly_modules import SIZE, barlow_twins, mae, nnclr, simclr, simclr_without_batch_norm, simsiam, swav, vicreg
from lightly_momentum_modules import byol, dino, moco, tico
from torch.utils.data import DataLoader

from stepwise_lightning import SpectrumLogger

pytestmark = QUIET


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return str(write_photographs(tmp_path_factory.mktemp("photographs")))


def projections(module, view):
    return module(view)[0]


def keys(module, view):
    return module.forward_momentum(view)


def whole():
    return [
        (
            SpectrumLogger(watch=["backbone"]),
            {"": lambda module, x: module(x), "backbone": lambda module, x: module.backbone(x)},
        )
    ]


def of_pairs():
    watched = {"backbone": lambda module, x: module.backbone(x), "projections": lambda module, x: module(x)[0]}
    return [(SpectrumLogger(watch=["backbone", projections], output=False), watched)]


def with_momentum():
    momentum = SpectrumLogger(watch=["backbone_momentum", keys], output=False, name="momentum")
    return [
        *whole(),
        (momentum, {"backbone_momentum": lambda module, x: module.backbone_momentum(x), "keys": keys}),
    ]


def of_dino():
    own = {"": lambda module, x: module.student_head(module.student_backbone(x).flatten(1))}
    teacher = {"teacher_backbone": lambda module, x: module.teacher_backbone(x)}
    return [
        (SpectrumLogger(), own),
        (SpectrumLogger(watch=["teacher_backbone"], output=False), teacher),
    ]


def of_mae():
    return [(SpectrumLogger(watch=["backbone"], output=False), {"backbone": lambda module, x: module.backbone(x)})]


def small_byol():
    return BYOLTransform(BYOLView1Transform(input_size=SIZE), BYOLView2Transform(input_size=SIZE))


METHODS = {
    "simclr": (simclr, lambda: SimCLRTransform(input_size=SIZE), whole),
    "simclr_without_batch_norm": (simclr_without_batch_norm, lambda: SimCLRTransform(input_size=SIZE), whole),
    "barlow_twins": (barlow_twins, small_byol, whole),
    "vicreg": (vicreg, lambda: VICRegTransform(input_size=SIZE), whole),
    "simsiam": (simsiam, lambda: SimSiamTransform(input_size=SIZE), of_pairs),
    "fast_siam": (simsiam, lambda: FastSiamTransform(num_views=4, input_size=SIZE), of_pairs),
    "nnclr": (nnclr, lambda: SimCLRTransform(input_size=SIZE), of_pairs),
    "moco": (moco, lambda: MoCoV2Transform(input_size=SIZE), with_momentum),
    "byol": (byol, small_byol, with_momentum),
    "tico": (tico, small_byol, with_momentum),
    "dino": (dino, lambda: DINOTransform(global_crop_size=SIZE, local_crop_size=16, n_local_views=3), of_dino),
    "swav": (swav, lambda: SwaVTransform(crop_sizes=(SIZE, 16), crop_counts=(2, 3)), whole),
    "mae": (mae, lambda: MAETransform(input_size=SIZE), of_mae),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated in favor of:FutureWarning")
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("method", METHODS)
def test_method(method, package, photographs, tmp_path):
    build, transform, attached = METHODS[method]

    def loader():
        dataset = LightlyDataset(photographs, transform=transform())
        return DataLoader(dataset, batch_size=5, shuffle=True, drop_last=True)

    def views(batch):
        crops, labels, names = batch
        assert labels.shape == (5,) and len(names) == 5
        return crops[: 1 if method == "mae" else 2]

    check(PACKAGES[package], lambda: build(PACKAGES[package]), loader, tmp_path, attached(), last_step=6, views=views)
