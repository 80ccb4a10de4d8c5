"""`mmtrain check`: what a run file would train, counted on the meta device; no weights, no GPU."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain import build
from mmtrain.commands.arguments import positive
from mmtrain.commands.census import TEXT_TOKENS_PER_SAMPLE, Census, count
from mmtrain.config.deepspeed import find_deepspeed_config, zero_stage
from mmtrain.config.memory import GIB, Sizes, memory_per_rank_bytes
from mmtrain.config.schema import RunConfig
from mmtrain.data.manifest import read_manifest

if TYPE_CHECKING:
    from rich.table import Table

HELP = "check a run file and count what it trains; needs no weights and no GPU"
EXAMPLES = """examples:
  mmtrain check run.yaml
  mmtrain check run.yaml components.llm.r=64 --world-size 16
  mmtrain check run.yaml --json
"""
DEFAULT_WORLD_SIZE = 8
LABEL_TOKENS_PER_SAMPLE = 32


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.epilog = EXAMPLES
    parser.add_argument("run_file", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="change a key of the file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--world-size",
        type=positive,
        metavar="N",
        help="ranks to plan for: checks the batch arithmetic and divides the memory "
        f"(default: $WORLD_SIZE, else memory for {DEFAULT_WORLD_SIZE} ranks)",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="tokens per sample in the memory estimate (default: those of one picture plus "
        f"{TEXT_TOKENS_PER_SAMPLE})",
    )


def run(args: argparse.Namespace) -> int:
    """Check, count, print."""
    launched = os.environ.get("WORLD_SIZE", "")
    world_size = args.world_size or (int(launched) if launched.isdecimal() else None)
    config = build.resolve(args.run_file, args.overrides, world_size)
    report = examine(config, world_size or DEFAULT_WORLD_SIZE, args.tokens)
    if args.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        _print_tables(report, config)
    return 0


def examine(config: RunConfig, world_size: int, tokens_per_sample: int | None) -> dict[str, Any]:
    """Everything `check` reports, as JSON data."""
    census = count(config, tokens_per_sample)
    _check_weights(config)
    memory = memory_per_rank_bytes(_sizes(config, census), world_size)
    deepspeed = find_deepspeed_config(config.parallel.deepspeed)
    total = census.base_params + census.peft_params
    return {
        "total_params": total,
        "base_params": census.base_params,
        "peft_params": census.peft_params,
        "trainable_params": census.trainable_params,
        "trainable_percent": 100 * census.trainable_params / total,
        "components": {name: vars(part) for name, part in census.components.items()},
        **_steps(config),
        "memory": {
            "world_size": world_size,
            "tokens_per_sample": census.tokens_per_sample,
            "micro_batch": config.optim.micro_batch,
            "zero_stage": zero_stage(deepspeed),
            "gib_per_rank": {f"zero{stage}": size / GIB for stage, size in memory.items()},
        },
    }


def _check_weights(config: RunConfig) -> None:
    """The folder's weight files, where they are there already: their headers, not their tensors."""
    from mmtrain.models.weights import check_files, has_weights

    if config.model.checkpoint is not None and has_weights(Path(config.model.checkpoint)):
        check_files(Path(config.model.checkpoint))


def _sizes(config: RunConfig, census: Census) -> Sizes:
    zero3 = find_deepspeed_config("zero3")["zero_optimization"]
    micro_batch = config.optim.micro_batch
    return Sizes(
        weights=census.base_params + census.peft_params,
        trainable=census.trainable_params,
        bytes_per_weight=2 if config.model.dtype == "bf16" else 4,
        blocks=census.blocks,
        vocabulary=census.vocabulary,
        num_label_tokens=micro_batch * LABEL_TOKENS_PER_SAMPLE,
        num_live_parameters=zero3["stage3_max_live_parameters"]
        + zero3["stage3_prefetch_bucket_size"],
        activation_checkpointing=config.parallel.activation_checkpointing,
    )


def _steps(config: RunConfig) -> dict[str, Any]:
    """Samples and steps per epoch, where the training shards are at hand."""
    unknown: dict[str, Any] = {"train_samples": None, "steps_per_epoch": None}
    if config.data is None or config.data.train is None:
        return unknown
    samples = _num_samples(config.data.train)
    if samples is None:
        return unknown
    samples = min(samples, config.data.limit or samples)
    return {
        "train_samples": samples,
        "steps_per_epoch": -(-samples // config.optim.global_batch),
    }


def _num_samples(shards: str) -> int | None:
    """Samples in a folder of shards, by its manifest; None where there is none yet."""
    folder = Path(shards)
    return read_manifest(folder)[0].samples if folder.is_dir() else None


def _print_tables(report: dict[str, Any], config: RunConfig) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(_component_table(report, f"{config.name}: {_base(config)}"))
    console.print(f"trainable: {report['trainable_percent']:.4f} % of base and added parameters")
    console.print(_steps_line(report, config))
    console.print(_memory_table(report["memory"]))
    memory = report["memory"]
    recompute = " with activation checkpointing" * config.parallel.activation_checkpointing
    console.print(
        f"{memory['micro_batch']} samples x {memory['tokens_per_sample']} tokens per forward"
        f"{recompute}; plan others with --world-size N, --tokens N"
    )


def _component_table(report: dict[str, Any], title: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.collapse_padding = True
    for heading in ("component", "mode", "method"):
        table.add_column(heading, overflow="fold")
    for heading in ("modules", "parameters", "added", "trainable"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, part in report["components"].items():
        numbers = [part[key] for key in ("modules", "params", "peft_params", "trainable_params")]
        table.add_row(name, part["mode"], part["method"] or "-", *(f"{n:,}" for n in numbers))
    table.add_section()
    totals = [report[key] for key in ("base_params", "peft_params", "trainable_params")]
    table.add_row("total", "", "", "", *(f"{n:,}" for n in totals), style="bold")
    return table


def _memory_table(memory: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    title = f"GPU memory per rank of {memory['world_size']}, estimated"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for name in memory["gib_per_rank"]:
        chosen = " (chosen)" if name == f"zero{memory['zero_stage']}" else ""
        table.add_column(f"ZeRO-{name[-1]}{chosen}", justify="right")
    table.add_row(*(f"{gib:.1f} GiB" for gib in memory["gib_per_rank"].values()))
    return table


def _steps_line(report: dict[str, Any], config: RunConfig) -> str:
    if report["steps_per_epoch"] is None:
        missing = (
            "no training shards named"
            if not config.data or not config.data.train
            else (f"no shards at {config.data.train} yet")
        )
        return f"steps per epoch: unknown, {missing}"
    return (
        f"steps per epoch: {report['steps_per_epoch']:,} of {config.optim.global_batch} samples "
        f"({report['train_samples']:,} training samples)"
    )


def _base(config: RunConfig) -> str:
    return f"{config.model.family} {config.model.checkpoint or config.model.preset}"
