"""LoRA through peft: W x + (alpha / r) B A dropout(x)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmtrain.errors import ConfigError
from mmtrain.peft import injection
from mmtrain.peft.interface import Added, Computed, Linear, Surroundings, Target

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig


_FROM_THE_WEIGHT = ("pissa", "olora")


class LoraOptions(BaseModel):
    """Options of a component block with `method: lora`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(16, ge=1, description="rank")
    alpha: float = Field(32, gt=0, description="scaling is alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    rslora: bool = Field(False, description="scaling is alpha / sqrt(r)")
    dora: bool = Field(False, description="DoRA: the weight's norms train apart")
    init: Literal["kaiming", "gaussian", "pissa", "olora"] = Field(
        "kaiming",
        description="of A: kaiming, or gaussian, N(0, 1/r), with B zero; of both from the weight:"
        " pissa, its largest singular values, olora, its QR",
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="other ranks: sublayer, sublayer.role or layers A-B -> r; the last that fits",
    )


class Lora:
    """The method plug-in."""

    options = LoraOptions
    needs_linears = True
    merges = True
    imports = ()

    def conflicts(self, options: Any, around: Surroundings) -> Sequence[str]:
        """DoRA reads the norms of whole weights in every forward; some starts are made of them."""
        if around.quantized and (options.dora or options.init in _FROM_THE_WEIGHT):
            key = "dora" if options.dora else "init"
            return (f"{key}: reads weights that model.quantization rounds; leave one of them out",)
        if options.dora and options.init in _FROM_THE_WEIGHT:
            return (f"dora: starts at the base's norms, not with init: {options.init}; drop one",)
        if options.dora and around.zero_stage == 3:
            return ("dora: needs whole base weights, which ZeRO-3 shards; use zero2, or no dora",)
        return ()

    def attach(self, target: Target, options: Any, seed: int) -> Added:
        """Inject one adapter named after the component; A is keyed, B is zero."""
        from mmtrain.models.dropout import KeyedDropout, scope_of
        from mmtrain.peft.lora_start import of_start, start_from_weight

        name, scope = target.adapter, scope_of(target.model)
        computed: dict[str, Computed] = {}
        _refuse_wide(target, options)
        for linear, layer in injection.inject(target, _config(target, options)):
            _initialise(layer.lora_A[name], layer.lora_B[name], options, seed, linear.name)
            start = None
            if options.init in _FROM_THE_WEIGHT:
                start = of_start
                start_from_weight(layer, name, options.init, seed, linear.name)
                computed |= _with_start(target, linear, layer)
            if not options.dora:  # whose norms peft's own forward computes
                setattr(layer, "forward", partial(_forward, layer, name, start))
                setattr(layer.lora_A[name], "forward", partial(_narrow, layer.lora_A[name]))
            layer.lora_dropout[name] = KeyedDropout(
                options.dropout, linear.name, target.component, scope
            )
        return Added(injection.added_names(target), computed=computed)

    def export_config(self, target: Target, options: Any, base: str) -> dict[str, object]:
        """adapter_config.json as peft reads it.

        What starts elsewhere than at zero is exported with its start, negative, beside it: as a
        LoRA of twice the rank on the unchanged base, as peft converts these.
        """
        factor = 2 if options.init in _FROM_THE_WEIGHT else 1
        settings = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": base,
            "r": factor * options.r,
            "lora_alpha": options.alpha * (factor**0.5 if options.rslora else factor),
            "lora_dropout": options.dropout,
            "bias": "none",
            "target_modules": target.pattern,
            "inference_mode": True,
        }
        if options.rslora:
            settings["use_rslora"] = True
        if options.dora:
            settings["use_dora"] = True
        if options.rank_pattern:
            ranks = _ranks(target, options)
            settings["rank_pattern"] = {name: factor * rank for name, rank in ranks.items()}
        return settings

    def export_name(self, name: str, target: Target) -> str:
        """peft's key, which calls DoRA's norms by their module."""
        key = injection.export_name(name, target)
        return key.removesuffix(".weight") if ".lora_magnitude_vector" in key else key

    def merge(self, target: Target) -> None:
        """Fold the adapter into the base weights, in place."""
        injection.merge(target)


def _config(target: Target, options: Any) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        bias="none",
        target_modules=target.pattern,
        # Initialised here, keyed by module name. With B zero, DoRA's norms are the base's.
        init_lora_weights=options.dora,
        use_rslora=options.rslora,
        use_dora=options.dora,
        rank_pattern=_ranks(target, options),
    )


def _ranks(target: Target, options: Any) -> dict[str, int]:
    """Pattern of module names -> rank, where it is not `r`."""
    used = {key: False for key in options.rank_pattern}
    by_rank: dict[int, list[Linear]] = {}
    for linear in target.linears:
        rank = options.r
        for key, other in options.rank_pattern.items():
            if _fits(linear, key):
                rank, used[key] = other, True
        by_rank.setdefault(rank, []).append(linear)
    place = f"components.{target.block_name}.rank_pattern"
    sublayers = sorted({f"{linear.sublayer}.{linear.role}" for linear in target.linears})
    problems = [
        f"{place}: '{key}' fits no module; give a sublayer, a sublayer.role"
        f" ({', '.join(sublayers)}) or layers as in 0-15"
        for key, is_used in used.items()
        if not is_used
    ]
    if problems:
        raise ConfigError(problems)
    return {
        re.escape(linear.name): rank
        for rank, linears in by_rank.items()
        if rank != options.r
        for linear in linears
    }


def _refuse_wide(target: Target, options: Any) -> None:
    """A rank above a layer's width adds parameters and no freedom."""
    pattern = _ranks(target, options)
    for linear in target.linears:
        rank, width = pattern.get(re.escape(linear.name), options.r), min(linear.shape)
        key = "r" if rank == options.r else "rank_pattern"
        if rank > width:
            raise ConfigError(
                [
                    f"components.{target.block_name}.{key}: got {rank}, and {linear.sublayer}."
                    f"{linear.role} is {width} wide ({linear.name}); give at most {width}"
                ]
            )


def _fits(linear: Linear, key: str) -> bool:
    if layers := re.fullmatch(r"(\d+)-(\d+)", key):
        return linear.layer is not None and int(layers[1]) <= linear.layer <= int(layers[2])
    return key in (linear.sublayer, f"{linear.sublayer}.{linear.role}")


def _with_start(target: Target, linear: Linear, layer: Any) -> dict[str, Computed]:
    """Both matrices as they are exported: each with its start beside it, along the rank."""
    import torch

    found = {}
    for letter, dim in (("A", 0), ("B", 1)):
        name = f"{linear.name}.lora_{letter}.{target.adapter}.weight"
        start = getattr(layer, f"lora_{letter}")[target.adapter].start
        shape = list(start.shape)
        shape[dim] *= 2

        def joined(trained: torch.Tensor, start: Any = start, dim: int = dim) -> torch.Tensor:
            return torch.cat([trained, start.float().cpu()], dim)

        found[injection.export_name(name, target)] = Computed((name,), tuple(shape), joined)
    return found


def _forward(
    layer: Any, name: str, start: Any, x: torch.Tensor, *args: object, **kwargs: object
) -> torch.Tensor:
    """peft's sum, scaled where it is narrow and added in place: two passes over the output less.

    The branches are still called as modules: under ZeRO-3 their weights arrive by module hooks.
    What a merged or a switched-off adapter means, peft's own forward knows.
    """
    if layer.merged or layer.disable_adapters:
        return type(layer).forward(layer, x, *args, **kwargs)
    out = layer.base_layer(x, *args, **kwargs)
    narrow = layer.lora_A[name](x, dropout=layer.lora_dropout[name])
    added = layer.lora_B[name](narrow * layer.scaling[name])
    if start is not None:
        added = added + start(layer, name, x)
    return out.add_(added) if _is_plain(layer.base_layer) else out + added


def _narrow(linear: Any, x: torch.Tensor, dropout: Any = None) -> torch.Tensor:
    """A's own forward; with its dropout as one function, of which backward keeps x alone.

    peft's forward drops first and gives none. By name: DeepSpeed's hooks look at all else.
    """
    if dropout is None:
        return type(linear).forward(linear, x)
    return dropout.then_linear(x, linear.weight)


def _is_plain(layer: object) -> bool:
    """Whether a layer's output is its own, and its backward pass does not read it."""
    from torch import nn

    return type(layer) is nn.Linear


def _initialise(a: Any, b: Any, options: LoraOptions, seed: int, module_name: str) -> None:
    """A from a generator of its own, zero B."""
    from torch import nn

    draw = partial(nn.init.kaiming_uniform_, a=5**0.5)
    if options.init == "gaussian":
        draw = partial(nn.init.normal_, std=1 / len(a.weight))
    injection.fill(a.weight, draw, "lora", seed, module_name)
    nn.init.zeros_(b.weight)


METHOD = Lora()
