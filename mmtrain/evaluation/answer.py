"""Answering: the loss of a chunk's references, and what the model says to its questions.

The images of a chunk go through the tower once; loss, generation and ranking share the features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from mmtrain import distributed
from mmtrain.data.source import Encoder, Question, Source
from mmtrain.errors import DataError
from mmtrain.models.interface import Batch, Example, Family, ForwardResult, ImageFeatures


class Executor(Protocol):
    """What evaluation needs of an engine. Every rank makes the same calls."""

    @property
    def family(self) -> Family:
        """The model's."""

    @property
    def processor(self) -> object:
        """The model's."""

    @property
    def world(self) -> distributed.World:
        """The ranks."""

    def image_features(self, batch: Batch) -> ImageFeatures:
        """Tower and connector once, without gradients."""

    def forward(self, batch: Batch, features: ImageFeatures | None = None) -> ForwardResult:
        """One forward."""

    def generate(
        self, examples: Sequence[Example], settings: Any, features: ImageFeatures | None = None
    ) -> list[str]:
        """Answers."""


@dataclass(frozen=True)
class Answers:
    """Of one chunk on one rank."""

    texts: list[str]
    loss_sum: float  # over the references' tokens
    num_tokens: int


def answer(
    executor: Executor, source: Source, questions: Sequence[Question], settings: object
) -> Answers:
    """As the template asks: by speaking, or by the candidate that costs least."""
    examples = [question.example for question in questions]
    with torch.no_grad():
        batch = executor.family.code.collate(examples, executor.processor)
        features = executor.image_features(batch)
        loss_sum = float(executor.forward(batch, features).answer_loss_sum)
        if source.template.mode == "rank":
            texts = ranked(executor, source.encoder, questions, features)
        else:
            texts = executor.generate(examples, settings, features)
    return Answers(texts, loss_sum, batch.num_answer_tokens)


def ranked(
    executor: Executor,
    encoder: Encoder,
    questions: Sequence[Question],
    features: ImageFeatures,
    in_step: bool = True,
) -> list[str]:
    """Each question's candidate with the lowest loss, the first of equals.

    One forward asks the n-th candidate of every question; who has fewer runs along with weight 0.
    """
    candidates = [_candidates(question) for question in questions]
    rounds = max(len(mine) for mine in candidates)
    if in_step:  # Ranks may hold questions with more: all make as many forwards.
        rounds = max(distributed.gather_objects(rounds))
    losses = torch.full((len(questions), rounds), math.inf)
    for number in range(rounds):
        examples = [
            _with_candidate(encoder, question, mine, number)
            for question, mine in zip(questions, candidates, strict=True)
        ]
        batch = executor.family.code.collate(examples, executor.processor)
        found = executor.forward(batch, features).per_sample_loss.cpu()
        asked = torch.tensor([number < len(mine) for mine in candidates])
        losses[asked, number] = found[asked].float()
    best = losses.argmin(dim=1).tolist()
    return [mine[number] for mine, number in zip(candidates, best, strict=True)]


def _candidates(question: Question) -> tuple[str, ...]:
    if not question.rendered.candidates:
        raise DataError(
            f"sample {question.sample.id} has no choices, and its template ranks them.",
            "Choose a template that lets the model speak, or leave the sample out.",
        )
    return question.rendered.candidates


def _with_candidate(
    encoder: Encoder, question: Question, candidates: Sequence[str], number: int
) -> Example:
    example = encoder.with_answer(question, candidates[min(number, len(candidates) - 1)])
    # A sample of weight 0 has no labels, but a candidate's loss counts whatever its question does.
    return replace(example, weight=float(number < len(candidates)))
