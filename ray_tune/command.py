"""mmtrain tune: run a study and compare its trials."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from mmtrain.tasks.interface import Metric
    from ray_tune.journal import Journal
    from ray_tune.study import Study
    from ray_tune.trials import Trial

HELP = "run a study (grid or random search over any run key) and compare its trials"
_EXAMPLES = """examples:
  mmtrain tune study.yaml --dry-run                 list the trials
  mmtrain tune study.yaml                           run them on this machine
  mmtrain tune study.yaml --resume                  go on after a crash or Ctrl-C
  mmtrain tune study.yaml --address 10.0.0.1:6379   on a Ray cluster that is there already
  mmtrain tune study.yaml base.optim.epochs=1 search.optim.lr.grid=[1e-4,2e-4]
Exits with 1 only when every trial failed."""
ALL_FAILED = 1


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("study_file", help="YAML study file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    parser.add_argument(
        "--resume", action="store_true", help="go on where the study's folder stands, if it exists"
    )
    parser.add_argument("--address", help="Ray cluster to join; default: a private one here")
    parser.add_argument("--dry-run", action="store_true", help="check and list the trials only")


def run(args: argparse.Namespace) -> int:
    """Check, run, compare."""
    from rich.console import Console

    from ray_tune.study import load_study
    from ray_tune.trials import check_trials, expand

    study = load_study(args.study_file, args.overrides)
    trials = expand(study)
    metric = check_trials(study, trials, args.study_file)
    console = Console(highlight=False, soft_wrap=True)
    if args.dry_run:
        console.print(_listing(study, trials))
        return 0
    return _run_study(study, trials, metric, args, console)


def _run_study(
    study: Study, trials: list[Trial], metric: Metric, args: argparse.Namespace, out: Console
) -> int:
    from ray_tune.journal import open_journal, study_lock

    with study_lock(Path(study.study_dir)) as lock:
        journal = open_journal(study, trials, metric, args.resume)
        tracking = trials[0].tracking
        from ray_tune.outcome import baseline_value, open_parent

        baseline_value(study)  # a missing file must show before hours of training
        parent = open_parent(study, journal, tracking)
        trials = [trial.with_tag(parent) for trial in trials]
        left = journal.unsettled()
        out.print(f"study {study.name}: {len(trials)} trials, {len(left)} to run")
        if left:
            _execute(study, trials, journal, args.address, lock)
        return _conclude(study, journal, tracking["uri"], out)


def _execute(
    study: Study, trials: list[Trial], journal: Journal, address: str | None, lock: Any
) -> None:
    from ray_tune.executor import run_trials
    from ray_tune.progress import View

    with View(journal) as view:
        try:
            run_trials(study, trials, journal, view, address, lock)
        except KeyboardInterrupt:
            view.say("interrupted: the same command with --resume goes on from here")
            raise


def _conclude(study: Study, journal: Journal, uri: str, out: Console) -> int:
    from rich.text import Text

    from ray_tune.journal import FINISHED
    from ray_tune.outcome import close_parent, compare_trials, plot_trials, write_results

    files = [write_results(study, journal)]
    plot_trials(journal)
    if not journal.count(FINISHED):
        close_parent(study, journal, uri, files)
        out.print(Text(f"every trial failed or was stopped; reasons: {files[0]}"))
        return ALL_FAILED
    comparison = compare_trials(study, journal)
    files += comparison.paths.values()
    close_parent(study, journal, uri, files)
    out.print(comparison.table())
    for line in comparison.lines():
        out.print(Text(line))
    best = journal.best()
    assert best is not None, "a finished trial has a value of the metric"
    out.print(Text(f"best trial's folder: {Path(study.study_dir) / 'trials' / best.name}"))
    out.print(Text(f"page with plots: {comparison.paths['html']}"))
    return 0


def _listing(study: Study, trials: list[Trial]) -> object:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"study {study.name}: {len(trials)} trials", title_justify="left")
    for column in ("trial", *study.search):
        table.add_column(column, overflow="fold")
    for trial in trials:
        table.add_row(trial.name, *(Text(str(value)) for value in trial.params.values()))
    return table
