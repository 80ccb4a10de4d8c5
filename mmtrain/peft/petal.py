"""The parts of PETAL on a Q-Former: shared modes, instruction experts, information bottleneck.

Shapes: r rows (images), t tokens, c channels, k experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mmtrain.models.text import IGNORED
from mmtrain.peft.information import ClubBound, ContrastiveBound

CRITIC_WIDTH, CLUB_WIDTH = 64, 32  # hidden, as in the released code's history
SHARE_OF_EXPERTS = 0.4  # release: of the embeddings, the rest stays
SHARE_OF_MATES, SHARE_OF_SCALE = 0.1, 0.1  # release: what is added behind the attentions


class SharedModes(nn.Module):
    """up((core x3 weights) down(x)): one pair of factors and one core for many projections."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        self.core = nn.Parameter(torch.empty(rank, rank, rank))

    def forward(
        self, x: torch.Tensor, weights: torch.Tensor, dropout: nn.Module | None = None
    ) -> torch.Tensor:
        """What one projection gets more; `weights` [rank] are its own."""
        narrow = self.down(x)
        if dropout is not None:
            narrow = dropout(narrow)
        return self.up(narrow @ (self.core @ weights))


def approximate(projection: nn.Module, modes: SharedModes, dropout: nn.Module | None) -> None:
    """Add modes to what a projection gives; its own weight counts by a threshold, where it has one.

    `petal_weights` and perhaps `petal_threshold` [1] are the projection's parameters by now.
    """

    def added(module: Any, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> object:
        more = modes(inputs[0], module.petal_weights, dropout)
        threshold = getattr(module, "petal_threshold", None)
        if threshold is not None:
            product = out if module.bias is None else out - module.bias
            # Kept as what it is above one: near one, bf16 has no room for its first steps.
            more = more + threshold * product
        return out + more

    if dropout is not None:
        projection.add_module("petal_dropout", dropout)
    projection.register_forward_hook(added)


class GatedExperts(nn.Module):
    """x + sum of g_k up_k(gelu(down_k(x))), where the gates of a token sum to one (`paper`)."""

    def __init__(self, width: int, size: int, count: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(count, size, width))
        self.up = nn.Parameter(torch.empty(count, width, size))
        self.gate = nn.Parameter(torch.empty(2, width))  # reads x, and what an expert makes of it

    def forward(self, x_rtc: torch.Tensor) -> torch.Tensor:
        """The enhanced instruction."""
        more_rtkc = self._more(x_rtc)
        return x_rtc + (self.gates(x_rtc, more_rtkc).unsqueeze(-1) * more_rtkc).sum(2)

    def _more(self, x_rtc: torch.Tensor) -> torch.Tensor:
        hidden = functional.gelu(torch.einsum("rtc,kmc->rtkm", x_rtc, self.down))
        return torch.einsum("rtkm,kcm->rtkc", hidden, self.up)

    def gates(self, x_rtc: torch.Tensor, more_rtkc: torch.Tensor) -> torch.Tensor:
        """[r, t, k]."""
        of_x, of_y = self.gate
        experts_rtkc = x_rtc.unsqueeze(2) + more_rtkc
        scores = (x_rtc @ of_x).unsqueeze(-1) + experts_rtkc @ of_y
        return scores.float().softmax(-1).to(x_rtc.dtype)


class MeanExperts(nn.Module):
    """0.6 x + 0.4 mean of up_k(down_k(x)), with biases and nothing between (`release`)."""

    def __init__(self, width: int, size: int, count: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, size), nn.Linear(size, width)) for _ in range(count)
        )

    def forward(self, x_rtc: torch.Tensor) -> torch.Tensor:
        """What all embeddings, queries' too, become."""
        mean = torch.stack([expert(x_rtc) for expert in self.experts]).mean(0)
        return (1 - SHARE_OF_EXPERTS) * x_rtc + SHARE_OF_EXPERTS * mean


class RandomInstruction(nn.Module):
    """One learned vector in the place of every word: the paper's last ablation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.empty(width))

    def forward(self, x_rtc: torch.Tensor) -> torch.Tensor:
        """The same for every instruction."""
        return self.vector.expand_as(x_rtc)


def behind_queries(num_queries: int, enhance: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Enhance the instruction's embeddings, which stand behind the queries'."""

    def listener(embeddings_rtc: torch.Tensor) -> torch.Tensor:
        queries, words = embeddings_rtc[:, :num_queries], embeddings_rtc[:, num_queries:]
        return torch.cat([queries, enhance(words)], dim=1)

    return listener


class ScaledCopy(nn.Module):
    """Release: adds a tenth of x * scale + shift, N(0, 2e-4) both, to an attention's output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))
        self.shift = nn.Parameter(torch.empty(width))

    def forward(self, x_rtc: torch.Tensor) -> torch.Tensor:
        """The sum."""
        return x_rtc + SHARE_OF_SCALE * (x_rtc * self.scale + self.shift)


def share_first_query(attention: nn.Module) -> None:
    """Release: every first query gets a tenth of the batch's mean first query."""

    def shared(_: nn.Module, __: object, out_rtc: torch.Tensor) -> torch.Tensor:
        first, others = out_rtc[:, :1], out_rtc[:, 1:]
        return torch.cat([first + SHARE_OF_MATES * first.mean(0, keepdim=True), others], dim=1)

    attention.register_forward_hook(shared)


class InformationBottleneck(nn.Module):
    """I(Z; Y) - eta I(Z; X) of what the queries say, the answer and the picture.

    It keeps what it hears of a forward until the losses are asked for, once.
    """

    def __init__(self, width: int, picture: int, answer: int, eta: float) -> None:
        super().__init__()
        self.of_answer = ContrastiveBound(width, answer, CRITIC_WIDTH)
        self.of_picture = ClubBound(width, picture, CLUB_WIDTH)
        self.eta = eta
        self._heard: dict[str, torch.Tensor] = {}
        self._misfit: torch.Tensor | None = None

    def hear_queries(self, queries_rtc: torch.Tensor) -> None:
        """What the projection is about to read."""
        self._heard["queries"] = queries_rtc

    def hear_picture(self, tokens_rtc: torch.Tensor) -> None:
        """What the tower saw."""
        self._heard["picture"] = tokens_rtc.detach().mean(1)

    def forward(
        self, z: torch.Tensor, x: torch.Tensor, y: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What there is to lose, and how badly p(z | x) is known."""
        upper, misfit = self.of_picture(z, x, counts)
        return self.eta * upper - self.of_answer(z, y, counts), misfit

    def information(self, tensors: Mapping[str, torch.Tensor], answers: nn.Module) -> torch.Tensor:
        """The bottleneck's loss of every answer token; leaves `misfit` to be asked for."""
        heard, self._heard = self._heard, {}
        tokens = tensors["answer_counts"].sum()
        if len(heard) < 2:  # images that went through the tower in another forward
            self._misfit = torch.zeros((), device=tokens.device)
            return self._misfit
        owns = owners(tensors["is_image"], *heard["queries"].shape[:2])
        # Neither a blank image nor a sample that only fills a batch up says anything.
        counts = owns @ (tensors["answer_counts"] > 0).float()
        y = owns @ mean_answers(tensors, answers)
        z = weighted_by_score(heard["queries"])
        lost, misfit = self(z, heard["picture"], y, counts)
        self._misfit = misfit * tokens
        return lost * tokens

    def misfit(self, _: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The estimators' own loss, of the same forward."""
        assert self._misfit is not None
        found, self._misfit = self._misfit, None
        return found


def weighted_by_score(queries_rtc: torch.Tensor) -> torch.Tensor:
    """[r, c]: the queries' sum, each weighted by how much all of them attend to it."""
    scores = queries_rtc @ queries_rtc.transpose(1, 2) * queries_rtc.shape[-1] ** -0.5
    weights_rt = scores.float().softmax(-1).mean(1).to(queries_rtc.dtype)
    return (weights_rt.unsqueeze(-1) * queries_rtc).sum(1)


def owners(is_image_rt: torch.Tensor, images: int, tokens: int) -> torch.Tensor:
    """[images, samples]: one where an image is a sample's.

    A blank image, which a batch without any carries, is nobody's.
    """
    last = (is_image_rt.sum(1) // tokens).cumsum(0)
    numbers = torch.arange(images, device=last.device)
    owner = torch.searchsorted(last, numbers, right=True)
    return functional.one_hot(owner, len(last) + 1)[:, :-1].float()


def mean_answers(tensors: Mapping[str, torch.Tensor], table: nn.Module) -> torch.Tensor:
    """[samples, c]: the mean embedding of each sample's answer, in fp32."""
    targets, rows = tensors["answer_targets"], tensors["answer_rows"]
    counted = (targets != IGNORED).float().unsqueeze(-1)
    with torch.no_grad():
        embeds = table(targets.clamp(min=0)).float() * counted
        samples = len(tensors["row_keys"])
        sums = embeds.new_zeros(samples, embeds.shape[-1]).index_add(0, rows, embeds)
        counts = counted.new_zeros(samples, 1).index_add(0, rows, counted)
    return sums / counts.clamp(min=1)
