"""The tasks and templates that a run file names, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmtrain import plugins
from mmtrain.config.schema import DataConfig, RunConfig
from mmtrain.errors import MmtrainError, nearest
from mmtrain.tasks.interface import Task, validation_metrics
from mmtrain.tasks.templates import placeholders


def tasks_of(config: RunConfig) -> dict[str, Task]:
    """By the name that its metrics carry, which is empty where there is one data set."""
    parts = config.data.parts if config.data else {}
    return {name: plugins.load("task", part.task) for name, part in parts.items()}


def with_template_names(data: DataConfig) -> DataConfig:
    """The first template of a task where none is named."""
    chosen = {}
    for name, part in data.parts.items():
        first = next(iter(plugins.load("task", part.task).templates))
        chosen[name] = part.model_copy(update={"template": part.template or first})
    if data.mix:
        return data.model_copy(update={"mix": list(chosen.values())})
    return data.model_copy(update={"template": chosen[""].template})


def data_problems(data: Mapping[str, object], validate: Mapping[str, object]) -> list[str]:
    """Unknown tasks, templates and metrics; what no validation can give."""
    given = data.get("mix")
    mix = given if isinstance(given, list) else []
    parts = {f"data.mix[{n}]": one for n, one in enumerate(mix) if isinstance(one, Mapping)}
    problems: list[str] = []
    tasks: dict[str, Task] = {}
    validates = any(part.get("val") is not None for part in (data, *parts.values()))
    unknown = False  # what such a task gives is not known
    for place, part in (parts or {"data": data}).items():
        task, found = _task(part.get("task"), f"{place}.task")
        problems += found
        unknown = unknown or task is None
        if task is not None and (part.get("val") is not None or not validates):
            tasks[str(part.get("name") or part["task"]) if parts else ""] = task
        problems += _template_problems(task, part, place)
    metric = validate.get("metric")
    if tasks and not unknown and isinstance(metric, str):
        known = [name.removeprefix("val/") for name in validation_metrics(tasks)]
        if metric not in known:
            of = ", ".join(f"'{name}'" for name in tasks) if parts else f"'{data['task']}'"
            problems.append(f"validate.metric: {of} gives no '{metric}'; {nearest(metric, known)}")
    # Without a data section the file is only checked or planned with: nothing trains.
    if data and not validates and validate.get("patience") is not None:
        problems.append(
            "validate.patience: counts validations, and there is no data.val; "
            "set data.val or remove patience"
        )
    return problems


def _task(name: object, place: str) -> tuple[Any, list[str]]:
    if not isinstance(name, str):
        return None, []
    try:
        return plugins.load("task", name), []
    except MmtrainError as error:
        return None, [f"{place}: {error}"]


def _template_problems(task: Any, part: Mapping[str, object], place: str) -> list[str]:
    template = part.get("template")
    if isinstance(template, str) and task and template not in task.templates:
        hint = nearest(template, task.templates)
        return [f"{place}.template: '{part['task']}' has no template '{template}'; {hint}"]
    problems = []
    for key, text in template.items() if isinstance(template, Mapping) else ():
        try:
            # Which names the data have is known with the data.
            placeholders(text if isinstance(text, str) else "")
        except ValueError as fault:
            problems.append(f"{place}.template.{key}: {fault}")
    return problems
