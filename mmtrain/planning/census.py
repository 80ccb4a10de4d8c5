"""Counting what a run holds and trains, on the meta device."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mmtrain import plugins
from mmtrain.assemble import FLASH, adapt_planned, planned_config, planned_model
from mmtrain.config.schema import RunConfig, component_and_label
from mmtrain.models.interface import BatchSize, Family
from mmtrain.models.quantization import quantised_linears
from mmtrain.peft.interface import Added
from mmtrain.peft.placement import component_of
from mmtrain.peft.trainable import Attachment, Trainable
from mmtrain.planning.live_bytes import watch
from mmtrain.resolve import model_options

# A question, its options and a short answer, where the data set is not known.
TEXT_TOKENS_PER_SAMPLE = 128


@dataclass(frozen=True)
class ComponentCount:
    """One row: `params` are the base's, `peft_params` what the method adds."""

    mode: str
    method: str | None
    modules: int  # that methods are placed on
    params: int
    peft_params: int
    trainable_params: int
    stored_params: int = 0  # of adapters' files; a method may train more than it stores, or less
    # block of the run file -> sublayer -> [modules, added parameters]; "" is outside of sublayers
    placed: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    notes: Mapping[str, list[str]] = field(default_factory=dict)  # of blocks, for their users


@dataclass(frozen=True)
class Census:
    """The counts of a whole run, and what a step of it holds beside them."""

    components: Mapping[str, ComponentCount]
    size: BatchSize  # of the micro-batch that was measured
    activation_bytes: int
    quantized_params: int = 0  # of the base's, in fewer bits
    quantized_at_once: int = 0  # of these, the most that one product needs unquantised
    flops: int = 0  # of the micro-batch: forward and backward as they are, recomputation included
    flops_by_formula: int = 0  # of the same: (2 frozen + 4 trained parameters) x tokens
    # Of an answer's token: 2 (decoder without embeddings + layers x width x tokens before it).
    answer_flops_by_formula: int = 0

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
class Adapted:
    """The run's model on the meta device, with all that the run adds."""

    model: Any
    trainable: Trainable
    sizes: Mapping[str, int]  # of parameters and buffers
    quantized: Sequence[int]  # of the base's weights that are held in fewer bits
    components: Mapping[str, ComponentCount]


def adapted(config: RunConfig) -> Adapted:
    """Build the run's model without numbers, adapt it, count every component."""
    family: Family = plugins.load("family", config.model.family)
    model: Any = planned_model(config)
    quantized = quantised_linears(model, model_options(config).quantized)
    in_fewer_bits = [one.weight.numel() for one in quantized.values()]
    base_params: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        base_params[component_of(family, name)] += parameter.numel()
    trainable = adapt_planned(model, config)
    tensors = (*model.named_parameters(), *model.named_buffers())
    sizes = {name: tensor.numel() for name, tensor in tensors}
    components = {
        name: _component_count(config, name, base_params[name], sizes, trainable)
        for name in family.components
    }
    return Adapted(model, trainable, sizes, in_fewer_bits, components)


def count(config: RunConfig, size: BatchSize | None = None) -> Census:
    """Count the run's model, and measure a step of it on the meta device."""
    found, size = adapted(config), size or usual_size(config)
    family: Family = plugins.load("family", config.model.family)
    model = found.model
    batch = family.code.planned_batch(model.config, size).to(torch.device("meta"))
    seen = watch(family, model, batch, config.model.attention == FLASH)
    trained = sum(found.sizes[name] for name in found.trainable.owner)
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
    by_formula = (2 * frozen + 4 * trained) * size.samples * size.tokens
    answer = _answer_flops(family, model, size.tokens)
    return Census(
        found.components,
        size,
        seen.peak_bytes,
        sum(found.quantized),
        max(found.quantized, default=0),
        seen.flops,
        by_formula,
        answer,
    )


def rehearse(config: RunConfig) -> dict[str, float]:
    """What there is to train, in numbers; whatever a method refuses, before minutes of loading."""
    census = count(config)
    return {
        "trained_params": census.trainable_params,
        "total_params": census.base_params + census.peft_params,
        "stored_params": sum(part.stored_params for part in census.components.values()),
        "train_flops_per_sample": census.flops / census.size.samples,
        "train_flops_per_sample_by_formula": census.flops_by_formula / census.size.samples,
    }


def _stored(added: Added, sizes: Mapping[str, int]) -> int:
    copied = sum(sizes[name] for name in (*added.copied, *added.stored))
    return copied + sum(math.prod(one.shape) for one in added.computed.values())


def _answer_flops(family: Family, model: Any, tokens: int) -> int:
    """Only what runs for each token of an answer: the decoder and its head, not its embeddings."""
    shape = family.code.attention(model.config, "llm")
    decoder = family.code.decoder(model)
    stack = decoder.decoder if decoder.config.is_encoder_decoder else decoder
    table, head = (
        one.weight for one in (decoder.get_input_embeddings(), decoder.get_output_embeddings())
    )
    sizes = {id(one): one.numel() for one in stack.parameters()}
    sizes.pop(id(table), None)
    sizes[id(head)] = head.numel()  # a head may be the table
    return 2 * (sum(sizes.values()) + shape.layers * shape.hidden * tokens)


def usual_size(
    config: RunConfig, num_tokens: int | None = None, num_answer_tokens: int | None = None
) -> BatchSize:
    """A micro-batch of samples with an image, a question, and an answer as long as allowed."""
    family: Family = plugins.load("family", config.model.family)
    model_config = planned_config(config)
    usual = family.code.image_tokens(model_config, "llm") + TEXT_TOKENS_PER_SAMPLE
    if config.data and config.data.max_length:
        usual = min(usual, config.data.max_length)
    answer = num_answer_tokens or config.generation.max_new_tokens
    tokens, optim = num_tokens or usual, config.optim
    samples = max(1, optim.micro_tokens // tokens) if optim.micro_tokens else optim.micro_batch
    return BatchSize(samples, tokens, answer)


def _component_count(
    config: RunConfig, name: str, params: int, sizes: Mapping[str, int], trainable: Trainable
) -> ComponentCount:
    blocks = {
        block_name: block
        for block_name, block in config.components.items()
        if component_and_label(block_name)[0] == name
    }
    attachments = [one for one in trainable.attachments if one.component == name]
    return ComponentCount(
        mode=next((block.mode for block in blocks.values()), "freeze"),
        method=" + ".join(one.method_name for one in attachments) or None,
        modules=sum(len(one.target.linears) for one in attachments),
        params=params,
        peft_params=sum(sizes[new] for one in attachments for new in one.new_parameters),
        trainable_params=sum(sizes[n] for n, owner in trainable.owner.items() if owner in blocks),
        stored_params=sum(_stored(one.added, sizes) for one in attachments),
        placed={one.block_name: _placed(one, sizes) for one in attachments},
        notes={one.block_name: one.notes for one in attachments if one.notes},
    )


def _placed(attachment: Attachment, sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """What a method added, by sublayer."""
    found: dict[str, tuple[int, int]] = {}
    left = {name: sizes[name] for name in attachment.new_parameters}
    for linear in attachment.target.linears:
        mine = [name for name in left if name.startswith(f"{linear.name}.")]
        modules, params = found.get(linear.sublayer, (0, 0))
        found[linear.sublayer] = modules + 1, params + sum(left.pop(name) for name in mine)
    return found | ({"": (0, sum(left.values()))} if left else {})
