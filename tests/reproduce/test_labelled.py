"""Labelled images for classifiers."""

import torch

from reproduce.networks.labelled import labelled_images
from stepwise_lightning.encoders import Encoder
from stepwise_lightning.features import capture


def sorted_by_class(num_images, num_classes):
    labels = torch.arange(num_classes).repeat_interleave(num_images // num_classes)
    generator = torch.Generator().manual_seed(0)
    brightness = labels[:, None, None, None] / num_classes + 0.01 * torch.randn(
        num_images, 3, 8, 8, generator=generator
    )
    return list(zip(brightness, labels.tolist(), strict=True))


def test_images_of_a_sorted_folder_are_mixed():
    dataset = sorted_by_class(200, 4)
    images, labels = labelled_images(dataset, 100)
    assert images.shape == (100, 3, 8, 8) and labels.bincount().tolist() == [25] * 4
    assert all(len(part.unique()) == 4 for part in labels.split(25))
    torch.testing.assert_close((images.mean((1, 2, 3)) * 4).round().long(), labels)
    again = labelled_images(dataset, 100)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert len(labelled_images(dataset, 1000)[1]) == 200


def test_images_without_label_are_omitted():
    dataset = [(image, label if label != 1 else -1) for image, label in sorted_by_class(40, 2)]
    images, labels = labelled_images(dataset, 40)
    assert len(images) == 20 and labels.tolist() == [0] * 20


def test_batch_statistics_of_one_class_hide_the_class():
    encoder = Encoder(2, "resnet_small", width=4, seed=0)

    def separation(images, labels):
        z = torch.cat([capture(encoder, [part], ["backbone"])["backbone"][0] for part in images.split(50)])
        means = torch.stack([z[labels == label].mean(0) for label in (0, 1)])
        return float((means[0] - means[1]).norm() / (z[labels == 0] - means[0]).norm(dim=1).mean())

    dataset = sorted_by_class(100, 2)
    unmixed = [torch.stack([image for image, _ in dataset]), torch.tensor([label for _, label in dataset])]
    assert separation(*labelled_images(dataset, 100)) > 3 * separation(*unmixed)
