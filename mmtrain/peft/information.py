"""Estimates of mutual information between the rows of two tensors of one batch, that learn.

`ContrastiveBound` is a lower bound (InfoNCE), `ClubBound` an upper one (CLUB) as soon as its own
model of p(z | x) fits. Both compare each row with its batch mates: of one row they know nothing.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

_NEVER = 1e9  # what a row that does not count is less likely, in nats


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

    def forward(self, z: torch.Tensor, y: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The bound; to raise it trains the estimator and whatever gives z. Rows count 1 or 0."""
        scores = self.of_z(z) @ self.of_y(y).T
        among = scores + (counts - 1) * _NEVER
        own = (scores.diagonal() - among.logsumexp(dim=1)) * counts
        rows = counts.sum().clamp(min=1)
        return own.sum() / rows + rows.log()


class ClubBound(nn.Module):
    """I(Z; X) is at most this, where the Gaussian model of p(z | x) fits."""

    def __init__(self, z_width: int, x_width: int, hidden: int) -> None:
        super().__init__()
        self.mean = TwoLayers(x_width, hidden, z_width)
        self.log_variance = TwoLayers(x_width, hidden, z_width)

    def forward(
        self, z: torch.Tensor, x: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The bound, through which only z learns; the misfit, by which the model learns."""
        z, rows = z.float(), counts.sum().clamp(min=1)
        mean, log_variance = self._of(x, fixed=False)
        error = (z.detach() - mean).square()
        misfit = 0.5 * (error / log_variance.exp() + log_variance).sum(-1)
        mean, log_variance = self._of(x, fixed=True)
        own = (z - mean).square()
        # Every counted z under every row's Gaussian: [rows of x, rows of z].
        others = (z.unsqueeze(0) - mean.unsqueeze(1)).square()
        apart = (others * counts.view(1, -1, 1)).sum(1) / rows
        bound = ((apart - own) / (2 * log_variance.exp())).sum(-1)
        return (bound * counts).sum() / rows, (misfit * counts).sum() / rows

    def _of(self, x: torch.Tensor, fixed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return self.mean(x, fixed), self.log_variance(x, fixed).tanh()
