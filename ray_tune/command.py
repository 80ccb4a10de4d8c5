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
  mmtrain tune paper/002 --table 1 --dry-run        a paper's table, neither data nor models
  mmtrain tune paper/002 --table 1 --data shards --models /data/models
Exits with 1 only when every trial failed."""
ALL_FAILED = 1


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("study_file", help="YAML study file, or paper/ID (000 to 004)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    parser.add_argument(
        "--resume", action="store_true", help="go on where the study's folder stands, if it exists"
    )
    parser.add_argument("--address", help="Ray cluster to join; default: a private one here")
    parser.add_argument("--dry-run", action="store_true", help="check and list the trials only")
    parser.add_argument("--table", help="of paper/ID: which")
    parser.add_argument("--data", metavar="DIR", help="where relative folders of shards lie")
    parser.add_argument(
        "--models", metavar="DIR", help="where presets lie, in folders of their name"
    )


def run(args: argparse.Namespace) -> int:
    """Check, run, compare; of a table, one column after another."""
    from rich.console import Console
    from rich.text import Text

    from ray_tune.papers import placed, refuse_missing, study_path
    from ray_tune.study import load_study
    from ray_tune.table import write_study_table
    from ray_tune.trials import check_trials, columns_of, expand

    path = study_path(args.study_file, args.table)
    study = placed(load_study(path, args.overrides), args.data, args.models)
    parts = columns_of(study)
    trials = {name: expand(part) for name, part in parts.items()}
    metrics = {name: check_trials(part, trials[name], str(path)) for name, part in parts.items()}
    console = Console(highlight=False, soft_wrap=True)
    if args.dry_run:
        for name, part in parts.items():
            console.print(_listing(part, trials[name]))
        return 0
    if study.columns:
        refuse_missing((trial for part in trials.values() for trial in part), str(path))
    journals: dict[str, Journal] = {}
    codes = []
    for name, part in parts.items():
        code, journals[name] = _run_study(part, trials[name], metrics[name], args, console)
        codes.append(code)
        if study.columns:
            paths = write_study_table(study, metrics, journals)
            console.print(Text(f"table so far: {paths['html']}"))
    return min(codes)


def _run_study(
    study: Study, trials: list[Trial], metric: Metric, args: argparse.Namespace, out: Console
) -> tuple[int, Journal]:
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
        return _conclude(study, journal, tracking["uri"], out), journal


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
    for column in ("trial", *study.varied):
        table.add_column(column, overflow="fold")
    for trial in trials:
        values = (trial.params.get(key, "") for key in study.varied)
        table.add_row(trial.name, *(Text(str(value)) for value in values))
    return table
