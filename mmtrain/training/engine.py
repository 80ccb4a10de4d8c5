"""DeepSpeed behind one small object. The only caller of `deepspeed.initialize`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mmtrain import distributed
from mmtrain.distributed import World
from mmtrain.models import built, decoding
from mmtrain.models.dropout import scope_of
from mmtrain.models.interface import Batch, Example, Family, ForwardResult
from mmtrain.training.numerics import nondeterminism_explained

log = logging.getLogger("mmtrain")


class FamilyModule(nn.Module):
    """The model as DeepSpeed sees it: one forward, from a batch to sums of losses.

    The result is a plain tuple of tensors: ZeRO-3 finds no tensors in other types.
    """

    def __init__(self, family: Family, model: nn.Module) -> None:
        super().__init__()
        self.family = family
        self.model = model

    def forward(self, batch: Batch) -> tuple[Any, ...]:
        """From images and ids to sums of losses."""
        result = decoding.forward(self.family, self.model, batch)
        return result.answer_loss_sum, result.per_sample_loss, result.auxiliary


def resolve_stage(deepspeed_config: Mapping[str, Any], dtype: str) -> int:
    """The ZeRO stage in effect: bf16 at stage 0 would silently use another optimizer."""
    stage = int(deepspeed_config.get("zero_optimization", {}).get("stage", 0))
    if stage == 0 and dtype == "bf16":
        log.info("zero0 with bf16: using ZeRO stage 1, where master weights are fp32 shards")
        return 1
    return stage


def complete_config(
    deepspeed_config: Mapping[str, Any],
    dtype: str,
    micro_batch: int,
    accumulation: int,
    world_size: int,
    max_grad_norm: float,
) -> dict[str, Any]:
    """A ds_configs file plus what belongs to the run: batch sizes, precision, clipping."""
    config = {key: value for key, value in deepspeed_config.items()}
    stage = resolve_stage(deepspeed_config, dtype)
    config["zero_optimization"] = {**config.get("zero_optimization", {}), "stage": stage}
    config["train_micro_batch_size_per_gpu"] = micro_batch
    config["gradient_accumulation_steps"] = accumulation
    config["train_batch_size"] = micro_batch * accumulation * world_size
    config["gradient_clipping"] = max_grad_norm
    config["bf16"] = {"enabled": dtype == "bf16"}
    config["zero_allow_untested_optimizer"] = True
    config["steps_per_print"] = 10**9
    if stage > 0:
        # Sums over micro-steps and ranks in fp32: the split of a batch must not change a loss.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


def _initialise(
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    config: Mapping[str, Any],
    device: torch.device,
) -> Any:
    """DeepSpeed's engine around the module.

    No HfDeepSpeedConfig: while one is alive, transformers shards every model it builds, a later
    run's too. Families tell generation themselves to keep ranks in step.
    """
    import deepspeed

    distributed.prepare_deepspeed(config)
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=dict(config), dist_init_required=False
    )
    # DeepSpeed's cast to bf16 takes buffers along; rotary frequencies need their fp32.
    for name, value in buffers.items():
        owner_name, _, leaf = name.rpartition(".")
        module.get_submodule(owner_name)._buffers[leaf] = value.to(device)
    return engine


def _offloads_parameters(config: Mapping[str, Any]) -> bool:
    offload = config["zero_optimization"].get("offload_param") or {}
    return offload.get("device", "none") != "none"


class Engine:
    """Forward, backward, step and generation of one run under one ZeRO stage."""

    def __init__(
        self,
        family: Family,
        model: nn.Module,
        processor: Any,
        world: World,
        config: Mapping[str, Any],
        asked: built.Asked,
        groups: list[dict[str, Any]] | None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.family, self.model, self.processor, self.world = family, model, processor, world
        self.stage = int(config["zero_optimization"]["stage"])
        self._stage0_norm = 0.0
        module = FamilyModule(family, model)
        self.deepspeed: Any = None
        if groups is None and self.stage < 3:
            self._module: Any = module.to(world.device)
        else:
            optimizer = None
            if groups is not None:
                optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps)
            self._module = self.deepspeed = _initialise(module, optimizer, config, world.device)
            distributed.restart_trace_at_each_forward(self.deepspeed, model)
        shards = torch.device("cpu") if _offloads_parameters(config) else world.device
        built.refuse_other_than(asked, model, world.device, shards)

    def train_mode(self) -> None:
        """Dropout on."""
        self._module.train()

    def evaluation_mode(self) -> None:
        """Dropout off."""
        self._module.eval()

    def set_step(self, seed: int, step: int) -> None:
        """Key the dropout masks of this optimizer step."""
        scope = scope_of(self.model)
        scope.seed, scope.step = seed, step

    def forward(self, batch: Batch) -> ForwardResult:
        """One forward of a batch that may still be on the host."""
        with nondeterminism_explained():
            loss_sum, per_sample, auxiliary = self._module(batch.to(self.world.device))
        return ForwardResult(loss_sum, per_sample, batch.tensors["answer_counts"], auxiliary)

    def generate(self, examples: Sequence[Example], settings: Any) -> list[str]:
        """Answers to the prompts of `examples`."""
        with nondeterminism_explained():
            return decoding.generate(self.family, self.model, self.processor, examples, settings)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients. DeepSpeed divides by accumulation steps and averages ranks."""
        assert self.deepspeed is not None
        with nondeterminism_explained():
            self.deepspeed.backward(loss)

    def step(self) -> None:
        """End a micro-step; the optimizer runs at the accumulation boundary."""
        assert self.deepspeed is not None
        if self.stage == 0 and self.deepspeed.is_gradient_accumulation_boundary():
            # DeepSpeed keeps no norm at stage 0.
            found = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
            self._stage0_norm = float(torch.stack(found).norm())
        self.deepspeed.step()

    def set_learning_rates(self, rate_of_peak: Any) -> float:
        """Set every group's rate from its peak; the largest is returned, for the log."""
        assert self.deepspeed is not None
        rates = []
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate_of_peak(group["peak_lr"])
            rates.append(group["lr"])
        return max(rates)

    def gradient_norm(self) -> float:
        """The global norm before clipping, of the step just taken."""
        assert self.deepspeed is not None
        return (
            self._stage0_norm if self.stage == 0 else float(self.deepspeed.get_global_grad_norm())
        )
