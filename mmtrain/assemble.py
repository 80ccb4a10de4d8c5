"""RunConfig -> model, task and sample sources: configuration objects stop here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmtrain import plugins
from mmtrain.config.schema import DataConfig, MixPart, OwnTemplate, RunConfig
from mmtrain.data.ahead import fetch_all
from mmtrain.data.cache import ShardCache
from mmtrain.data.manifest import read_manifest
from mmtrain.data.remote import RemoteFolder, place_of_shards
from mmtrain.data.shards import ShardFolder
from mmtrain.data.source import Encoder, Source
from mmtrain.data.windows import Share
from mmtrain.errors import CheckpointError, ConfigError, DataError
from mmtrain.files import cache_folder, file_sha256, keep_in_cache
from mmtrain.models.building import build_on_meta, working_precision
from mmtrain.models.built import Asked
from mmtrain.models.interface import Family, Processor
from mmtrain.peft.trainable import Trainable, make_trainable
from mmtrain.resolve import model_options
from mmtrain.tasks.interface import Template
from mmtrain.tasks.templates import own_for

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLASH = "flash_attention_2"
_DIGESTS = "base-digests.json"
_LOOKED_AT = 100  # samples that an own template is compared with
# Of a base's folder, beside its weights; results and notes that lie there may change.
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "*token*.json",
    "*processor_config.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
)


@dataclass(frozen=True)
class Assembled:
    """A base model with everything attached that the run file asks for."""

    family: Family
    model: nn.Module
    processor: Processor
    trainable: Trainable
    base_files: tuple[Path, ...]
    standard_folder: bool  # transformers reads the base's folder

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What trains, by name, in the model's order."""
        named = dict(self.model.named_parameters())
        return {name: named[name] for name in self.trainable.owner}


def build_model(
    config: RunConfig, zero3_config: Mapping[str, object] | None, trains: bool = True
) -> Assembled:
    """Load the base, then attach and freeze (never the other way round).

    Where nothing trains, the base's configuration keeps the dropout that its folder states.
    """
    family = plugins.load("family", config.model.family)
    options = model_options(config)
    if not trains:
        options = replace(options, base_dropout="stored")
    loaded = family.code.load(options, zero3_config)
    return Assembled(
        family=family,
        model=loaded.model,
        processor=loaded.processor,
        trainable=adapt(loaded.model, family, config),
        base_files=loaded.weight_files,
        standard_folder=loaded.standard_folder,
    )


def planned_config(config: RunConfig) -> PretrainedConfig:
    """The package of flash attention is not needed to plan: torch's kernels keep the same."""
    family: Family = plugins.load("family", config.model.family)
    options = model_options(config)
    if options.attention == FLASH:
        options = replace(options, attention="sdpa")
    return family.code.model_config(options)


def planned_model(config: RunConfig) -> nn.Module:
    """The run's base without any numbers."""
    skeleton = plugins.load("family", config.model.family).code.skeleton
    return build_on_meta(skeleton, planned_config(config), config.model.dtype)


def adapt_planned(model: nn.Module, config: RunConfig) -> Trainable:
    """As `adapt`, of a base without numbers."""
    with torch.device("meta"), working_precision(config.model.dtype):
        return adapt(model, plugins.load("family", config.model.family), config)


def asked_of(config: RunConfig) -> Asked:
    """What the built model is compared with."""
    model = config.model
    quantized = model_options(config).quantized
    return Asked(model.dtype, model.attention, model.base_dropout, model.quantization, quantized)


def adapt(model: Any, family: Family, config: RunConfig) -> Trainable:
    """Attach and freeze what the run file says, and let it recompute activations if asked to."""
    trainable = make_trainable(model, family, config.components, config.seed)
    if config.parallel.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return trainable


def refuse_preset(config: RunConfig) -> None:
    """Before minutes of building random weights that no sample can be tokenised for."""
    if config.model.checkpoint is None:
        raise CheckpointError(
            f"model.preset '{config.model.preset}' has random weights and no tokenizer.",
            "Give model.checkpoint to train, evaluate or predict.",
        )


def data_section(config: RunConfig) -> DataConfig:
    """The data section, which training and evaluation need."""
    if config.data is None:
        raise ConfigError(["data: is missing; name a task and its shards to train or evaluate"])
    return config.data


def build_sources(config: RunConfig, assembled: Assembled, split: str) -> dict[str, Source]:
    """The samples of `train` or `val` of every data set that has some, by its name."""
    data = data_section(config)
    encoder = _encoder(data, assembled.family, assembled.processor)
    limit = {"train": data.limit, "val": data.val_limit}[split]
    folders = {name: getattr(part, split) for name, part in data.parts.items()}
    return {
        name: _source(name, data.parts[name], data, encoder, folder, limit)
        for name, folder in folders.items()
        if folder is not None
    }


def build_source(
    config: RunConfig,
    assembled: Assembled,
    folder: str,
    limit: int | None = None,
    blank_images: bool = False,
) -> Source:
    """The samples of one shard folder, encoded for the run's family."""
    data = data_section(config)
    encoder = _encoder(data, assembled.family, assembled.processor)
    source = _source(*part_with(data, folder), data, encoder, folder, limit, blank_images)
    fetch_all(source.blobs, shard_cache(data))
    return source


def source_to_look_at(config: RunConfig, folder: str) -> Source:
    """The same samples, with no model."""
    refuse_preset(config)
    data, family = data_section(config), plugins.load("family", config.model.family)
    options = model_options(config)
    processor = family.code.read_processor(options, family.code.model_config(options))
    return _source(*part_with(data, folder), data, _encoder(data, family, processor), folder)


def shard_cache(data: DataConfig) -> ShardCache:
    """Where the run keeps shards of URLs."""
    return ShardCache.at(data.cache_dir, data.cache_gib)


def shares(data: DataConfig, split: str) -> list[Share]:
    """What a run reads of each folder of `train` or `val`, by the manifests alone."""
    limit = {"train": data.limit, "val": data.val_limit}[split]
    found = []
    for part in data.parts.values():
        if getattr(part, split) is not None:
            place = place_of_shards(getattr(part, split))
            manifest, _ = read_manifest(place, part.task)
            read = min(manifest.samples, limit or manifest.samples)
            found.append(Share(manifest, read, isinstance(place, RemoteFolder)))
    return found


def open_shards(data: DataConfig, folder: str, task: str) -> ShardFolder:
    """A shard folder of the run, or of a URL."""
    return ShardFolder.open(folder, task, shard_cache(data))


def _source(
    name: str,
    part: MixPart,
    data: DataConfig,
    encoder: Encoder,
    folder: str,
    limit: int | None = None,
    blank_images: bool = False,
) -> Source:
    shards = open_shards(data, folder, part.task)
    # Ids of one data set may be those of another.
    prefix = f"{name}/" if name else ""
    return Source(shards, template_for(part, shards), encoder, limit, blank_images, prefix)


def part_with(data: DataConfig, folder: str) -> tuple[str, MixPart]:
    """The data set that a folder is of: it names the folder, or its task is that of the shards.

    To shards of no task of the run, which a trained model may be asked about, the first template
    of their own task belongs.
    """
    asked = Path(folder).resolve()
    for name, part in data.parts.items():
        if asked in (Path(one).resolve() for one in (part.train, part.val) if one):
            return name, part
    found = read_manifest(place_of_shards(folder))[0].task
    alike = {name: part for name, part in data.parts.items() if part.task == found}
    if not alike:
        return "", MixPart(task=found)
    name, part = next(iter(alike.items()))
    if any(other.template != part.template for other in alike.values()):
        raise ConfigError(
            [
                f"{folder}: is of task '{found}', which {' and '.join(alike)} of data.mix ask in"
                " other words; give a run file with the one that is meant"
            ]
        )
    return name, part


def _encoder(data: DataConfig, family: Family, processor: Processor) -> Encoder:
    max_length = data.max_length or family.default_max_length
    return Encoder(family, processor, max_length, data.truncation_side)


def template_for(part: MixPart, shards: ShardFolder) -> Template:
    """The template that the run file names, or has; its own must fit the first samples."""
    chosen, task = part.template, plugins.load("task", part.task)
    if not isinstance(chosen, OwnTemplate):
        template: Template = task.templates[chosen or next(iter(task.templates))]
        return template
    first = []
    for index in range(min(len(shards), _LOOKED_AT)):
        try:
            first.append(shards.read(index))
        except DataError:
            continue  # training says so, or leaves it out
    return own_for(chosen.prompt, chosen.target, chosen.mode, first)


def base_digests(weights: Sequence[Path], afresh: bool = False) -> dict[str, str]:
    """sha256 of all the base's weight files ("weights"), and of each small file that is read.

    Cached by all that the file system tells of a file's change, unless asked for `afresh`.
    """
    if not weights:
        return {"weights": "preset"}
    cache = _read_cache(cache_folder() / _DIGESTS)
    small: dict[str, list[str]] = {}
    for path in _small_files(weights):
        small.setdefault(path.name, []).append(_file_digest(path, cache, afresh))
    listed = [f"{path.name}:{_file_digest(path, cache, afresh)}" for path in weights]
    return {"weights": _joined(listed)} | {name: _joined(found) for name, found in small.items()}


def _read_cache(path: Path) -> dict[str, str]:
    try:
        cache = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return cache if isinstance(cache, dict) else {}


def _small_files(weights: Sequence[Path]) -> list[Path]:
    """What is read beside the weights: shapes, tokenizer, image processing."""
    folders = sorted({path.parent for path in weights})
    return [
        path
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _SMALL_FILES)
    ]


def _file_digest(path: Path, cache: dict[str, str], afresh: bool) -> str:
    stat = path.stat()
    # Size and mtime can be set back; ctime cannot, and another file has another inode.
    marks = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    key = ":".join(map(str, (path.resolve(), *marks)))
    if afresh or key not in cache:
        cache[key] = file_sha256(path)
        # At once: of a base of many files, none is hashed twice by a run that is killed meanwhile.
        keep_in_cache(cache_folder() / _DIGESTS, json.dumps(cache))
    return cache[key]


def _joined(digests: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
