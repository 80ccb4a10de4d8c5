"""Loss and scored answers over a set, every rank making the same number of calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmtrain import distributed
from mmtrain.data.plan import PADDING
from mmtrain.data.source import Question, Source
from mmtrain.data.stream import equal_chunks
from mmtrain.evaluation.answer import Executor, answer
from mmtrain.evaluation.kept import KeptAnswers
from mmtrain.files import replace_file
from mmtrain.main_rank import on_main
from mmtrain.tasks.interface import Rendered, Sample, Task


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
    num_tokens: int  # of answers, which the loss is a mean over


@dataclass(frozen=True)
class Asked:
    """What scoring needs of one sample: who reads it also sends it to rank 0."""

    index: int
    sample: Sample
    prompt: str
    target: str
    text: str


def evaluate(
    executor: Executor,
    source: Source,
    task: Task,
    settings: Any,
    on_chunk: Callable[[int, int], None] | None = None,
    kept: KeptAnswers | None = None,
) -> Evaluation:
    """Loss per answer token and the task's scores. Chunks are of one size on all ranks."""
    world = executor.world
    chunks = equal_chunks(len(source), world.rank, world.size, settings.batch_size)
    asked: list[Asked] = []
    loss_sum, num_tokens = 0.0, 0
    known = kept.known if kept else []
    for number, chunk in enumerate(chunks):
        if number < len(known):
            found, asks = known[number], [source.ask(max(index, 0)) for index in chunk]
        else:
            questions = [_question(source, index) for index in chunk]
            found = answer(executor, source, questions, settings)
            asks = [(question.sample, question.rendered) for question in questions]
            if kept is not None:
                kept.add(found)
            if on_chunk is not None:
                on_chunk(number + 1, len(chunks))
        loss_sum, num_tokens = loss_sum + found.loss_sum, num_tokens + found.num_tokens
        asked += [
            _asked(index, *ask, text)
            for index, ask, text in zip(chunk, asks, found.texts, strict=True)
            if index != PADDING
        ]
    sums = distributed.summed_over_ranks([loss_sum, num_tokens])
    total_loss, total_tokens = sums.tolist()
    everything = [one for part in distributed.gather_objects(asked) for one in part]
    scores: list[float] = []

    def score() -> dict[str, float]:
        everything.sort(key=lambda one: one.index)
        samples, texts = [one.sample for one in everything], [one.text for one in everything]
        metrics, each = task.score(samples, texts, source.template)
        scores.extend(each)
        return metrics

    metrics = {"loss": total_loss / max(1, total_tokens), **on_main(score)}
    return Evaluation(metrics, _predictions(everything, scores), int(total_tokens))


def recorded_metrics(evaluations: Mapping[str, Evaluation]) -> dict[str, float]:
    """By the names that a run records: of several data sets each, and the loss over all."""
    found = {
        "/".join(filter(None, ("val", data_set, name))): value
        for data_set, evaluation in evaluations.items()
        for name, value in evaluation.metrics.items()
    }
    tokens = sum(one.num_tokens for one in evaluations.values())
    total = sum(one.metrics["loss"] * one.num_tokens for one in evaluations.values())
    return {"val/loss": total / max(1, tokens)} | found


def _question(source: Source, index: int) -> Question:
    if index != PADDING:
        return source.question(index)
    question = source.question(0)
    return replace(question, example=replace(question.example, weight=0.0))


def _asked(index: int, sample: Sample, rendered: Rendered, text: str) -> Asked:
    prompt = "\n".join(turn.text for turn in rendered.turns)
    return Asked(index, sample, prompt, rendered.target, text)


def _predictions(asked: Sequence[Asked], scores: Sequence[float]) -> list[Prediction]:
    """On rank 0, which alone has scores."""
    return [
        Prediction(one.sample.id, one.prompt, one.text, one.target, score)
        for one, score in zip(asked, scores)
    ]


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """predictions.jsonl and metrics.json, replaced together."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(item), ensure_ascii=False) for item in evaluation.predictions)
    replace_file(folder / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
    replace_file(folder / "metrics.json", json.dumps(evaluation.metrics, indent=1))
