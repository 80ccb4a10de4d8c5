"""One live line and one line per trial; nothing of Ray's own."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mmtrain.report.units import value_text
from ray_tune.journal import FAILED, FINISHED, RUNNING, STOPPED, Journal, Record

_MARKS = {FINISHED: "green", STOPPED: "yellow", FAILED: "red"}


class View:
    """What the person at the terminal sees of a study. Copies of it (Ray makes one) are mute."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._console = Console(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self.at_a_time = 1

    def __reduce__(self) -> tuple[object, ...]:
        return (View, (self._journal,))

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(Text(text))

    def started(self, record: Record) -> None:
        """A trial begins."""
        if self._live is None:
            again = f" (attempt {record.attempts})" if record.attempts > 1 else ""
            self.say(f"started   {record.name}{again}")
        self.refresh()

    def ended(self, record: Record) -> None:
        """A trial is finished, stopped or failed."""
        line = Text(f"{record.status:<9} ", style=_MARKS.get(record.status, ""))
        line.append(f"{record.name}  {self._result(record)}", style="default")
        self._console.print(line)
        if self._live is None:
            self.say(f"          {summary(self._journal, self.at_a_time)}")
        self.refresh()

    def refresh(self) -> None:
        """Draw the live line anew."""
        if self._live is not None:
            line = Text(summary(self._journal, self.at_a_time))
            self._live.update(line, refresh=True)

    def _result(self, record: Record) -> str:
        if record.status == FAILED:
            return record.reason
        metric = self._journal.metric
        best = record.best(metric)
        value = "no value"
        if best:
            value = f"{metric.name} {value_text(metric.unit, best[0])} at step {best[1]}"
        trained = f", {record.training_seconds:.0f} s of them training"
        return f"{value}, {record.seconds:.0f} s{trained if record.training_seconds else ''}"


def summary(journal: Journal, at_a_time: int) -> str:
    """`5/8 trials done, 1 running, 1 failed; about 2 min left; best val/accuracy 94.7 % (name)`."""
    total = len(journal.records)
    failed = journal.count(FAILED)
    done = journal.count(FINISHED) + journal.count(STOPPED)
    parts = [f"{done}/{total} trials done, {journal.count(RUNNING)} running, {failed} failed"]
    left_s = seconds_left(journal, at_a_time)
    if left_s is not None:
        parts.append(f"about {_duration(left_s)} left")
    metric = journal.metric
    best = journal.best((FINISHED, STOPPED, RUNNING))
    found = best.best(metric) if best else None
    if best and found:
        parts.append(f"best {metric.name} {value_text(metric.unit, found[0])} ({best.name})")
    return "; ".join(parts)


def seconds_left(journal: Journal, at_a_time: int) -> float | None:
    """The mean time of past trials times the rounds that are left; None before the first."""
    past = [record.seconds for record in journal.records.values() if record.seconds > 0]
    num_left = len(journal.unsettled()) - journal.count(FAILED)
    if not past or num_left <= 0:
        return None
    rounds = -(-num_left // max(at_a_time, 1))
    return rounds * sum(past) / len(past)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
