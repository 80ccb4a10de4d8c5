"""Counting what a run holds and trains, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmtrain import build, plugins
from mmtrain.config.memory import Blocks
from mmtrain.config.schema import ComponentConfig, RunConfig
from mmtrain.models.interface import Family
from mmtrain.peft.placement import component_of, layer_numbers, select, select_parameters

# A question, its options and a short answer, where the data set is not known.
TEXT_TOKENS_PER_SAMPLE = 128
_FROZEN = ComponentConfig(mode="freeze")


@dataclass(frozen=True)
class ComponentCount:
    """One row: `params` are the base's, `peft_params` what the method adds."""

    mode: str
    method: str | None
    modules: int  # that the method is placed on
    params: int
    peft_params: int
    trainable_params: int


@dataclass(frozen=True)
class Census:
    """The counts of a whole run, and what backward passes through."""

    components: Mapping[str, ComponentCount]
    blocks: Sequence[Blocks]
    vocabulary: int
    tokens_per_sample: int

    @property
    def base_params(self) -> int:
        """Parameters of the base model."""
        return sum(part.params for part in self.components.values())

    @property
    def peft_params(self) -> int:
        """Parameters that methods add."""
        return sum(part.peft_params for part in self.components.values())

    @property
    def trainable_params(self) -> int:
        """Parameters that train: added ones and those of `full` components."""
        return sum(part.trainable_params for part in self.components.values())


@dataclass(frozen=True)
class _Skeleton:
    """Names and sizes of a model on the meta device."""

    family: Family
    config: Any
    parameters: Mapping[str, int]
    weights: Mapping[str, tuple[int, ...]]  # module name -> shape of its weight
    modules: Sequence[str]


def count(config: RunConfig, tokens_per_sample: int | None = None) -> Census:
    """Build the skeleton on the meta device and count every component."""
    skeleton = _skeleton(config)
    family = skeleton.family
    components: dict[str, ComponentCount] = {}
    trained: dict[str, Sequence[str]] = {}
    for name in family.components:
        block = config.components.get(name, _FROZEN)
        trained[name], added = _placed(skeleton, name, block)
        owned = [n for n in skeleton.parameters if component_of(family, n) == name]
        full = sum(skeleton.parameters[n] for n in trained[name]) if block.mode == "full" else 0
        components[name] = ComponentCount(
            mode=block.mode,
            method=block.method,
            modules=len(trained[name]) if block.mode == "peft" else 0,
            params=sum(skeleton.parameters[n] for n in owned),
            peft_params=added,
            trainable_params=added + full,
        )
    picture_tokens = {
        name: family.picture_tokens(skeleton.config, name) for name in family.sublayers
    }
    tokens = tokens_per_sample or picture_tokens["llm"] + TEXT_TOKENS_PER_SAMPLE
    if config.data and config.data.max_length and not tokens_per_sample:
        tokens = min(tokens, config.data.max_length)
    micro_batch = config.optim.micro_batch
    blocks = [
        _blocks(
            skeleton,
            name,
            depth,
            micro_batch * (tokens if name == "llm" else picture_tokens[name]),
        )
        for name, depth in _depths(skeleton, trained).items()
    ]
    vocabulary = skeleton.config.get_text_config().vocab_size
    return Census(components, blocks, vocabulary, tokens)


def _skeleton(config: RunConfig) -> _Skeleton:
    import torch

    family: Family = plugins.load("family", config.model.family)
    model_config = family.model_config(build.model_options(config))
    with torch.device("meta"):
        model = family.skeleton(model_config)
    return _Skeleton(
        family=family,
        config=model_config,
        parameters={name: value.numel() for name, value in model.named_parameters()},
        weights={
            name.removesuffix(".weight"): tuple(value.shape)
            for name, value in model.named_parameters()
            if name.endswith(".weight")
        },
        modules=[name for name, _ in model.named_modules()],
    )


def _placed(
    skeleton: _Skeleton, component: str, block: ComponentConfig
) -> tuple[Sequence[str], int]:
    """What trains: parameter names of `full`, module names of `peft` and the parameters added."""
    family = skeleton.family
    if block.mode == "freeze":
        return (), 0
    if block.mode == "full":
        return select_parameters(family, component, block, skeleton.parameters), 0
    names = select(family, component, block, skeleton.modules).module_names
    method = plugins.load("method", str(block.method))
    shapes = {name: skeleton.weights[name] for name in names}
    return names, method.count(shapes, build.method_options(block))


def _depths(skeleton: _Skeleton, trained: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """How many blocks of each component keep activations: those from the lowest that trains up.

    Whatever trains outside the LLM lies below it, so that backward then crosses all of the LLM.
    """
    depths = {}
    for component in skeleton.family.sublayers:
        num_layers = skeleton.family.attention(skeleton.config, component).layers
        numbers = layer_numbers(skeleton.family, component, trained[component])
        unnumbered = len(numbers) < len(trained[component])
        below = any(trained[other] for other in trained if other != component)
        if unnumbered or (component == "llm" and below):
            depths[component] = num_layers
        elif numbers:
            depths[component] = num_layers - min(numbers.values())
    return depths


def _blocks(skeleton: _Skeleton, component: str, depth: int, num_tokens: int) -> Blocks:
    shape = skeleton.family.attention(skeleton.config, component)
    in_blocks = layer_numbers(skeleton.family, component, skeleton.weights)
    widths = [skeleton.weights[name][0] for name in in_blocks if len(skeleton.weights[name]) == 2]
    return Blocks(
        num_blocks=depth,
        hidden=shape.hidden,
        kv_width=shape.kv_heads * shape.head_dim,
        mlp_width=max(widths),
        num_tokens=num_tokens,
    )
