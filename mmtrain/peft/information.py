"""Estimates of mutual information between the rows of two tensors of one batch, that learn.

`ContrastiveBound` is a lower bound (InfoNCE), `ClubBound` an upper one (CLUB) as soon as its own
model of p(z | x) fits. Both compare each row with its batch mates: of one row they know nothing.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


class TwoLayers(nn.Module):
    """second(tanh(first(x))); `fixed` lets gradients pass to x alone."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        # Its own and no submodules': under ZeRO-3 they are here for this module's forward.
        self.first = nn.Parameter(torch.empty(hidden, inputs))
        self.first_bias = nn.Parameter(torch.zeros(hidden))
        self.second = nn.Parameter(torch.empty(outputs, hidden))
        self.second_bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor, fixed: bool = False) -> torch.Tensor:
        """[rows, outputs] in fp32."""
        weights = (self.first, self.first_bias, self.second, self.second_bias)
        first, first_bias, second, second_bias = (
            (one.detach() if fixed else one).float() for one in weights
        )
        hidden = functional.linear(x.float(), first, first_bias).tanh()
        return functional.linear(hidden, second, second_bias)


class ContrastiveBound(nn.Module):
    """I(Z; Y) is at least this, and never more than log(rows) is seen of it."""

    def __init__(self, z_width: int, y_width: int, hidden: int) -> None:
        super().__init__()
        self.of_z = TwoLayers(z_width, hidden, hidden)
        self.of_y = TwoLayers(y_width, hidden, hidden)

    def forward(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The bound; to raise it trains the estimator and whatever gives z."""
        scores = self.of_z(z) @ self.of_y(y).T
        own = scores.diagonal() - scores.logsumexp(dim=1)
        return own.mean() + math.log(len(z))


class ClubBound(nn.Module):
    """I(Z; X) is at most this, where the Gaussian model of p(z | x) fits."""

    def __init__(self, z_width: int, x_width: int, hidden: int) -> None:
        super().__init__()
        self.mean = TwoLayers(x_width, hidden, z_width)
        self.log_variance = TwoLayers(x_width, hidden, z_width)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The bound, through which only z learns; the misfit per row, by which the model learns."""
        z = z.float()
        misfit = -self._log_likelihood(z.detach(), x, fixed=False).sum(-1)
        mean, log_variance = self.mean(x, fixed=True), self.log_variance(x, fixed=True).tanh()
        # Of every z under every row's Gaussian: [rows of x, rows of z].
        apart = (z.unsqueeze(0) - mean.unsqueeze(1)).square().mean(1)
        own = (z - mean).square()
        bound = (apart - own) / (2 * log_variance.exp())
        return bound.sum(-1).mean(), misfit

    def _log_likelihood(self, z: torch.Tensor, x: torch.Tensor, fixed: bool) -> torch.Tensor:
        mean, log_variance = self.mean(x, fixed), self.log_variance(x, fixed).tanh()
        return -0.5 * ((z - mean).square() / log_variance.exp() + log_variance)
