"""`mmtrain check`: what a run file would train, counted on the meta device; no weights, no GPU."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.commands.arguments import positive
from mmtrain.config.schema import RunConfig
from mmtrain.data.remote import place_of_shards
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
    from mmtrain.planning.report import examine  # with torch, which no error should wait for

    report = examine(config, world_size or DEFAULT_WORLD_SIZE, args.tokens, args.answer_tokens)
    if args.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        _print_tables(report, config)
    return 0


def _print_tables(report: dict[str, Any], config: RunConfig) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(_component_table(report, f"{config.name}: {_base(config)}"))
    for part in report["components"].values():
        for block_name, notes in part["notes"].items():
            console.print(f"{block_name}: {'; '.join(notes)}")
    console.print(f"trainable: {report['trainable_percent']:.4f} % of base and added parameters")
    console.print(_steps_line(report, config))
    if report["remote_data"]:
        console.print(_remote_line(report["remote_data"]))
    console.print(_memory_table(report["memory"]))
    memory = report["memory"]
    recompute = " with activation checkpointing" * config.parallel.activation_checkpointing
    console.print(
        f"{memory['micro_batch']} samples x {memory['tokens_per_sample']} tokens"
        f" ({memory['answer_tokens_per_sample']} of the answer) per forward{recompute};"
        " plan others with --world-size N, --tokens N, --answer-tokens N"
    )
    flops = report["flops_per_sample"]
    console.print(
        f"{flops['counted'] / 1e12:.2f} TFLOPs per sample to train, counted (gradients of"
        f" activations through frozen weights included); {flops['by_formula'] / 1e12:.2f} by"
        " (2 frozen + 4 trained parameters) x tokens"
    )
    answer = report["answer_flops_per_token"]["by_formula"]
    console.print(
        f"{answer / 1e9:.2f} GFLOPs per token of an answer, by 2 x (decoder without embeddings +"
        " layers x width x tokens before it)"
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
        for row in _placed_rows(part):
            table.add_row(*row, style="dim")
    table.add_section()
    totals = [report[key] for key in ("base_params", "peft_params", "trainable_params")]
    table.add_row("total", "", "", "", *(f"{n:,}" for n in totals), style="bold")
    return table


def _placed_rows(part: dict[str, Any]) -> list[list[str]]:
    """What a component's blocks add to which sublayer, where it is more than one."""
    rows = [
        [f"  {block_name} {sublayer}".rstrip(), "", "", f"{modules:,}", "", f"{params:,}", ""]
        for block_name, sublayers in part["placed"].items()
        for sublayer, (modules, params) in sublayers.items()
    ]
    return rows if len(rows) > 1 else []


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


def _steps_line(report: dict[str, object], config: RunConfig) -> str:
    if report["steps_per_epoch"] is None:
        named = [part.train for part in config.data.parts.values()] if config.data else []
        places = [place_of_shards(folder) for folder in named if folder]
        absent = [place for place in places if isinstance(place, Path) and not place.is_dir()]
        missing = f"no shards at {absent[0]} yet" if absent else "no training shards named"
        return f"steps per epoch: unknown, {missing}"
    return (
        f"steps per epoch: {report['steps_per_epoch']:,} of {config.optim.global_batch} samples "
        f"({report['train_samples']:,} training samples)"
    )


def _remote_line(data: dict[str, Any]) -> str:
    """What shards behind URLs ask of the cache, and of its disk."""
    line = (
        f"shards behind URLs: {data['gib']:.3g} GiB, {data['to_fetch_gib']:.3g} of them still to be"
        f" fetched into {data['cache']}"
    )
    if data["windows"] > 1:
        line += (
            f"; more than data.cache_gib {data['cache_gib']:g} holds: an epoch moves through"
            f" {data['windows']} windows of at most {data['window_gib']:.3g} GiB and mixes samples"
            " within each"
        )
    asked = min(data["to_fetch_gib"], data["cache_gib"])
    if data["free_gib"] < asked:
        line += (
            f"; its disk has {data['free_gib']:.3g} GiB free: make room, set data.cache_dir to"
            " another disk, or lower data.cache_gib"
        )
    return line


def _base(config: RunConfig) -> str:
    return f"{config.model.family} {config.model.checkpoint or config.model.preset}"
