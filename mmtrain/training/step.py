"""One optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from mmtrain import distributed
from mmtrain.data.stream import StepBatches
from mmtrain.models.interface import Batch
from mmtrain.training.audit import refuse_bad_gradients, refuse_bad_loss
from mmtrain.training.engine import Engine
from mmtrain.training.trainee import Trainee


@dataclass(frozen=True)
class StepResult:
    """Sums over the whole global batch."""

    loss: float  # per answer token
    num_answer_tokens: int
    num_tokens: int


def train_step(
    engine: Engine,
    step: StepBatches,
    trainee: Trainee,
    before_optimizer: Callable[[], None] | None = None,
) -> StepResult:
    """Forward and backward over the micro-batches, then one optimizer update.

    The loss is the sum over answer tokens divided by the answer tokens of the whole global batch;
    the factor undoes DeepSpeed's division by accumulation steps and its averaging over ranks.
    """
    batches = step.micro_batches
    answer_tokens, tokens = distributed.sum_over_ranks(
        [sum(b.num_answer_tokens for b in batches), sum(b.num_tokens for b in batches)],
        dtype=torch.int64,
    )
    factor = engine.divisor / max(1, answer_tokens)
    loss_sums: list[torch.Tensor] = []
    sample_losses: list[torch.Tensor] = []
    for number, batch in enumerate(batches):
        result = engine.forward(batch)
        assert not result.auxiliary, "no method with auxiliary losses exists yet"
        engine.backward(result.answer_loss_sum * factor, number == len(batches) - 1)
        loss_sums.append(result.answer_loss_sum.detach())
        sample_losses.append(result.per_sample_loss.detach())
        if number == len(batches) - 1:
            loss_sum = _checked(
                engine, reduce(torch.add, loss_sums), sample_losses, batches, trainee
            )
            if before_optimizer is not None:
                before_optimizer()
        engine.step()
    return StepResult(loss_sum / max(1, answer_tokens), int(answer_tokens), int(tokens))


def _checked(
    engine: Engine,
    own_loss_sum: torch.Tensor,
    sample_losses: Sequence[torch.Tensor],
    batches: Sequence[Batch],
    trainee: Trainee,
) -> float:
    """The loss over all ranks, or an error on each: nothing non-finite meets the optimizer.

    One message and one wait for the device in a step, whatever the number of micro-batches.
    """
    losses = torch.cat(list(sample_losses))
    norm = engine.own_gradient_norm().to(losses.device)
    faults = [(~torch.isfinite(losses)).sum(), ~torch.isfinite(norm)]
    loss_sum, bad_losses, bad_gradients = distributed.sum_over_ranks(
        torch.stack([own_loss_sum.double(), *(fault.double() for fault in faults)])
    )
    ids = [sample_id for batch in batches for sample_id in batch.ids]
    if bad_losses:
        pairs = zip(ids, losses.tolist(), strict=True)
        bad_ids = [sample_id for sample_id, loss in pairs if not math.isfinite(loss)]
        refuse_bad_loss(distributed.gather_objects(bad_ids))
    if bad_gradients:
        squared = distributed.squared_gradient_norms(trainee.parameters)
        refuse_bad_gradients(squared, trainee.owner, distributed.gather_objects(ids))
    return loss_sum
