"""mmtrain report: what a run's folder says, as text, an image and a page."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "summarize a run folder; writes plot.png and report.html into it"
_EXAMPLES = """examples:
  mmtrain report runs/llava7b-lora-scienceqa
  mmtrain report runs/llava7b-lora-scienceqa --sync   first send what MLflow has not got yet"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run_dir", type=Path, help="run folder")
    parser.add_argument(
        "--sync", action="store_true", help="send what the tracker could not send during the run"
    )
    parser.add_argument("--uri", help="with --sync: tracking URI, where its password is needed")


def run(args: argparse.Namespace) -> int:
    """Print the summary and write the files."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mmtrain.report.plot import plot_run
    from mmtrain.report.summary import html_page, results, summarize

    summary = summarize(args.run_dir)
    console = Console()
    if args.sync:
        from mmtrain.tracking.tracker import sync
        from mmtrain.training.run_folder import ended_as

        run_id = sync(args.run_dir, args.uri, ended_as(args.run_dir))
        console.print(Text(f"sent to MLflow run {run_id}"))
    for title, facts in ((summary.name, results(summary)), ("settings", summary.params)):
        table = Table(title=Text(title), title_justify="left", show_header=False, box=None)
        for name, value in facts.items():
            table.add_row(Text(name, style="dim"), Text(value))
        console.print(table)
    page = args.run_dir / "report.html"
    page.write_text(html_page(summary), "utf-8")
    for path in (plot_run(args.run_dir), page):
        console.print(Text(f"wrote {path}"), soft_wrap=True)
    return 0
