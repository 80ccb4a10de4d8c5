"""Which way a metric of stored runs is better: what they say themselves, never its name."""

from __future__ import annotations

from collections.abc import Sequence

from mmtrain.errors import MmtrainError
from mmtrain.tasks.interface import Metric

_GIVE_MODE = "Give --mode max (more is better) or --mode min (less is better)."
_NAMED_AT_MOST = 5


def agreed_metric(
    name: str, declared: Sequence[tuple[str, Metric | None]], mode: str | None = None
) -> tuple[Metric, list[str]]:
    """The metric as its runs declare it, and notes; `declared` are the runs with the metric.

    Runs that contradict each other, or of which none says anything, need a `mode`.
    """
    said = list(dict.fromkeys(metric for _, metric in declared if metric is not None))
    if mode is not None:
        return _as_asked(name, said, mode)
    if not said:
        raise MmtrainError(
            f"no run says whether more or less {name} is better: it has no direction, or an older"
            " version stored the runs.",
            _GIVE_MODE,
        )
    if len(said) > 1:
        examples = ", ".join(
            f"{_example(metric, declared)}: {_in_words(metric)}" for metric in said
        )
        raise MmtrainError(
            f"the runs do not mean the same by {name} ({examples}).",
            f"Compare runs of one task, e.g. one --study. {_GIVE_MODE}",
        )
    silent = [run for run, metric in declared if metric is None]
    if not silent:
        return said[0], []
    few = ", ".join(silent[:_NAMED_AT_MOST]) + (", …" if len(silent) > _NAMED_AT_MOST else "")
    note = f"{len(silent)} stored without a direction of {name}, read like the others: {few}"
    return said[0], [note]


def _as_asked(name: str, said: Sequence[Metric], mode: str) -> tuple[Metric, list[str]]:
    units = {metric.unit for metric in said}
    asked = Metric(name, mode == "max", units.pop() if len(units) == 1 else "")
    contrary = any(metric.mode != mode for metric in said)
    return asked, [f"--mode {mode}, against what runs declare of {name}"] if contrary else []


def _example(metric: Metric, declared: Sequence[tuple[str, Metric | None]]) -> str:
    return next(run for run, other in declared if other == metric)


def _in_words(metric: Metric) -> str:
    unit = f" in {metric.unit}" if metric.unit else ""
    return f"{'more' if metric.larger_is_better else 'less'} is better{unit}"
