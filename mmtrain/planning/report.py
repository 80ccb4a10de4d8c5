"""What a run would train and hold, as JSON data; no weights, no GPU."""

from __future__ import annotations

from pathlib import Path

from mmtrain.assemble import template_for
from mmtrain.config.deepspeed import find_deepspeed_config, zero_stage
from mmtrain.config.schema import OwnTemplate, RunConfig
from mmtrain.data.manifest import read_manifest
from mmtrain.data.mixture import mixture_of
from mmtrain.data.shards import ShardFolder
from mmtrain.models.weights import check_files, has_weights
from mmtrain.planning.census import count, usual_size
from mmtrain.planning.memory import GIB, memory_by_stage


def examine(
    config: RunConfig,
    world_size: int,
    num_tokens: int | None = None,
    num_answer_tokens: int | None = None,
) -> dict[str, object]:
    """Everything `check` reports, as JSON data."""
    size = usual_size(config, num_tokens, num_answer_tokens)
    census = count(config, size)
    _check_weights(config)
    stages = memory_by_stage(config, census, world_size)
    total = census.base_params + census.peft_params
    return {
        "total_params": total,
        "base_params": census.base_params,
        "peft_params": census.peft_params,
        "trainable_params": census.trainable_params,
        "trainable_percent": 100 * census.trainable_params / total,
        "components": {name: vars(part) for name, part in census.components.items()},
        **_steps(config),
        "flops_per_sample": {
            "counted": census.flops / size.samples,
            "by_formula": census.flops_by_formula / size.samples,
        },
        "answer_flops_per_token": {"by_formula": census.answer_flops_by_formula},
        "memory": {
            "world_size": world_size,
            "micro_batch": size.samples,
            "tokens_per_sample": size.tokens,
            "answer_tokens_per_sample": size.answer_tokens,
            "zero_stage": zero_stage(find_deepspeed_config(config.parallel.deepspeed)),
            "gib_per_rank": {f"zero{n}": one.total / GIB for n, one in stages.items()},
            "parts_gib_per_rank": {
                f"zero{n}": {part: size / GIB for part, size in vars(one).items()}
                for n, one in stages.items()
            },
        },
    }


def _check_weights(config: RunConfig) -> None:
    """The folder's weight files, where they are there already: their headers, not their tensors."""
    if config.model.checkpoint is not None and has_weights(Path(config.model.checkpoint)):
        check_files(Path(config.model.checkpoint))


def _steps(config: RunConfig) -> dict[str, int | None]:
    """Samples and steps per epoch; None where the training shards are not at hand."""
    data = config.data
    parts = data.parts if data else {}
    if data is None or not all(part.train and Path(part.train).is_dir() for part in parts.values()):
        return {"train_samples": None, "steps_per_epoch": None}
    sizes = []
    for part in parts.values():
        folder = Path(str(part.train))
        samples = read_manifest(folder, part.task)[0].samples
        sizes.append(min(samples, data.limit or samples))
        if isinstance(part.template, OwnTemplate):
            template_for(part, ShardFolder.open(folder, part.task))
    samples = mixture_of(parts, sizes).num_samples
    return {"train_samples": samples, "steps_per_epoch": -(-samples // config.optim.global_batch)}
