"""Values as people read them: a share in percent, everything else with its unit behind it."""

from __future__ import annotations

from collections.abc import Mapping

from mmtrain.tasks.interface import Metric

NOTHING = "—"
PERCENT = "%"


def value_text(unit: str, value: float | None) -> str:
    """One value: `94.2 %`, `0.4231`, `7.25 GiB`."""
    if value is None:
        return NOTHING
    if unit == PERCENT:
        return f"{100 * value:.1f} %"
    return f"{value:.4g} {unit}".rstrip()


def spread_text(unit: str, mean: float, std: float | None) -> str:
    """Mean ± standard deviation."""
    if std is None:
        return f"{value_text(unit, mean)} ± {NOTHING}"
    if unit == PERCENT:
        return f"{100 * mean:.1f} ± {100 * std:.1f} %"
    return f"{mean:.4g} ± {std:.2g} {unit}".rstrip()


def gain_text(unit: str, gain: float) -> str:
    """A difference, with its sign."""
    if unit == PERCENT:
        return f"{100 * gain:+.1f} points"
    return f"{gain:+.4g} {unit}".rstrip()


def table_unit(metric: Metric) -> tuple[str, str]:
    """The unit behind each number of a table, and what its column's name ends with.

    A longer unit than percent stands once, at the top.
    """
    if metric.unit in ("", PERCENT):
        return metric.unit, ""
    return "", f" in {metric.unit}"


def unit_of(name: str, declared: Mapping[str, Metric]) -> str:
    """The unit that a run declares; none for what it does not."""
    return declared[name].unit if name in declared else ""


def with_arrow(name: str, declared: Mapping[str, Metric]) -> str:
    """The name with an arrow that points where it is better, as papers write it."""
    if name not in declared:
        return name
    return f"{name} {'↑' if declared[name].larger_is_better else '↓'}"


def direction_text(metric: Metric) -> str:
    """`higher is better` or `lower is better`."""
    return f"{'higher' if metric.larger_is_better else 'lower'} is better"
