"""What a task is: raw files -> samples -> prompts and targets -> scores.

A task is one file in `mmtrain/tasks/datasets/` that exports `TASK`; its name is the file's name.
Text only: images travel as encoded bytes and are opened by `mmtrain.data`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel


@dataclass(frozen=True)
class ImageBytes:
    """One encoded image as stored. `extension`: jpg, png or webp."""

    extension: str
    data: bytes


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation. `role`: user or assistant. Loss falls on assistant turns.

    `images` is how many of the sample's images stand before its text; those that no turn has stand
    before the first.
    """

    role: str
    text: str
    images: int = 0


@dataclass(frozen=True)
class Sample:
    """One raw sample, free of any prompt. `answers[0]` is the reference answer.

    For multiple choice, `choices` are the option texts and `answers[0]` is one of them.
    `turns` is only filled by conversation data sets. `meta` holds JSON values only.
    """

    id: str
    images: tuple[ImageBytes, ...] = ()
    turns: tuple[Turn, ...] = ()
    question: str = ""
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    meta: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Dropped:
    """A raw sample that cannot be one here. `reason` is the same text for all of a kind."""

    id: str
    reason: str
    detail: str = ""  # what it is about: a file, a value


@dataclass(frozen=True)
class Rendered:
    """A sample through a template: what a family turns into tokens.

    `turns` ends with a user turn; `target` is the assistant's answer to it. `instruction` is the
    Q-Former's text where a family has one; `candidates` are the answers to rank.
    """

    turns: tuple[Turn, ...]
    target: str
    instruction: str | None = None
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Template:
    """One paper's way to ask: the words, and how an answer is found.

    `generate` lets the model speak; `rank` takes the candidate with the lowest loss, summed over
    its tokens.
    """

    render: Callable[[Sample], Rendered]
    mode: Literal["generate", "rank"] = "generate"
    answer_tokens: int = 0  # that its answers may need, where these are long

    @property
    def name(self) -> str:
        """As its function is called."""
        return self.render.__name__

    def __call__(self, sample: Sample) -> Rendered:
        return self.render(sample)


@dataclass(frozen=True)
class Metric:
    """What a number is called, which way it is better and what it is counted in.

    `unit`: "%" for a share of one, shown in percent; any other text is shown behind the number.
    """

    name: str
    larger_is_better: bool
    unit: str = ""

    @property
    def mode(self) -> Literal["max", "min"]:
        """The direction in the word of study files and of Ray."""
        return "max" if self.larger_is_better else "min"

    def cost(self, value: float) -> float:
        """A number that is smaller the better the value is: sorting by it puts the best first."""
        return -value if self.larger_is_better else value


# Every validation gives it, beside what the task scores.
LOSS = Metric("loss", larger_is_better=False)


class Task(Protocol):
    """One data set. The contract tests find every task by listing the folder."""

    description: str
    splits: tuple[str, ...]
    build_options: type[BaseModel]  # options of `mmtrain shards build --set key=value`
    needs_raw: bool  # False when the raw files come inside a Python package
    templates: Mapping[str, Template]  # named after the paper that used them; first is the default
    metrics: tuple[Metric, ...]  # all that `score` can return
    primary_metric: Metric  # the one of `metrics` that decides; `score` always returns it

    def read(self, raw: Path | None, split: str, options: object) -> Iterator[Sample | Dropped]:
        """Yield every sample of a split, in a fixed order, and why others cannot be one."""

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """Metrics over the set, and one score per sample (what predictions.jsonl shows).

        `template` is what asked: each paper's evaluator reads its own answers.
        """


def validation_metrics(tasks: Mapping[str, Task]) -> dict[str, Metric]:
    """What a validation gives, by the name that a run records it under: `val/loss`, …

    Of several data sets each has its own: `val/okvqa/loss`, … beside the loss over all.
    """
    found = {"val/loss": replace(LOSS, name="val/loss")}
    for data_set, task in tasks.items():
        for metric in (LOSS, *task.metrics):
            name = "/".join(filter(None, ("val", data_set, metric.name)))
            found[name] = replace(metric, name=name)
    return found
