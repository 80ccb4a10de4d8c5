"""One optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmtrain import distributed
from mmtrain.data.stream import StepBatches
from mmtrain.models.interface import Batch, ForwardResult
from mmtrain.training.audit import refuse_bad_loss
from mmtrain.training.engine import Engine


@dataclass(frozen=True)
class StepResult:
    """Sums over the whole global batch."""

    loss: float  # per answer token
    num_answer_tokens: int
    num_tokens: int


def train_step(engine: Engine, step: StepBatches, before_optimizer: object = None) -> StepResult:
    """Forward and backward over the micro-batches, then one optimizer update.

    The loss is the sum over answer tokens divided by the answer tokens of the whole global batch;
    the factor undoes DeepSpeed's division by accumulation steps and its averaging over ranks.
    """
    batches = step.micro_batches
    answer_tokens, tokens = distributed.sum_over_ranks(
        [sum(b.num_answer_tokens for b in batches), sum(b.num_tokens for b in batches)],
        dtype=torch.int64,
    )
    factor = len(batches) * engine.world.size / max(1, answer_tokens)
    loss_sums, bad_ids = [], []
    for number, batch in enumerate(batches):
        result = engine.forward(batch)
        assert not result.auxiliary, "no method with auxiliary losses exists yet"
        engine.backward(result.answer_loss_sum * factor)
        loss_sums.append(result.answer_loss_sum.detach())
        bad_ids += _bad_samples(result, batch)
        if number == len(batches) - 1:
            loss_sum, num_bad = distributed.sum_over_ranks([float(sum(loss_sums)), len(bad_ids)])
            if num_bad:
                refuse_bad_loss(distributed.gather_objects(bad_ids))
            if callable(before_optimizer):
                before_optimizer()
        engine.step()
    return StepResult(loss_sum / max(1, answer_tokens), int(answer_tokens), int(tokens))


def _bad_samples(result: ForwardResult, batch: Batch) -> list[str]:
    if bool(torch.isfinite(result.per_sample_loss).all()):
        return []
    finite = torch.isfinite(result.per_sample_loss).tolist()
    return [sample_id for sample_id, good in zip(batch.ids, finite, strict=True) if not good]
