"""Patch embeddings as matrix products.

A convolution whose kernel equals its stride reads every pixel once: it is a linear layer, on
patches. cuDNN does not see that: in bf16 some versions of it spend seconds in such a Conv3d.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import nn


class PatchLinear(nn.Module):
    """The same numbers, to rounding, from the same parameters in the same shapes."""

    def __init__(self, convolution: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.kernel = convolution.kernel_size
        self.weight = convolution.weight
        self.bias = convolution.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[images, colours, *sizes] to [images, channels, *grid]; a remainder is not read."""
        cut = x
        for number, length in enumerate(self.kernel):
            place = 2 + 2 * number
            count = cut.shape[place] // length
            cut = cut.narrow(place, 0, count * length).unflatten(place, (count, length))
        of_grid, in_patch = range(2, cut.dim(), 2), range(3, cut.dim(), 2)
        patches = cut.permute(0, *of_grid, 1, *in_patch).flatten(1 + len(of_grid))
        return functional.linear(patches, self.weight.flatten(1), self.bias).movedim(-1, 1)


def use_patch_linears(model: nn.Module) -> None:
    """Put one in the place of every convolution that allows it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and _cuts_patches(module):
            parent_name, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent_name), leaf, PatchLinear(module))


def _cuts_patches(convolution: nn.Conv2d | nn.Conv3d) -> bool:
    plain = not any(convolution.padding) and not any(one != 1 for one in convolution.dilation)
    same = tuple(convolution.kernel_size) == tuple(convolution.stride)
    return same and plain and convolution.groups == 1
