"""What was asked of a model, compared with what was built.

Libraries choose by CPU, accelerator and installed packages, mostly without a word: DeepSpeed, told
to build in fp32, builds in bf16 on every CPU without fp16 kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmtrain.distributed import stored_part
from mmtrain.errors import TrainingError
from mmtrain.models.dropout import KEYED_ATTENTION
from mmtrain.models.quantization import unlike_asked
from mmtrain.models.weights import DTYPES


@dataclass(frozen=True)
class Asked:
    """How the run file wants the model to compute."""

    dtype: str
    attention: str
    base_dropout: int | str = 0
    quantization: str | None = None
    quantized: tuple[str, ...] = ()

    @property
    def attentions(self) -> tuple[str, ...]:
        """The implementations that do what was asked; keyed dropout needs one of ours."""
        keyed = (KEYED_ATTENTION,) if self.base_dropout == "checkpoint" else ()
        return (self.attention, *keyed)


def refuse_other_than(
    asked: Asked, model: nn.Module, device: torch.device, shard_device: torch.device
) -> None:
    """Stop where precision, device or attention differ; ZeRO-3 may keep shards elsewhere."""
    differences = [
        *_other_precision(asked, model),
        *_other_device(model, device, shard_device),
        *_other_attention(asked, model),
        *_summary(
            unlike_asked(model, asked.quantization, asked.quantized),
            f"model.quantization {asked.quantization}",
        ),
    ]
    if differences:
        raise TrainingError(
            f"the model was built otherwise than asked: {'; '.join(differences)}.",
            "A library chose so on this machine: `mmtrain doctor` compares their versions with"
            " those known to work.",
        )


def _other_precision(asked: Asked, model: nn.Module) -> Iterator[str]:
    wanted = DTYPES[asked.dtype]
    found = {}
    for name, parameter in model.named_parameters():
        for dtype in (parameter.dtype, stored_part(parameter).dtype):
            if dtype.is_floating_point and dtype != wanted:  # a file may ask for shards in int8
                found[name] = dtype
    yield from _summary(found, f"model.dtype {asked.dtype}")


def _other_device(
    model: nn.Module, device: torch.device, shard_device: torch.device
) -> Iterator[str]:
    found = {}
    for name, parameter in model.named_parameters():
        part = stored_part(parameter)
        if part.device not in ((device,) if part is parameter else (device, shard_device)):
            found[name] = part.device
    yield from _summary(found, f"device {device}")


def _other_attention(asked: Asked, model: nn.Module) -> Iterator[str]:
    found = {}
    for name, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            chosen = config._attn_implementation
            if chosen not in asked.attentions:
                found[name or type(module).__name__] = chosen
    yield from _summary(found, f"model.attention {asked.attention}")


def _summary(found: Mapping[str, object], wanted: str) -> Iterator[str]:
    """One line for all of a kind."""
    if found:
        name, first = next(iter(found.items()))
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        yield f"{wanted} was asked for, found {first} in {name}{more}"
