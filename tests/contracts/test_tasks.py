"""What every task must do. Tasks are found by listing their folder; none is named here.

A task that needs raw files brings a small sample of them in tests/golden/tasks/<task>/raw/.
Its prompts stand in tests/golden/tasks/<task>/<template>.txt, to be read by a person;
`python -m tests.contracts.test_tasks` writes them anew after an intended change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from data_shards.writer import ShardWriter
from mmtrain import plugins
from mmtrain.data.shards import ShardFolder
from mmtrain.errors import DataError
from mmtrain.tasks.interface import LOSS, Rendered, Sample, Task
from mmtrain.tasks.metrics import ANSWERED

GOLDEN = Path(__file__).parents[1] / "golden" / "tasks"
TASKS = plugins.names("task")
TEMPLATES = [
    (name, template) for name in TASKS for template in plugins.load("task", name).templates
]
_SAMPLES_AT_MOST = 5


def _all_samples(name: str, split: str) -> Iterator[Sample]:
    """Those of the files beside the golden prompts; what a task drops is its own tests' matter."""
    task: Task = plugins.load("task", name)
    raw = GOLDEN / name / "raw" if task.needs_raw else None
    found = task.read(raw, split, task.build_options())
    return (sample for sample in found if isinstance(sample, Sample))


def _samples(name: str, split: str) -> list[Sample]:
    return list(islice(_all_samples(name, split), _SAMPLES_AT_MOST))


def _scored(name: str) -> list[Sample]:
    """All of the small raw files: a metric may be about some samples only."""
    task: Task = plugins.load("task", name)
    split = task.splits[0]
    return list(_all_samples(name, split)) if task.needs_raw else _samples(name, split)


def _readable(sample: Sample, rendered: Rendered) -> str:
    lines = [f"=== {sample.id}, {len(sample.images)} picture(s)"]
    for turn in rendered.turns:
        shown = f", {turn.images} before it" if turn.images else ""
        lines.append(f"[{turn.role}{shown}] {turn.text}")
    lines += [f"[target] {rendered.target}"]
    if rendered.instruction is not None:
        lines += [f"[instruction] {rendered.instruction}"]
    lines += [f"[candidates] {' | '.join(rendered.candidates)}", ""]
    return "\n".join(lines)


def _golden_text(name: str, template: str) -> str:
    task: Task = plugins.load("task", name)
    samples = _samples(name, task.splits[0])
    return "\n".join(_readable(sample, task.templates[template](sample)) for sample in samples)


def test_there_are_tasks() -> None:
    assert {"digits", "scienceqa"} <= set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_declares_what_it_is(name: str) -> None:
    task: Task = plugins.load("task", name)
    assert task.description and task.splits and task.templates
    # A benchmark that nobody trains on has a test split alone.
    assert "train" in task.splits or task.splits == ("test",)
    for field in task.build_options.model_fields.values():
        assert field.description, "every build option says what it does"
    with pytest.raises(ValueError):
        task.build_options.model_validate({"no_such_option": 1})


@pytest.mark.parametrize("name", TASKS)
def test_reads_the_same_samples_twice_with_unique_ids(name: str) -> None:
    task: Task = plugins.load("task", name)
    for split in task.splits:
        samples = _samples(name, split)
        assert samples, f"{split} is empty"
        assert samples == _samples(name, split)
        assert len({sample.id for sample in samples}) == len(samples)


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_sample(name: str) -> None:
    task: Task = plugins.load("task", name)
    raw = GOLDEN / name / "raw" if task.needs_raw else None
    seen: set[str] = set()
    for split in task.splits:
        ids = {sample.id for sample in task.read(raw, split, task.build_options())}
        assert not ids & seen
        seen |= ids


@pytest.mark.parametrize("name", TASKS)
def test_samples_survive_shards(name: str, tmp_path: Path) -> None:
    task: Task = plugins.load("task", name)
    samples = _samples(name, task.splits[0])
    writer = ShardWriter(tmp_path, samples_per_shard=2)
    for sample in samples:
        writer.add(sample)
    writer.finish(name, task.splits[0], 0, None, {})
    folder = ShardFolder.open(tmp_path)
    assert [folder.read(i) for i in range(len(folder))] == samples


@pytest.mark.parametrize(("name", "template"), TEMPLATES)
def test_prompts_are_the_golden_ones(name: str, template: str) -> None:
    path = GOLDEN / name / f"{template}.txt"
    assert path.is_file(), f"write {path} with: python -m tests.contracts.test_tasks"
    assert _golden_text(name, template) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "template"), TEMPLATES)
def test_targets_score_best_and_nonsense_worst(name: str, template: str) -> None:
    task: Task = plugins.load("task", name)
    samples = _scored(name)
    rendered = [task.templates[template](sample) for sample in samples]
    best, best_each = task.score(
        samples, [each.target for each in rendered], task.templates[template]
    )
    # What only a judge can score is known here by whether there is something to judge.
    worst_said = "" if task.primary_metric == ANSWERED else "%nonsense%"
    worst, worst_each = task.score(samples, [worst_said] * len(samples), task.templates[template])
    assert len(best_each) == len(worst_each) == len(samples)
    assert best.keys() == worst.keys()
    for metric in task.metrics:
        better, than = best[metric.name], worst[metric.name]
        assert metric.cost(better) <= metric.cost(than), "declared upside down"
    assert task.templates[template].name == template
    if task.templates[template].mode == "rank":
        assert all(each.candidates for each in rendered)
    primary = task.primary_metric
    assert primary.cost(best[primary.name]) < primary.cost(worst[primary.name])
    for each in rendered:
        assert each.turns[-1].role == "user"
        assert not each.candidates or each.target in each.candidates


@pytest.mark.parametrize(("name", "template"), TEMPLATES)
def test_scores_are_the_declared_metrics_and_no_others(name: str, template: str) -> None:
    task: Task = plugins.load("task", name)
    declared = {metric.name: metric for metric in task.metrics}
    assert len(declared) == len(task.metrics) and LOSS.name not in declared
    assert task.primary_metric in task.metrics
    assert all(re.fullmatch("[a-z][a-z0-9_]*", each) for each in declared), "as MLflow takes it"
    samples = _scored(name)
    given, _ = task.score(samples, ["A"] * len(samples), task.templates[template])
    assert given.keys() == declared.keys()
    for each, value in given.items():
        assert declared[each].unit != "%" or 0 <= value <= 1, "shares are stored as shares of one"
    for sample in samples:  # a set may lack what a metric is about, but never bring another one
        alone, _ = task.score([sample], ["A"], task.templates[template])
        assert {task.primary_metric.name} <= alone.keys() <= declared.keys()


@pytest.mark.parametrize(("name", "template"), TEMPLATES)
def test_score_of_nothing_is_an_error(name: str, template: str) -> None:
    with pytest.raises(DataError, match="no samples"):
        task = plugins.load("task", name)
        task.score([], [], task.templates[template])


if __name__ == "__main__":
    for task_name, template_name in TEMPLATES:
        target = GOLDEN / task_name / f"{template_name}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_golden_text(task_name, template_name), encoding="utf-8")
        print(f"wrote {target}")
