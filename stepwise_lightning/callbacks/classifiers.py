"""Classifiers of frozen features: a linear probe and k nearest neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

_MAX_SIMILARITIES = 2**26  # in memory at a time, 256 MB


class LinearProbe:
    """Linear classifier on features standardised with running statistics, and its Adam optimiser.

    Weights start at zero, which draws nothing from the global generator.
    """

    def __init__(self, in_features: int, num_classes: int, learning_rate: float) -> None:
        linear = nn.utils.skip_init(nn.Linear, in_features, num_classes)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.network = nn.Sequential(nn.BatchNorm1d(in_features, affine=False), linear)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=learning_rate)

    def step(self, features: Tensor, labels: Tensor) -> Tensor:
        """Take one step on features (n, in_features) and labels (n,), n ≥ 2; return the loss before the step."""
        with torch.enable_grad():
            loss = cross_entropy(self.network.train()(features), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return loss.detach()

    def scores(self, features: Tensor) -> Tensor:
        """Return the logits (n, num_classes) of features (n, in_features)."""
        return self.network.eval()(features)

    def to(self, destination: torch.device | torch.dtype) -> None:
        """Move classifier and optimiser to a device or data type."""
        self.network.to(destination)
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # moves the state to the parameters

    def state_dict(self) -> dict[str, Any]:
        """Return the states of classifier and optimiser."""
        return {"probe": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the states returned by :meth:`state_dict`."""
        self.network.load_state_dict(state["probe"])
        self.optimizer.load_state_dict(state["optimizer"])


def knn_scores(features: Tensor, bank: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """Return the votes of the k nearest neighbours for each class, (n, num_classes), as in :class:`OnlineKNN`.

    The neighbours of ``features`` (n, d) are searched in ``bank`` (N, d), which is normalised and has ``labels`` (N,).
    """
    votes = []
    for part in normalize(features).split(max(1, _MAX_SIMILARITIES // len(bank))):
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)))
        weights = ((similarity - 1) / temperature).exp()  # at most 1; votes are relative
        votes.append(weights.new_zeros(len(part), num_classes).scatter_add_(1, labels[nearest], weights))
    return torch.cat(votes)
