"""Classifiers of representations, apart from when they are trained and asked: a linear one and k nearest neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

__all__ = ["LinearProbe", "knn_scores"]


class LinearProbe:
    """A linear classifier on standardised features, and its optimiser, Adam.

    It starts at zero, without a draw: the global generator must not notice. The mean and variance that features are
    standardised with are running ones.
    """

    def __init__(self, in_features: int, num_classes: int, learning_rate: float) -> None:
        linear = nn.utils.skip_init(nn.Linear, in_features, num_classes)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.network = nn.Sequential(nn.BatchNorm1d(in_features, affine=False), linear)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=learning_rate)

    def step(self, features: Tensor, labels: Tensor) -> Tensor:
        """Take one step on features (n, in_features) and labels (n,), n ≥ 2, and return the loss before it."""
        with torch.enable_grad():
            loss = cross_entropy(self.network.train()(features), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return loss.detach()

    def scores(self, features: Tensor) -> Tensor:
        """Return the logits of features (n, in_features), (n, num_classes)."""
        return self.network.eval()(features)

    def to(self, destination: torch.device | torch.dtype) -> None:
        """Move everything to a device, or to another precision."""
        self.network.to(destination)
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # moves the state to the parameters

    def state_dict(self) -> dict[str, Any]:
        """Return classifier and optimiser as tensors and numbers."""
        return {"probe": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.network.load_state_dict(state["probe"])
        self.optimizer.load_state_dict(state["optimizer"])


def knn_scores(
    features: Tensor,
    bank: Tensor,
    labels: Tensor,
    num_classes: int,
    k: int,
    temperature: float,
    max_similarities: int = 2**26,
) -> Tensor:
    """Return the votes of the k nearest neighbours for each class, as :class:`OnlineKNN` says, (n, num_classes).

    Args:
        features: (n, d); they are normalised here.
        bank: what they are compared with, (N, d), normalised.
        labels: of the bank, int64, (N,), from 0.
        num_classes: how many there are.
        k: number of neighbours, at most N.
        temperature: of their votes.
        max_similarities: how many of the n × N similarities are held at a time; 2^26 take 256 MB.

    """
    votes = []
    for part in normalize(features).split(max(1, max_similarities // len(bank))):
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)))
        weights = ((similarity - 1) / temperature).exp()  # at most 1, in the same proportions
        votes.append(weights.new_zeros(len(part), num_classes).scatter_add_(1, labels[nearest], weights))
    return torch.cat(votes)
