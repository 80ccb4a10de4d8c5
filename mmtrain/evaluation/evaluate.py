"""Loss and generated answers over a set, every rank making the same number of calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from mmtrain import distributed
from mmtrain.data.source import Source
from mmtrain.data.stream import PADDING, equal_chunks
from mmtrain.models.interface import Batch, Example, ForwardResult
from mmtrain.tasks.interface import Task


class Executor(Protocol):
    """What evaluation needs of an engine."""

    family: Any
    processor: Any
    world: Any

    def forward(self, batch: Batch) -> ForwardResult:
        """One forward."""

    def generate(self, examples: Sequence[Example], settings: Any) -> list[str]:
        """Answers."""


@dataclass(frozen=True)
class Prediction:
    """One line of predictions.jsonl."""

    id: str
    prompt: str
    prediction: str
    target: str
    score: float


@dataclass(frozen=True)
class Evaluation:
    """Metrics over the set, on every rank, and one prediction per sample, on rank 0."""

    metrics: dict[str, float]
    predictions: list[Prediction]


def evaluate(
    executor: Executor,
    source: Source,
    task: Task,
    template_name: str,
    settings: Any,
    on_chunk: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Loss per answer token and the task's scores. Chunks are of one size on all ranks."""
    world = executor.world
    chunks = equal_chunks(len(source), world.rank, world.size, settings.batch_size)
    answers: list[tuple[int, str]] = []
    loss_sum, num_tokens = 0.0, 0
    for number, chunk in enumerate(chunks):
        examples = [_example(source, index) for index in chunk]
        with torch.no_grad():
            batch = executor.family.code.collate(examples, executor.processor)
            loss_sum += float(executor.forward(batch).answer_loss_sum)
            num_tokens += batch.num_answer_tokens
            texts = executor.generate(examples, settings)
        answers += [(i, text) for i, text in zip(chunk, texts, strict=True) if i != PADDING]
        if on_chunk is not None:
            on_chunk(number + 1, len(chunks))
    total_loss, total_tokens = distributed.sum_over_ranks([loss_sum, num_tokens])
    by_index = dict(pair for part in distributed.gather_objects(answers) for pair in part)
    metrics: dict[str, float] = {}
    predictions: list[Prediction] = []
    if distributed.is_main():
        texts = [by_index[index] for index in range(len(source))]
        metrics, predictions = _scored(source, task, template_name, texts)
    metrics = distributed.from_main(metrics)
    return Evaluation({"loss": total_loss / max(1, total_tokens), **metrics}, predictions)


def _scored(
    source: Source, task: Task, template_name: str, texts: list[str]
) -> tuple[dict[str, float], list[Prediction]]:
    """Score the answers; images are dropped as samples are read, only that they exist stays."""
    samples = []
    for index in range(len(source)):
        sample = source.sample(index)
        emptied = tuple(replace(image, data=b"") for image in sample.images)
        samples.append(replace(sample, images=emptied))
    metrics, scores = task.score(samples, texts, template_name)
    predictions = []
    for sample, text, score in zip(samples, texts, scores, strict=True):
        rendered = source.rendered(sample)
        prompt = "\n".join(turn.text for turn in rendered.turns)
        predictions.append(Prediction(sample.id, prompt, text, rendered.target, score))
    return metrics, predictions


def _example(source: Source, index: int) -> Example:
    if index == PADDING:
        return replace(source.example(0), weight=0.0)
    return source.example(index)


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """predictions.jsonl and metrics.json, replaced together."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(item), ensure_ascii=False) for item in evaluation.predictions)
    for name, text in (
        ("predictions.jsonl", "".join(f"{line}\n" for line in lines)),
        ("metrics.json", json.dumps(evaluation.metrics, indent=1)),
    ):
        temporary = folder / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)
