"""What a run would train and hold, as JSON data; no weights, no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmtrain.assemble import open_shards, shard_cache, shares, template_for
from mmtrain.config.deepspeed import find_deepspeed_config, zero_stage
from mmtrain.config.schema import DataConfig, OwnTemplate, RunConfig
from mmtrain.data.mixture import mixture_of
from mmtrain.data.remote import place_of_shards
from mmtrain.data.windows import Share, windows_for
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
        **_data(config),
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


def _data(config: RunConfig) -> dict[str, object]:
    """Samples, steps, what is to be fetched; None where the training shards are not at hand."""
    data = config.data
    parts = data.parts if data else {}
    unknown: dict[str, object] = {
        "train_samples": None,
        "steps_per_epoch": None,
        "remote_data": None,
    }
    if data is None or not all(part.train and _at_hand(part.train) for part in parts.values()):
        return unknown
    train = shares(data, "train")
    for part in parts.values():
        if isinstance(part.template, OwnTemplate):
            template_for(part, open_shards(data, str(part.train), part.task))
    samples = mixture_of(parts, [share.num_samples for share in train]).num_samples
    return {
        "train_samples": samples,
        "steps_per_epoch": -(-samples // config.optim.global_batch),
        "remote_data": _remote_data(config, data, train),
    }


def _at_hand(folder: str) -> bool:
    """Whether a folder is here; a remote one is looked for, and missed by name."""
    place = place_of_shards(folder)
    return not isinstance(place, Path) or place.is_dir()


def _remote_data(
    config: RunConfig, data: DataConfig, train: Sequence[Share]
) -> dict[str, object] | None:
    """What the shards of URLs ask of the cache; None where there are none."""
    val_parts = [part.val for part in data.parts.values() if part.val]
    val = shares(data, "val") if all(map(_at_hand, val_parts)) else []
    shards = {
        shard.sha256: shard for share in (*train, *val) if share.remote for shard in share.shards
    }
    if not shards:
        return None
    cache = shard_cache(data)
    windows = windows_for(train, val, cache.max_bytes)
    missing = [shard.bytes for shard in shards.values() if not cache.holds(shard.sha256)]
    return {
        "gib": sum(shard.bytes for shard in shards.values()) / GIB,
        "to_fetch_gib": sum(missing) / GIB,
        "cache": str(cache.folder),
        "cache_gib": data.cache_gib,
        "free_gib": cache.free_bytes / GIB,
        "windows": 1 if windows is None else int(windows.of(config.data_seed, 0).max()) + 1,
        "window_gib": (cache.max_bytes if windows is None else windows.most) / GIB,
    }
