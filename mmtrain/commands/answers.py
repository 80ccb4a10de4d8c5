"""mmtrain answers: what runs answered to the same questions, and how sure the difference is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mmtrain.commands.arguments import positive

if TYPE_CHECKING:
    from mmtrain.data.shards import ShardFolder

HELP = "compare runs' answers sample by sample: intervals, paired differences, a page"
_EXAMPLES = """examples:
  mmtrain answers runs/lora runs/ia3                     what validation asked last
  mmtrain answers runs/lora runs/lora/evaluation/test-base --split test
  mmtrain answers runs/lora --split test --data shards/scienceqa/test --out test.html"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders of predictions"
    )
    parser.add_argument("--split", default="val", help="folder in evaluation/ (default: val)")
    parser.add_argument(
        "--data", help="shard folder with the pictures; default: the run's data.val"
    )
    parser.add_argument("--num", type=positive, default=60, metavar="N", help="samples on the page")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("answers.html"),
        metavar="FILE",
        help="default: %(default)s",
    )


def run(args: argparse.Namespace) -> int:
    """Print the comparison and write the page."""
    from rich.console import Console
    from rich.table import Table

    from mmtrain.files import replace_file
    from mmtrain.report import answers

    compared = answers.compare([answers.read_answers(one, args.split) for one in args.runs])
    console = Console()
    table = Table("run", "samples", "score", "95 % interval")
    for found, (mean, interval) in zip(compared.runs, compared.intervals(), strict=True):
        limits = f"{interval.low:.4f} to {interval.high:.4f}"
        table.add_row(found.name, str(len(compared.ids)), f"{mean:.4f}", limits)
    console.print(table)
    if len(compared.runs) > 1:
        gains = Table(*answers.GAIN_HEADER, title=f"Beside {compared.runs[0].name}")
        for found, gain in zip(compared.runs[1:], compared.gains(), strict=True):
            gains.add_row(*answers.gain_row(found, gain))
        console.print(gains)
        console.print("by chance: how often random signs give a difference as large")
    page = answers.answers_page(compared, _shards(args, compared.runs[0].folder), args.num)
    replace_file(args.out, page)
    print(f"wrote {args.out}: open it in a browser")
    return 0


def _shards(args: argparse.Namespace, predictions: Path) -> ShardFolder | None:
    """The folder with the pictures; the page does without where none is known."""
    from mmtrain.config.load import load_run_file
    from mmtrain.data.cache import ShardCache
    from mmtrain.data.remote import place_of_shards
    from mmtrain.data.shards import ShardFolder

    if args.data:
        return ShardFolder.open(args.data)
    run_file = predictions.resolve().parents[1] / "run.yaml"
    if args.split != "val" or not run_file.is_file():
        return None
    data = load_run_file(run_file).data
    place = place_of_shards(data.val) if data and data.val else None
    if data is None or place is None or (isinstance(place, Path) and not place.is_dir()):
        return None
    return ShardFolder.open(place, cache=ShardCache.at(data.cache_dir, data.cache_gib))
