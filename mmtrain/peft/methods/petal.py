"""PETAL on a Q-Former: shared modes in its attentions, instruction experts, information bottleneck.

`paper` is what arXiv 2312.16160 describes, `release` what its published code computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmtrain.errors import ConfigError, MmtrainError
from mmtrain.peft import injection
from mmtrain.peft.interface import Added, Linear, Surroundings, Target

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mmtrain.models.taps import OfferedTaps

_ONLY_PAPER = ("instruction", "threshold", "information", "eta")
_STD, _STD_OF_SCALES, _RELEASE_DROPOUT = 0.02, 2e-4, 0.1
_EXPERTS = {"paper": 3, "release": 6}


class PetalOptions(BaseModel):
    """Options of a component block with `method: petal`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: Literal["paper", "release"] = Field("paper", description="as published: text or code")
    rank: int = Field(64, ge=1, description="of the shared modes")
    experts: int | None = Field(None, ge=1, le=6, description="default: paper 3, release 6")
    size: int = Field(64, ge=1, description="width of an expert")
    instruction: Literal["experts", "plain", "random"] = Field(
        "experts", description="plain: the paper's V1; random: one learned vector for all words"
    )
    threshold: bool = Field(
        True, description="a learned factor on each frozen product; V4 has none"
    )
    information: float = Field(
        0.01, ge=0, description="weight of the bottleneck's loss, ours; 0: the paper's V2"
    )
    eta: float = Field(0.1, ge=0, description="what forgetting the picture counts")

    @model_validator(mode="after")
    def _say_what_the_release_lacks(self) -> PetalOptions:
        fields = type(self).model_fields
        given = [name for name in _ONLY_PAPER if getattr(self, name) != fields[name].default]
        if self.variant == "release" and given:
            raise ValueError(f"{', '.join(given)}: only variant 'paper' has it; leave it out")
        return self


class Petal:
    """The method plug-in."""

    options = PetalOptions
    needs_linears = True
    merges = False
    imports = None

    def conflicts(self, options: object, around: Surroundings) -> Sequence[str]:
        """It enhances the instruction that a Q-Former reads."""
        if around.component != "qformer" or "instruction_embeddings" not in around.family.taps:
            return ("method: 'petal' tunes the Q-Former of an InstructBLIP; use qformer there",)
        return ()

    def attach(self, target: Target, options: Any, seed: int) -> Added:
        """Modes on the selected projections; the rest where the family lets it pass by."""
        from torch import nn

        if any(name.startswith("petal_") for name, _ in target.model.named_children()):
            fault = f"components.{target.block_name}: 'petal' is there already"
            raise ConfigError([f"{fault}, and its losses count once; give it one block"])
        parts = nn.Module()
        target.model.add_module(_module_name(target), parts)
        own = _put_modes(target, options, parts)
        paper = options.variant == "paper"
        auxiliary: dict[str, float] = {}
        if paper:
            _put_experts(target, options, parts)
            auxiliary = _put_bottleneck(target, options, parts)
        else:
            _put_release(target, options, parts)
        names = [*own, *(f"{_module_name(target)}.{name}" for name, _ in parts.named_parameters())]
        _initialise(target, names, options, seed)
        return Added(
            tuple(names),
            starts_at_identity=paper and options.instruction != "random",
            batch_coupled=bool(auxiliary) or not paper,
            auxiliary=auxiliary,
        )

    def export_config(self, target: Target, options: Any, base: str) -> dict[str, object]:
        """Read by mmtrain alone: peft has no such tuner."""
        return {
            "peft_type": "PETAL",
            "base_model_name_or_path": base,
            "target_modules": target.pattern,
            **options.model_dump(exclude_unset=True),
        }

    def export_name(self, name: str, target: Target) -> str:
        """The name in the model."""
        return name

    def merge(self, target: Target) -> None:
        """Not defined."""
        raise MmtrainError(
            "PETAL cannot be folded into matrices: its experts change what the Q-Former reads.",
            "Use the adapter folder of the run.",
        )


def _module_name(target: Target) -> str:
    return f"petal_{target.adapter}"


def _put_modes(target: Target, options: Any, parts: nn.Module) -> list[str]:
    """One set of factors for all that reads words, one for all that reads the picture."""
    import torch
    from torch import nn

    from mmtrain.models.dropout import KeyedDropout, scope_of
    from mmtrain.peft.petal import SharedModes, approximate

    names = []
    sets: dict[str, SharedModes] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for linear in target.linears:
        read = "picture" if _reads_picture(linear) else "words"
        if read not in sets:
            outputs, inputs = linear.shape
            sets[read] = SharedModes(inputs, outputs, options.rank)
            shapes[read] = linear.shape
            parts.add_module(read, sets[read])
        if linear.shape != shapes[read]:
            place, role = f"components.{target.block_name}", f"{linear.sublayer}.{linear.role}"
            raise ConfigError(
                [
                    f"{place}.sublayers: 'petal' shares its factors, and {role} has another shape"
                    f" than {target.linears[0].role}; leave it out"
                ]
            )
        projection = target.model.get_submodule(linear.name)
        own = {"petal_weights": options.rank}
        dropout = None
        if options.variant == "release":
            scope = scope_of(target.model)
            dropout = KeyedDropout(_RELEASE_DROPOUT, linear.name, target.component, scope)
        elif options.threshold:
            own["petal_threshold"] = 1
        for name, length in own.items():
            projection.register_parameter(name, nn.Parameter(torch.empty(length)))
            names.append(f"{linear.name}.{name}")
        approximate(projection, sets[read], dropout)
    return names


def _reads_picture(linear: Linear) -> bool:
    return linear.sublayer == "cross_attn" and linear.role in ("k", "v")


def _put_experts(target: Target, options: Any, parts: nn.Module) -> None:
    from mmtrain.peft.petal import GatedExperts, RandomInstruction, behind_queries

    width = _hidden(target)
    if options.instruction == "plain":
        return
    if options.instruction == "random":
        enhance: nn.Module = RandomInstruction(width)
    else:
        enhance = GatedExperts(width, options.size, options.experts or _EXPERTS["paper"])
    parts.add_module("instruction", enhance)
    model: Any = target.model
    listener = behind_queries(model.config.num_query_tokens, enhance)
    _taps(target).listen("instruction_embeddings", listener)


def _put_bottleneck(target: Target, options: Any, parts: nn.Module) -> dict[str, float]:
    """The auxiliary losses, with their weights."""
    from mmtrain.peft.petal import InformationBottleneck

    if not options.information:
        return {}
    model: Any = target.model
    config, taps = model.config, _taps(target)
    bottleneck = InformationBottleneck(
        _hidden(target),
        config.vision_config.hidden_size,
        config.text_config.hidden_size,
        options.eta,
    )
    parts.add_module("information", bottleneck)
    taps.listen("connector_output", bottleneck.hear_queries)
    taps.listen("vision_tokens", bottleneck.hear_picture)
    table = model.get_input_embeddings()
    taps.add_loss("petal_information", partial(bottleneck.information, answers=table))
    taps.add_loss("petal_misfit", bottleneck.misfit)
    return {"petal_information": options.information, "petal_misfit": 1.0}


def _put_release(target: Target, options: Any, parts: nn.Module) -> None:
    """Ungated experts on all embeddings; what the code adds behind the attentions."""
    from torch import nn

    from mmtrain.peft.petal import MeanExperts, ScaledCopy, share_first_query

    width = _hidden(target)
    experts = MeanExperts(width, options.size, options.experts or _EXPERTS["release"])
    parts.add_module("instruction", experts)
    _taps(target).listen("instruction_embeddings", experts)
    copies = nn.ModuleList()
    parts.add_module("copies", copies)
    for names in target.blocks.values():
        block: Any
        for block in map(target.model.get_submodule, names):
            copies.append(ScaledCopy(width))
            block.attention.register_forward_hook(partial(_through, copies[-1]))
            if hasattr(block, "crossattention"):
                share_first_query(block.crossattention)


def _through(module: nn.Module, _: object, __: object, out: torch.Tensor) -> torch.Tensor:
    return module(out)


def _initialise(target: Target, names: Sequence[str], options: Any, seed: int) -> None:
    """Every parameter from a generator of its own, in the model's precision."""
    dtype = next(target.model.parameters()).dtype
    for name in names:
        owner, _, leaf = name.rpartition(".")
        parameter = target.model.get_parameter(name)
        parameter.data = parameter.data.to(dtype)
        draw = _draw(owner.rpartition(".")[2], leaf, options)
        injection.fill(parameter, draw, "petal", seed, target.adapter, name)


def _draw(owner: str, leaf: str, options: Any) -> Callable[[torch.Tensor], object]:
    """How a parameter begins; V (`up`) at zero, what the threshold is above one, too."""
    from torch import nn

    release = options.variant == "release"
    xavier = nn.init.xavier_uniform_
    small = partial(nn.init.normal_, std=_STD)
    kaiming = partial(nn.init.kaiming_uniform_, a=5**0.5)
    found: dict[str, Callable[[torch.Tensor], object]] = {
        "petal_threshold": nn.init.zeros_,
        "petal_weights": (lambda w: xavier(w.unsqueeze(1))) if release else nn.init.normal_,
        "core": xavier if release else small,
        "scale": partial(nn.init.normal_, std=_STD_OF_SCALES),
        "shift": partial(nn.init.normal_, std=_STD_OF_SCALES),
        "up": nn.init.zeros_,
        "gate": nn.init.zeros_,
    }
    if leaf in found:
        return found[leaf]
    if leaf.endswith("bias"):
        return nn.init.zeros_
    if owner == "up":
        return nn.init.zeros_
    return kaiming if release or leaf in ("first", "second") else small


def _hidden(target: Target) -> int:
    assert target.attention is not None
    return target.attention.hidden


def _taps(target: Target) -> OfferedTaps:
    assert target.taps is not None
    return target.taps


METHOD = Petal()
