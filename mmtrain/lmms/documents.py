"""Shards as lmms-eval reads data: one document per sample, and what answers to them are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain import plugins
from mmtrain.assemble import template_for
from mmtrain.config.schema import MixPart
from mmtrain.data.shards import ShardFolder
from mmtrain.data.source import emptied, open_images, render
from mmtrain.errors import ConfigError, nearest
from mmtrain.tasks.interface import Rendered, Sample, Task, Template, Turn

if TYPE_CHECKING:
    from PIL.Image import Image

_KEPT = 2  # samples: a document is asked for, then its pictures


@dataclass(frozen=True, eq=False)
class Documents:
    """The samples of a shard folder as one template asks them, each read when it is wanted."""

    read: Callable[[int], Sample]
    size: int
    task: Task
    template: Template

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample without its images: lmms-eval logs what is in a document."""
        sample = self.read(index)
        rendered = render(self.template, sample)
        return {
            "index": index,
            "id": sample.id,
            "prompt": rendered.turns[-1].text,
            "target": rendered.target,
            "mode": self.template.mode,
            "rendered": rendered,
        }

    @property
    def features(self) -> dict[str, None]:
        """The names of a document's fields."""
        return dict.fromkeys(self[0])

    def images(self, document: Mapping[str, Any]) -> list[Image]:
        """A document's images, decoded."""
        return open_images(self.read(document["index"]))

    def score(self, answers: Sequence[tuple[int, str]]) -> dict[str, float]:
        """The task's metrics over answers to the samples of these numbers."""
        ordered = sorted(answers)
        # Scores see how many images a sample has, not what they show.
        samples = [emptied(self.read(index)) for index, _ in ordered]
        return self.task.score(samples, [text for _, text in ordered], self.template)[0]


def open_documents(folder: Path, template: object) -> Documents:
    """A folder's samples by the template of this name, or by an own one, as a run file says it."""
    shards = ShardFolder.open(folder)
    task = plugins.load("task", shards.manifest.task)
    if isinstance(template, str) and template not in task.templates:
        hint = nearest(template, task.templates)
        raise ConfigError([f"template: {shards.manifest.task} has no '{template}'; {hint}"])
    part = MixPart.model_validate({"task": shards.manifest.task, "template": template})
    read = lru_cache(_KEPT)(shards.read)
    return Documents(read, len(shards), task, template_for(part, shards))


def rendered_as(document: Mapping[str, Any], context: str) -> Rendered:
    """What a request asks: `context`, in a document of ours with all else that its template says.

    lmms-eval makes the context of the document's prompt: a description may stand before it.
    """
    known = document.get("rendered")
    if not isinstance(known, Rendered):
        return Rendered((Turn("user", context),), target="")
    return replace(known, turns=(*known.turns[:-1], replace(known.turns[-1], text=context)))


def is_ranked(document: Mapping[str, Any]) -> bool:
    """Whether a template of ours wants the candidate that costs least."""
    return isinstance(document.get("rendered"), Rendered) and document["mode"] == "rank"
