"""`mmtrain check`: what a run file would train, counted on the meta device; no weights, no GPU."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.commands.arguments import positive
from mmtrain.config.deepspeed import find_deepspeed_config, zero_stage
from mmtrain.config.schema import RunConfig
from mmtrain.data.manifest import read_manifest
from mmtrain.resolve import resolve

if TYPE_CHECKING:
    from rich.table import Table

HELP = "check a run file and count what it trains; needs no weights and no GPU"
EXAMPLES = """examples:
  mmtrain check run.yaml
  mmtrain check run.yaml components.llm.r=64 --world-size 16
  mmtrain check run.yaml --json
"""
DEFAULT_WORLD_SIZE = 8
GIB = 2**30


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
        help="tokens per sample in the memory estimate "
        "(default: those of an image and a question)",
    )
    parser.add_argument(
        "--answer-tokens",
        type=positive,
        metavar="N",
        help="of these, tokens of the answer (default: generation.max_new_tokens)",
    )


def run(args: argparse.Namespace) -> int:
    """Check, count, print."""
    launched = os.environ.get("WORLD_SIZE", "")
    world_size = args.world_size or (int(launched) if launched.isdecimal() else None)
    config = resolve(args.run_file, args.overrides, world_size)
    report = examine(config, world_size or DEFAULT_WORLD_SIZE, args.tokens, args.answer_tokens)
    if args.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        _print_tables(report, config)
    return 0


def examine(
    config: RunConfig,
    world_size: int,
    num_tokens: int | None = None,
    num_answer_tokens: int | None = None,
) -> dict[str, Any]:
    """Everything `check` reports, as JSON data."""
    from mmtrain.planning.census import count, usual_size
    from mmtrain.planning.memory import memory_by_stage

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
    from mmtrain.models.weights import check_files, has_weights

    if config.model.checkpoint is not None and has_weights(Path(config.model.checkpoint)):
        check_files(Path(config.model.checkpoint))


def _steps(config: RunConfig) -> dict[str, Any]:
    """Samples and steps per epoch, where the training shards are at hand."""
    unknown: dict[str, Any] = {"train_samples": None, "steps_per_epoch": None}
    if config.data is None or config.data.train is None:
        return unknown
    samples = _num_samples(config.data.train, config.data.task)
    if samples is None:
        return unknown
    samples = min(samples, config.data.limit or samples)
    return {
        "train_samples": samples,
        "steps_per_epoch": -(-samples // config.optim.global_batch),
    }


def _num_samples(shards: str, task: str) -> int | None:
    """Samples in a folder of shards, by its manifest; None where there is none yet."""
    folder = Path(shards)
    return read_manifest(folder, task)[0].samples if folder.is_dir() else None


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
        f"{memory['micro_batch']} samples x {memory['tokens_per_sample']} tokens"
        f" ({memory['answer_tokens_per_sample']} of the answer) per forward{recompute};"
        " plan others with --world-size N, --tokens N, --answer-tokens N"
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
    table.add_column("GiB")
    for name in memory["gib_per_rank"]:
        chosen = " (chosen)" if name == f"zero{memory['zero_stage']}" else ""
        table.add_column(f"ZeRO-{name[-1]}{chosen}", justify="right")
    stages = memory["parts_gib_per_rank"].values()
    for part in next(iter(stages)):
        table.add_row(part, *(f"{stage[part]:.1f}" for stage in stages))
    table.add_section()
    totals = memory["gib_per_rank"].values()
    table.add_row("total", *(f"{total:.1f}" for total in totals), style="bold")
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
