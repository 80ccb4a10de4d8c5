"""Counting what a run holds and trains, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mmtrain import plugins
from mmtrain.assemble import adapt
from mmtrain.config.schema import ComponentConfig, RunConfig
from mmtrain.models.building import build_on_meta, working_precision
from mmtrain.models.interface import BatchSize, Family
from mmtrain.peft.placement import component_of, select, select_parameters
from mmtrain.planning.live_bytes import peak_bytes
from mmtrain.resolve import method_options, model_options

# A question, its options and a short answer, where the data set is not known.
TEXT_TOKENS_PER_SAMPLE = 128
_FLASH = "flash_attention_2"
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
    """The counts of a whole run, and what a step of it holds beside them."""

    components: Mapping[str, ComponentCount]
    size: BatchSize  # of the micro-batch that was measured
    activation_bytes: int

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
    """A model on the meta device, with its names and sizes before anything is attached."""

    family: Family
    config: Any
    model: Any
    parameters: Mapping[str, int]
    weights: Mapping[str, tuple[int, ...]]  # module name -> shape of its weight
    modules: Sequence[str]


def count(config: RunConfig, size: BatchSize | None = None) -> Census:
    """Build the run's model on the meta device, count every component, measure one step."""
    skeleton = _skeleton(config)
    family = skeleton.family
    components: dict[str, ComponentCount] = {}
    for name in family.components:
        block = config.components.get(name, _FROZEN)
        trained, added = _placed(skeleton, name, block)
        owned = [n for n in skeleton.parameters if component_of(family, n) == name]
        full = sum(skeleton.parameters[n] for n in trained) if block.mode == "full" else 0
        components[name] = ComponentCount(
            mode=block.mode,
            method=block.method,
            modules=len(trained) if block.mode == "peft" else 0,
            params=sum(skeleton.parameters[n] for n in owned),
            peft_params=added,
            trainable_params=added + full,
        )
    size = size or usual_size(config)
    return Census(components, size, _activation_bytes(config, skeleton, size))


def usual_size(
    config: RunConfig, num_tokens: int | None = None, num_answer_tokens: int | None = None
) -> BatchSize:
    """A micro-batch of samples with an image, a question, and an answer as long as allowed."""
    family: Family = plugins.load("family", config.model.family)
    model_config = family.code.model_config(model_options(config))
    usual = family.code.image_tokens(model_config, "llm") + TEXT_TOKENS_PER_SAMPLE
    if config.data and config.data.max_length:
        usual = min(usual, config.data.max_length)
    answer = num_answer_tokens or config.generation.max_new_tokens
    tokens, optim = num_tokens or usual, config.optim
    samples = max(1, optim.micro_tokens // tokens) if optim.micro_tokens else optim.micro_batch
    return BatchSize(samples, tokens, answer)


def _skeleton(config: RunConfig) -> _Skeleton:
    family: Family = plugins.load("family", config.model.family)
    options = model_options(config)
    if options.attention == _FLASH:
        # Its package is not needed to plan; fused kernels of torch keep the same tensors.
        options = replace(options, attention="sdpa")
    model_config = family.code.model_config(options)
    model = build_on_meta(family.code.skeleton, model_config, options.dtype)
    return _Skeleton(
        family=family,
        config=model_config,
        model=model,
        parameters={name: value.numel() for name, value in model.named_parameters()},
        weights={
            name.removesuffix(".weight"): tuple(value.shape)
            for name, value in model.named_parameters()
            if name.endswith(".weight")
        },
        modules=[name for name, _ in model.named_modules()],
    )


def _activation_bytes(config: RunConfig, skeleton: _Skeleton, size: BatchSize) -> int:
    """What one micro-batch holds at most; the skeleton is adapted as the run file says."""
    meta = torch.device("meta")
    with meta, working_precision(config.model.dtype):
        adapt(skeleton.model, skeleton.family, config)
    batch = skeleton.family.code.planned_batch(skeleton.config, size).to(meta)
    is_flash = config.model.attention == _FLASH
    return peak_bytes(skeleton.family, skeleton.model, batch, is_flash)


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
    return names, method.count(shapes, method_options(block))
