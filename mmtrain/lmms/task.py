"""The class behind our task files for lmms-eval: questions from shards, scores by the task.

A file names it, the shard folder and the template; lmms-eval does the rest as with any task.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from lmms_eval.api.task import ConfigurableTask

from mmtrain.lmms.documents import Documents, open_documents

SHARDS = "MMTRAIN_SHARDS"  # the folder that dataset_path is in; default: ./shards
_SPLIT = "test"


class ShardTask(ConfigurableTask):
    """One shard folder, asked by one template."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        given = {key: value for key, value in config.items() if key != "class"}
        folder = Path(os.environ.get(SHARDS, "shards"), given["dataset_path"])
        template = (given.get("dataset_kwargs") or {}).get("template")
        self._documents: Documents = open_documents(folder, template)
        # lmms-eval asks for metrics one by one; a set is scored once.
        self._score = lru_cache(maxsize=1)(self._documents.score)
        # Nothing else ends an answer than what ends it in `mmtrain evaluate`.
        generation = {"until": [], **(given.get("generation_kwargs") or {})}
        fixed = {"test_split": _SPLIT, "output_type": "generate_until", "num_fewshot": 0}
        super().__init__(config={**given, **fixed, "generation_kwargs": generation})

    def download(self, dataset_kwargs: object = None) -> None:
        """Nothing is fetched: the shards are there."""
        self.dataset = self.dataset_no_image = {_SPLIT: self._documents}

    def doc_to_text(self, doc: Mapping[str, Any]) -> str:
        """What the template asks."""
        return str(doc["prompt"])

    def doc_to_target(self, doc: Mapping[str, Any]) -> str:
        """What the template wants to hear."""
        return str(doc["target"])

    def doc_to_visual(self, doc: Mapping[str, Any]) -> list[Any]:
        """The sample's images."""
        return self._documents.images(doc)

    def process_results(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
        """What the metrics need of one answer: they look at the whole set."""
        answer = {"index": doc["index"], "prediction": results[0]}
        return dict.fromkeys(self.higher_is_better(), answer)

    def aggregation(self) -> dict[str, Callable[[list[dict[str, Any]]], float | None]]:
        """How every metric of the task is made of these."""
        return {name: partial(self._metric, name) for name in self.higher_is_better()}

    def higher_is_better(self) -> dict[str, bool]:
        """The task's metrics and their directions."""
        return {one.name: one.larger_is_better for one in self._documents.task.metrics}

    def _metric(self, name: str, items: Sequence[Mapping[str, Any]]) -> float | None:
        """None of what these samples have not: MME's sub-tasks that nobody was asked about."""
        answers = tuple((one["index"], one["prediction"]) for one in items)
        return self._score(answers).get(name)

    def _prepare_metric_and_aggregation(self) -> None:
        """By name only: the methods above say what they are."""
        self._metric_fn_list = dict.fromkeys(self.higher_is_better())
        self._aggregation_list = self.aggregation()
        self._higher_is_better = self.higher_is_better()
        self._metric_fn_kwargs: dict[str, dict[str, Any]] = {
            name: {} for name in self._metric_fn_list
        }
