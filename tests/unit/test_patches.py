"""Patch embeddings as matrix products: the convolution's numbers, names and shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmtrain import plugins
from mmtrain.models import building
from mmtrain.models.interface import ModelOptions
from mmtrain.models.patches import PatchLinear, use_patch_linears

TINY = [
    (name, preset)
    for name in plugins.names("family")
    for preset in plugins.load("family", name).presets
    if preset.startswith("tiny")
]
EMBEDDINGS = {
    # 18 pixels hold four patches of 4: what remains is read by neither.
    "images": (nn.Conv2d(3, 10, 4, 4), (2, 3, 16, 18)),
    "oblong patches": (nn.Conv2d(3, 10, (4, 2), (4, 2), bias=False), (2, 3, 8, 6)),
    "packed patches": (nn.Conv3d(3, 10, (2, 4, 4), (2, 4, 4), bias=False), (5, 3, 2, 4, 4)),
    "films": (nn.Conv3d(3, 10, (2, 4, 4), (2, 4, 4)), (2, 3, 4, 8, 12)),
}
OTHERS = {
    "overlapping": nn.Conv2d(3, 6, 4, 2),
    "with gaps": nn.Conv2d(3, 6, 2, 4),
    "padded": nn.Conv2d(3, 6, 4, 4, padding=1),
    "padded by name": nn.Conv2d(3, 6, 1, 1, padding="same"),
    "dilated": nn.Conv2d(3, 6, 2, 2, dilation=2),
    "in groups": nn.Conv2d(3, 6, 4, 4, groups=3),
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_and_gradients_are_the_convolutions(kind: str, dtype: torch.dtype) -> None:
    made, shape = EMBEDDINGS[kind]
    convolution = made.to(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted, found = convolution(x), PatchLinear(convolution)(x)
    torch.testing.assert_close(found, wanted)
    weights = torch.linspace(-1, 1, wanted.numel(), dtype=dtype).view_as(wanted)
    gradients = [
        torch.autograd.grad((out * weights).sum(), list(convolution.parameters()))
        for out in (wanted, found)
    ]
    tolerance = {"rtol": 0.05, "atol": 0.1} if dtype == torch.bfloat16 else {}
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_convolutions_stay(kind: str) -> None:
    model = nn.Sequential(OTHERS[kind])
    use_patch_linears(model)
    assert model[0] is OTHERS[kind]


@pytest.mark.parametrize(("name", "preset"), TINY)
def test_every_family_is_built_with_them_and_keeps_its_names(name: str, preset: str) -> None:
    family = plugins.load("family", name)
    options = ModelOptions(None, preset, dtype="fp32")
    config = family.code.model_config(options)
    model = building.build_empty(family.code.skeleton, config, options, None)
    kinds = {type(module) for module in model.modules()}
    assert PatchLinear in kinds and not kinds & {nn.Conv2d, nn.Conv3d}
    with torch.device("meta"):
        skeleton = family.code.skeleton(config)
    found, wanted = (
        [(key, value.shape) for key, value in one.state_dict().items()] for one in (model, skeleton)
    )
    assert found == wanted
