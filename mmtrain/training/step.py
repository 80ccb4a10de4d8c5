"""One optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from mmtrain import distributed
from mmtrain.data.stream import StepBatches
from mmtrain.main_rank import on_main
from mmtrain.models.interface import Batch
from mmtrain.training.audit import refuse_bad_gradients, refuse_bad_loss
from mmtrain.training.engine import Engine
from mmtrain.training.trainee import Trainee


@dataclass(frozen=True)
class StepResult:
    """Sums over the whole global batch, and the gradient's norm before clipping."""

    loss: float  # per answer token
    num_tokens: int
    gradient_norm: float
    auxiliary: dict[str, float]  # further losses of methods, divided as the loss is
    num_bad: int  # samples left out


def train_step(engine: Engine, step: StepBatches, trainee: Trainee) -> StepResult:
    """Forward and backward over the micro-batches, then one optimizer update.

    The loss is the sum over answer tokens divided by the answer tokens of the whole global batch;
    the factor undoes DeepSpeed's division by accumulation steps and its averaging over ranks. A
    method's further losses are divided alike, and weighed in backward. The host waits for the
    device once, before the optimizer.
    """
    batches = step.micro_batches
    # Counted where batches are prepared, summed on the device.
    counts = distributed.summed_over_ranks(
        [
            sum(b.num_answer_tokens for b in batches),
            sum(b.num_tokens for b in batches),
            step.num_bad,
        ],
        dtype=torch.int64,
    )
    factor = engine.divisor / counts[0].clamp(min=1).double()
    sums: list[torch.Tensor] = []  # of each micro-batch: the loss, then what is auxiliary
    sample_losses: list[torch.Tensor] = []
    for number, batch in enumerate(batches):
        result = engine.forward(batch)
        loss = result.answer_loss_sum
        each = [result.auxiliary[name] for name in trainee.auxiliary]
        sums.append(torch.stack([loss.detach(), *(one.detach().to(loss) for one in each)]))
        for further, weight in zip(each, trainee.auxiliary.values(), strict=True):
            loss = loss + weight * further
        engine.backward(loss * factor.to(loss), number == len(batches) - 1)
        sample_losses.append(result.per_sample_loss.detach())
        if number == len(batches) - 1:
            found = _checked(engine, sums, sample_losses, counts, batches, trainee)
            if step.position == 0:
                trainee.audit()
        engine.step()
    return found


def _checked(
    engine: Engine,
    micro_sums: Sequence[torch.Tensor],
    sample_losses: Sequence[torch.Tensor],
    counts: torch.Tensor,
    batches: Sequence[Batch],
    trainee: Trainee,
) -> StepResult:
    """What the step found, or an error on every rank: nothing non-finite meets the optimizer.

    One message and one wait for the device, whatever the number of micro-batches.
    """
    losses = torch.cat(list(sample_losses))
    squared = engine.squared_gradient_norm().to(losses.device)
    # A sum that holds an infinity may be NaN: how many are bad is counted apart.
    loss_sum, *further = reduce(torch.add, micro_sums)
    sums = [loss_sum, squared.nan_to_num(0.0, 0.0, 0.0)]
    unwritten = losses.new_full((), bool(trainee.recorder.fault))
    faults = [(~torch.isfinite(losses)).sum(), ~torch.isfinite(squared), unwritten]
    wanted = [one.double() for one in (*sums, *faults, *further)]
    found = torch.cat([distributed.summed_over_ranks(torch.stack(wanted)), counts.double()])
    loss_total, squared_norm, bad_losses, bad_gradients, unwritten_lines, *rest = found.tolist()
    counted, further_sums = rest[-len(counts) :], rest[: -len(counts)]
    ids = [sample_id for batch in batches for sample_id in batch.ids]
    if bad_losses:
        pairs = zip(ids, losses.tolist(), strict=True)
        bad_ids = [sample_id for sample_id, loss in pairs if not math.isfinite(loss)]
        refuse_bad_loss(distributed.gather_objects(bad_ids))
    if bad_gradients:
        by_parameter = distributed.squared_gradient_norms(trainee.parameters)
        refuse_bad_gradients(by_parameter, trainee.owner, distributed.gather_objects(ids))
    if unwritten_lines:
        on_main(trainee.recorder.refuse_fault)
    answer_tokens, tokens, num_bad = map(int, counted)
    divisor = max(1, answer_tokens)
    auxiliary = {
        name: total / divisor for name, total in zip(trainee.auxiliary, further_sums, strict=True)
    }
    norm = math.sqrt(squared_norm)
    return StepResult(loss_total / divisor, tokens, norm, auxiliary, num_bad)
