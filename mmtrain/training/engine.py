"""What trains and answers, spread over ranks. The only caller of `deepspeed.initialize`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from mmtrain import distributed
from mmtrain.assemble import Assembled
from mmtrain.config.deepspeed import zero_stage
from mmtrain.config.schema import GenerationConfig
from mmtrain.distributed import World
from mmtrain.models import built, decoding
from mmtrain.models.interface import (
    Batch,
    Example,
    Family,
    ForwardResult,
    ImageFeatures,
    SharedPrompts,
)
from mmtrain.training.numerics import nondeterminism_explained

log = logging.getLogger("mmtrain")
Parameters = Mapping[str, nn.Parameter]


class FamilyModule(nn.Module):
    """The model as DeepSpeed sees it: one forward, from a batch to sums of losses.

    The result is a plain tuple of tensors: ZeRO-3 finds no tensors in other types.
    """

    def __init__(self, family: Family, model: nn.Module) -> None:
        super().__init__()
        self.family = family
        self.model = model

    def forward(
        self, batch: Batch, features: ImageFeatures | None, shared: SharedPrompts | None
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """From images and ids to sums of losses."""
        result = decoding.forward(self.family, self.model, batch, features, shared)
        return result.answer_loss_sum, result.per_sample_loss, result.auxiliary


def complete_config(
    deepspeed_config: Mapping[str, Any],
    dtype: str,
    micro_batch: int,
    accumulation: int,
    world_size: int,
    max_grad_norm: float,
) -> dict[str, object]:
    """A ds_configs file plus what belongs to the run: batch sizes, precision, clipping."""
    stage = zero_stage(deepspeed_config)
    if stage == 0 and dtype == "bf16":  # DeepSpeed would silently use another optimizer
        log.info("zero0 with bf16: using ZeRO stage 1, where master weights are fp32 shards")
        stage = 1
    config: dict[str, object] = {
        **deepspeed_config,
        "zero_optimization": {**deepspeed_config.get("zero_optimization", {}), "stage": stage},
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world_size,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if stage > 0:
        # Sums over micro-steps and ranks in fp32: the split of a batch must not change a loss.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


class _DeepSpeed(Protocol):
    """What is used of DeepSpeed's engine."""

    optimizer: torch.optim.Optimizer  # in name: under ZeRO a wrapper that has its param_groups

    def gradient_accumulation_steps(self) -> int: ...
    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...
    def backward(self, loss: torch.Tensor) -> object: ...
    def step(self) -> object: ...


def _initialise(
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    config: Mapping[str, object],
    device: torch.device,
) -> tuple[nn.Module, _DeepSpeed]:
    """DeepSpeed's engine around the module: one object, which is a module as well.

    No HfDeepSpeedConfig: while one is alive, transformers shards every model it builds, a later
    run's too. Families tell generation themselves to keep ranks in step.
    """
    distributed.prepare_deepspeed(config)
    import deepspeed

    buffers = {name: value.clone() for name, value in module.named_buffers()}
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=dict(config), dist_init_required=False
    )
    # DeepSpeed's cast to bf16 takes buffers along; rotary frequencies need their fp32.
    for name, value in buffers.items():
        owner_name, _, leaf = name.rpartition(".")
        module.get_submodule(owner_name)._buffers[leaf] = value.to(device)
    return engine, engine


def _offloads_parameters(config: Mapping[str, Any]) -> bool:
    offload = config["zero_optimization"].get("offload_param") or {}
    return offload.get("device", "none") != "none"


class Engine:
    """Forward, backward, step and generation of a model under one ZeRO stage.

    Every rank calls the same methods in the same order. Without an optimizer it only answers.
    """

    def __init__(
        self,
        assembled: Assembled,
        world: World,
        config: Mapping[str, object],
        asked: built.Asked,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self.family, self.processor, self.world = assembled.family, assembled.processor, world
        self.model = assembled.model
        self.stage = zero_stage(config)
        self._module: nn.Module = FamilyModule(self.family, self.model)
        if optimizer is None and self.stage < 3:
            self._module.to(world.device)
        else:
            made = _initialise(self._module, optimizer, config, world.device)
            self._module, self._deepspeed = made
            distributed.restart_trace_at_each_forward(self._deepspeed.optimizer, self.model)
        shards = torch.device("cpu") if _offloads_parameters(config) else world.device
        built.refuse_other_than(asked, self.model, world.device, shards)

    def train_mode(self) -> None:
        """Dropout on."""
        self._module.train()

    def evaluation_mode(self) -> None:
        """Dropout off."""
        self._module.eval()

    def image_features(self, batch: Batch) -> ImageFeatures:
        """What evaluation asks of a batch's images, once: without gradients or dropout."""
        # No forward of DeepSpeed's runs here that would gather what the model itself owns.
        own = self.model.parameters(recurse=False)
        with nondeterminism_explained(), torch.no_grad(), distributed.gathered(own):
            return self.family.code.image_features(self.model, batch.to(self.world.device))

    def forward(
        self,
        batch: Batch,
        features: ImageFeatures | None = None,
        shared: SharedPrompts | None = None,
    ) -> ForwardResult:
        """One forward of a batch that may still be on the host."""
        given = (batch.to(self.world.device), features, shared)
        with nondeterminism_explained():
            loss_sum, per_sample, auxiliary = self._module(*given)
        return ForwardResult(loss_sum, per_sample, batch.tensors["answer_counts"], auxiliary)

    def generate(
        self,
        examples: Sequence[Example],
        settings: GenerationConfig,
        features: ImageFeatures | None = None,
    ) -> list[str]:
        """Answers to the prompts of `examples`."""
        answering = (self.model, self.processor, examples, settings, features)
        with nondeterminism_explained():
            return decoding.generate(self.family, *answering)

    @property
    def divisor(self) -> int:
        """What `backward` divides a loss by: accumulation steps and ranks."""
        return self._deepspeed.gradient_accumulation_steps() * self.world.size

    def backward(self, loss: torch.Tensor, at_boundary: bool) -> None:
        """Accumulate gradients; the optimizer's step comes behind the one at the boundary."""
        # Said, not counted: where bins are of tokens, steps have as many of them as they need.
        self._deepspeed.set_gradient_accumulation_boundary(at_boundary)
        with nondeterminism_explained():
            self._deepspeed.backward(loss)

    def step(self) -> None:
        """End a micro-step; the optimizer runs at the accumulation boundary."""
        self._deepspeed.step()

    def set_learning_rates(self, rate_of_peak: Callable[[float], float]) -> float:
        """Set every group's rate from its peak; the largest is returned, for the log."""
        groups = self._deepspeed.optimizer.param_groups
        for group in groups:
            group["lr"] = rate_of_peak(group["peak_lr"])
        return max(group["lr"] for group in groups)

    def squared_gradient_norm(self) -> torch.Tensor:
        """This rank's share of the squared norm before clipping, on the device: no wait."""
        owners = self.world.size if self.stage == 0 else 1  # of each gradient
        norm = distributed.own_gradient_norm(self._deepspeed.optimizer)
        return norm.double().square() / owners

    def masters(self, parameters: Parameters) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole fp32 weights by name, one at a time."""
        for name, parameter in parameters.items():
            yield name, distributed.read_state(self._deepspeed.optimizer, parameter, None)

    def moments(self, parameters: Parameters) -> Iterator[tuple[str, torch.Tensor]]:
        """AdamW's moments, as `<name>.<moment>`, one at a time."""
        optimizer = self._deepspeed.optimizer
        distributed.link_moments(optimizer)
        for name, parameter in parameters.items():
            for moment in distributed.MOMENTS:
                yield f"{name}.{moment}", distributed.read_state(optimizer, parameter, moment)

    def prepare_moments(self, step: int) -> None:
        """The optimizer as after `step` steps, with zero moments to be set."""
        distributed.prepare_moments(self._deepspeed.optimizer, step)

    def set_state(self, parameter: nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
        """Set an fp32 weight (its rounding is in the model already), or a moment."""
        distributed.write_state(self._deepspeed.optimizer, parameter, moment, value)
