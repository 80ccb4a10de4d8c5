"""Images, drawn without a display and without matplotlib's global state."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.errors import MmtrainError
from mmtrain.files import replace_file
from mmtrain.report.comparison import Statistics, label
from mmtrain.report.units import PERCENT, direction_text, unit_of, value_text, with_arrow
from mmtrain.tasks.interface import Metric
from mmtrain.tracking.declared import read_declared
from mmtrain.tracking.journal import JOURNAL_NAME, JournalEntry, RunJournal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#8a6d3b", "#5a6772", "#b3261e")
GREY = "#787774"
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b4b4b0",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ececea",
    "xtick.color": "#55534e",
    "ytick.color": "#55534e",
    "legend.frameon": False,
    "text.parse_math": False,  # names of runs may hold dollar signs
}
_MAX_CURVES = 60
_MAX_GROUPS = 40
_SMOOTHED_SHARE = 0.05
# In widths of the plot.
_FAR_BASELINE = 0.6
_VALIDATION = "validation"
_FROM_ZERO = ("gradient norm", "samples per second", "peak memory in GiB")
Points = list[tuple[int, float]]


def plot_run(run_dir: Path) -> Path:
    """Draw plot.png in a run's folder from its journal: losses, metrics, learning rate, speed."""
    run_dir = Path(run_dir)
    entries = RunJournal.read(run_dir / JOURNAL_NAME)
    if not entries:
        raise MmtrainError(
            f"{run_dir / JOURNAL_NAME} has no complete line.", "Train at least one step first."
        )
    path = run_dir / "plot.png"
    replace_file(path, run_png(entries, read_declared(run_dir)))
    return path


def run_png(entries: Sequence[JournalEntry], declared: Mapping[str, Metric]) -> bytes:
    """The curves of one run; `declared` says what its metrics are counted in."""
    series = series_of(entries)
    panels = _panels(series, declared)

    def draw(figure: Figure) -> None:
        columns = min(2, len(panels))
        rows = -(-len(panels) // columns)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, (title, names) in zip(axes, panels):
            _draw_panel(axis, title, {name: series[name] for name in names}, declared)
            if title == _VALIDATION:
                _set_unit(axis.yaxis, unit_of(names[0], declared))
        for axis in axes[len(panels) :]:
            axis.set_visible(False)

    return _png(draw, width=10.0 if len(panels) > 1 else 6.4, height=3.3 * -(-len(panels) // 2))


def series_of(entries: Sequence[JournalEntry]) -> dict[str, Points]:
    """Metric name -> its points."""
    series: dict[str, Points] = {}
    for entry in entries:
        for name, value in entry.metrics.items():
            series.setdefault(name, []).append((entry.step, value))
    return series


def _panels(
    series: dict[str, Points], declared: Mapping[str, Metric]
) -> list[tuple[str, list[str]]]:
    """Which metrics share axes: those of one kind, scores those of one unit."""
    losses = [name for name in series if name in ("train/loss", "val/loss")]
    scores: dict[str, list[str]] = {}
    for name in series:
        if name.startswith("val/") and name not in losses:
            scores.setdefault(unit_of(name, declared), []).append(name)
    rest = [
        (title, [name])
        for title, name in (
            ("learning rate", "train/lr"),
            ("gradient norm", "train/grad_norm"),
            ("samples per second", "train/samples_per_s"),
            ("peak memory in GiB", "memory/peak_gib"),
        )
        if name in series
    ]
    panels = [("loss", losses), *((_VALIDATION, names) for names in scores.values()), *rest]
    chosen = [(title, names) for title, names in panels if names]
    return chosen or [("metrics", list(series))]


def _draw_panel(
    axis: Axes, title: str, series: dict[str, Points], declared: Mapping[str, Metric]
) -> None:
    from matplotlib.ticker import MaxNLocator

    for index, (name, points) in enumerate(sorted(series.items())):
        colour = COLOURS[index % len(COLOURS)]
        steps, values = zip(*points)
        text = with_arrow(name, declared)
        if name.startswith("val/"):
            axis.plot(steps, values, "o-", color=colour, markersize=4, linewidth=1.6, label=text)
        elif len(points) < 30:
            axis.plot(steps, values, color=colour, linewidth=1.6, label=text)
        else:
            axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
            axis.plot(steps, smoothed(values), color=colour, linewidth=1.8, label=text)
    axis.set_title(title)
    axis.set_xlabel("optimizer step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if title in _FROM_ZERO:
        axis.set_ylim(bottom=0.0)
    if len(series) > 1 or title in ("loss", _VALIDATION):
        axis.legend(fontsize=9)


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over a centred window of about a twentieth of the points."""
    half = max(1, int(len(values) * _SMOOTHED_SHARE / 2))
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def comparison_png(result: Statistics) -> bytes:
    """Each group's runs as dots, their mean and standard deviation as a bar with whiskers."""
    groups = result.groups[:_MAX_GROUPS]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for row, group in enumerate(groups):
            colour = COLOURS[0] if row == 0 else GREY
            axis.errorbar(
                group.mean,
                row,
                xerr=group.std or 0.0,
                fmt="D",
                color=colour,
                markersize=6,
                capsize=4,
                elinewidth=1.6,
            )
            axis.plot(
                group.values,
                [row + 0.18] * group.n,
                "o",
                markersize=5,
                markerfacecolor="none",
                markeredgecolor=colour,
                alpha=0.8,
            )
        _mark_baseline(axis, result)
        axis.set_yticks(range(len(groups)), [label(result, group.key) for group in groups])
        axis.set_ylim(len(groups) - 0.5, -0.6)
        axis.grid(axis="y", visible=False)
        _title_comparison(axis, result)

    return _png(draw, width=8.4, height=1.5 + 0.42 * len(groups))


def _mark_baseline(axis: Axes, result: Statistics) -> None:
    """A line at the baseline; a far one is only named, or it would squeeze the runs together."""
    baseline = result.baseline
    if baseline is None:
        return
    low, high = axis.get_xlim()
    reach = _FAR_BASELINE * (high - low)
    text = f"base {value_text(result.metric.unit, baseline)}"
    if low - reach <= baseline <= high + reach:
        axis.axvline(baseline, color=COLOURS[7], linestyle="--", linewidth=1.2)
        axis.annotate(
            text,
            (baseline, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, -10),
            textcoords="offset points",
            color=COLOURS[7],
            fontsize=9,
        )
        return
    left = baseline < low
    axis.text(
        0.005 if left else 0.995,
        0.98,  # the best group is at the top and on the other side
        f"← {text}" if left else f"{text} →",
        transform=axis.transAxes,
        va="top",
        ha="left" if left else "right",
        color=COLOURS[7],
        fontsize=9,
    )


def _title_comparison(axis: Axes, result: Statistics) -> None:
    _set_unit(axis.xaxis, result.metric.unit)
    better = direction_text(result.metric)
    axis.set_title(f"{result.metric.name}: ◆ mean ± std, ○ single runs ({better})", fontsize=10)


def _set_unit(axis: Axis, unit: str) -> None:
    """Shares in percent at every tick; another unit once, at the axis."""
    from matplotlib.ticker import FuncFormatter

    if unit == PERCENT:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    elif unit:
        axis.set_label_text(unit)


def curves_png(result: Statistics) -> bytes | None:
    """The training loss of every run, coloured by group; None when no run has a curve."""
    runs = [run for run in result.runs if len(run.curve) > 1][:_MAX_CURVES]
    if not runs:
        return None
    order = [group.key for group in result.groups]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for key in order[: len(COLOURS)]:
            members = [run for run in runs if run.key == key]
            for number, run in enumerate(members):
                steps, values = zip(*run.curve)
                axis.plot(
                    steps,
                    smoothed(values),
                    color=COLOURS[order.index(key)],
                    linewidth=1.4,
                    alpha=0.85,
                    label=label(result, key) if number == 0 else None,
                )
        for run in (run for run in runs if run.key in order[len(COLOURS) :]):
            steps, values = zip(*run.curve)
            axis.plot(steps, smoothed(values), color="#c9c8c4", linewidth=0.8, zorder=1)
        axis.set_title("training loss (smoothed), one line a run")
        axis.set_xlabel("optimizer step")
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))

    return _png(draw, width=8.4, height=3.6)


def _png(draw: Callable[[Any], None], width: float, height: float) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
        draw(figure)
        out = io.BytesIO()
        FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()
