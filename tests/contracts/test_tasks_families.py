"""What every family is given of every data set and template: a sample each, as a person reads it.

The texts stand in tests/golden/tasks/<task>/families.txt; `python -m tests.contracts.test_tasks`
writes the prompts of templates anew, `python -m tests.contracts.test_tasks_families` these.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from mmtrain import plugins
from mmtrain.data.source import open_images
from mmtrain.models import encoding
from mmtrain.models.text import IGNORED
from mmtrain.tasks.interface import Sample, Task
from tests.contracts.test_tasks import GOLDEN, TASKS, _samples
from tests.contracts.tiny_models import TINY_MODELS, TinyModel

# A model of each family; the others of a family have its prompts, with more or fewer image tokens.
OF_FAMILY = {name: (name, preset) for name, preset in reversed(TINY_MODELS)}
_REPEATED = 4  # an image's tokens, say


def _readable(processor: Any, ids: list[int]) -> str:
    """Decoded, runs of one token counted."""
    parts = []
    pending: list[int] = []
    for token, group in groupby(ids):
        run = list(group)
        if len(run) < _REPEATED:
            pending += run
            continue
        parts += [processor.tokenizer.decode(pending)] if pending else []
        parts.append(f"{processor.tokenizer.decode([token])}*{len(run)}")
        pending = []
    parts += [processor.tokenizer.decode(pending)] if pending else []
    return "".join(parts).replace("\n", "\\n")


def _told(model: TinyModel, task: Task, template: str, sample: Sample) -> str:
    processor = model.loaded().processor
    rendered, images = task.templates[template](sample), open_images(sample)
    one = encoding.encode(model.family, processor, sample.id, rendered, images, 4000, "left")
    lines = [f"=== {template}, {model.name}: {sample.id}"]
    if len(one.labels) != len(one.input_ids):  # the labels are a decoder's own
        return "\n".join(
            [*lines, _line(processor, one.input_ids, False), _line(processor, one.labels, True), ""]
        )
    pairs = zip(one.input_ids, one.labels, strict=True)
    for has_loss, group in groupby(pairs, lambda pair: pair[1] != IGNORED):
        lines.append(_line(processor, [token for token, _ in group], has_loss))
    return "\n".join([*lines, ""])


def _line(processor: Any, ids: Sequence[int], has_loss: bool) -> str:
    return f"{'loss > ' if has_loss else '     . '}{_readable(processor, list(ids))}|"


def _golden_text(name: str, models: Mapping[tuple[str, str], TinyModel]) -> str:
    task: Task = plugins.load("task", name)
    samples = _samples(name, task.splits[0])
    sample = next((one for one in samples if one.images), samples[0])
    return "\n".join(
        _told(models[OF_FAMILY[family]], task, template, sample)
        for template in task.templates
        for family in sorted(OF_FAMILY)
    )


@pytest.mark.parametrize("name", TASKS)
def test_families_are_given_what_stands_in_the_golden_file(
    name: str, tiny_models: dict[tuple[str, str], TinyModel]
) -> None:
    path = GOLDEN / name / "families.txt"
    assert path.is_file(), f"write {path} with: python -m tests.contracts.test_tasks_families"
    assert _golden_text(name, tiny_models) == path.read_text(encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        written = {one: TinyModel(Path(folder), *one) for one in OF_FAMILY.values()}
        for each in TASKS:
            text = _golden_text(each, written)
            (GOLDEN / each / "families.txt").write_text(text, encoding="utf-8")
