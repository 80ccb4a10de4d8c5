"""mmtrain compare: a table of stored runs, averaged over everything that is not grouped by."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmtrain.errors import MmtrainError, nearest

if TYPE_CHECKING:
    from mmtrain.tasks.interface import Metric
    from mmtrain.tracking.reading import RunStore, StoredRun

HELP = "compare the runs of an MLflow experiment: mean ± std, n, best"
_EXAMPLES = """examples:
  mmtrain compare mmtrain --by components.llm.r optim.lr --metric val/accuracy
  mmtrain compare mmtrain --by optim.lr --metric val/loss --study digits-shifted
  mmtrain compare mmtrain --by seed --metric val/loss --value last --html comparison.html"""
_DEFAULT_URI = "sqlite:///mlflow.db"
_CURVE = "train/loss"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("experiment", help="name of the MLflow experiment")
    parser.add_argument(
        "--by", nargs="+", required=True, metavar="KEY", help="run keys to group by, e.g. optim.lr"
    )
    parser.add_argument("--metric", required=True, help="what to compare, e.g. val/accuracy")
    parser.add_argument(
        "--value",
        choices=("best", "last"),
        default="best",
        help="of each run, its best or its last value (default: best)",
    )
    parser.add_argument(
        "--mode", choices=("max", "min"), help="what is better (default: as the runs declare it)"
    )
    parser.add_argument("--baseline", type=float, help="value of the unadapted base")
    parser.add_argument(
        "--uri", help=f"tracking URI (default: MLFLOW_TRACKING_URI, else {_DEFAULT_URI})"
    )
    parser.add_argument("--study", help="only this study's trials: its name or parent run id")
    for kind, flag in (("csv", "CSV"), ("markdown", "Markdown"), ("plot", "PNG"), ("html", "HTML")):
        parser.add_argument(f"--{kind}", type=Path, metavar="FILE", help=f"also write it as {flag}")


def run(args: argparse.Namespace) -> int:
    """Read, compare, print, write."""
    from rich.console import Console
    from rich.text import Text

    from mmtrain.report.comparison import compare, headline
    from mmtrain.report.direction import agreed_metric
    from mmtrain.report.tables import rich_table
    from mmtrain.report.write import all_notes, write_files
    from mmtrain.tracking.reading import RunStore

    store = RunStore(args.uri or os.environ.get("MLFLOW_TRACKING_URI") or _DEFAULT_URI)
    finished, notes = _finished(store.runs(args.experiment, args.study), args.experiment)
    _check_names(finished, args.by, args.metric)
    declared = [
        (run.name, run.declared(args.metric)) for run in finished if args.metric in run.metrics
    ]
    metric, more = agreed_metric(args.metric, declared, args.mode)
    rows = [_row(store, run, args, metric) for run in finished]
    result = compare(rows, args.by, metric, args.baseline)
    notes = [f"each run counts with its {args.value} {args.metric}", *more, *notes]
    console = Console()
    console.print(rich_table(result))
    for line in [*headline(result), *all_notes(result, notes)]:
        console.print(Text(line), soft_wrap=True)
    asked = {"csv": args.csv, "md": args.markdown, "png": args.plot, "html": args.html}
    paths = {kind: path for kind, path in asked.items() if path is not None}
    write_files(result, paths, f"{args.study or args.experiment}: {args.metric}", notes)
    for path in paths.values():
        console.print(Text(f"wrote {path}"), soft_wrap=True)
    return 0


def _finished(runs: Sequence[StoredRun], experiment: str) -> tuple[list[StoredRun], list[str]]:
    """The finished runs, and a note about the others."""
    finished = [run for run in runs if run.status == "FINISHED"]
    others = len(runs) - len(finished)
    if not finished:
        raise MmtrainError(
            f"experiment '{experiment}' has no finished run ({others} not finished).",
            "Let them finish, or choose another experiment or study.",
        )
    return finished, [f"not finished and left out: {others}"] if others else []


def _check_names(runs: Sequence[StoredRun], by: Sequence[str], metric: str) -> None:
    params = {name for run in runs for name in run.params}
    metrics = {name for run in runs for name in run.metrics}
    for key in by:
        if key not in params:
            raise MmtrainError(f"--by {key}: no run has this key;", nearest(key, params))
    if metric not in metrics:
        raise MmtrainError(f"--metric {metric}: no run has it;", nearest(metric, metrics))


def _row(
    store: RunStore, run: StoredRun, args: argparse.Namespace, metric: Metric
) -> dict[str, object]:
    row: dict[str, object] = {
        **run.params,
        "name": run.name,
        args.metric: run.metrics.get(args.metric),
    }
    if args.value == "best" and args.metric in run.metrics:
        points = store.points(run.run_id, args.metric)
        values = [value for _, value in points if math.isfinite(value)]
        row[args.metric] = min(values, key=metric.cost, default=None)
    if args.html and _CURVE in run.metrics:
        row["curve"] = store.points(run.run_id, _CURVE)
    return row
