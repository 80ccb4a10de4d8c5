"""Evaluation: what is read once, answers by ranking, errors that reach every rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmtrain import plugins
from mmtrain.data.lengths import token_lengths
from mmtrain.data.shards import ShardFolder
from mmtrain.data.source import Encoder, Source
from mmtrain.distributed import World
from mmtrain.errors import DataError
from mmtrain.evaluation.evaluate import evaluate
from mmtrain.models import decoding
from mmtrain.models.interface import LoadedModel
from mmtrain.tasks.interface import Template
from tests import tiny
from tests.in_process import one_rank
from tests.unit.llava_material import FAMILY, load, write_lively

TASK = plugins.load("task", "scienceqa")
SETTINGS = SimpleNamespace(
    max_new_tokens=3,
    min_new_tokens=0,
    num_beams=1,
    length_penalty=1.0,
    repetition_penalty=1.0,
    batch_size=3,
)


class Model:
    """A model on one rank, which counts how often images went through its tower."""

    family = FAMILY
    world = World(rank=0, size=1, device=torch.device("cpu"))

    def __init__(self, loaded: LoadedModel) -> None:
        self.model, self.processor, self.seen = loaded.model, loaded.processor, 0
        tower: Any = loaded.model.get_submodule("model.vision_tower")
        tower.embeddings.register_forward_hook(lambda *_: setattr(self, "seen", self.seen + 1))

    def image_features(self, batch: Any) -> Any:
        return FAMILY.code.image_features(self.model, batch)

    def forward(self, batch: Any, features: Any = None) -> Any:
        return decoding.forward(FAMILY, self.model, batch, features)

    def generate(self, examples: Any, settings: Any, features: Any = None) -> list[str]:
        given = (self.model, self.processor, examples, settings, features)
        return decoding.generate(FAMILY, *given)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with one_rank():
        yield Model(load(write_lively(tmp_path_factory.mktemp("llava"))))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scienceqa")
    raw = tiny.write_scienceqa_raw(root / "raw")
    command = ["shards", "build", "scienceqa", "--raw", str(raw), "--out", str(root)]
    tiny.run_cli(*command, "--split", "train")
    return root / "train"


def source_of(model: Model, shards: Path, template: Template, limit: int = 7) -> Source:
    encoder = Encoder(FAMILY, model.processor, 2000, "left")
    return Source(ShardFolder.open(shards, "scienceqa"), template, encoder, limit)


@pytest.mark.parametrize("template", ["zhou2024", "kim2023"])
def test_every_sample_is_read_once_and_every_image_seen_once(
    model: Model, shards: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, honest = [], ShardFolder.read
    monkeypatch.setattr(
        ShardFolder, "read", lambda self, index: (read.append(index), honest(self, index))[1]
    )
    source, model.seen = source_of(model, shards, TASK.templates[template]), 0
    found = evaluate(model, source, TASK, SETTINGS)
    # The last of three chunks is filled up with copies of the first sample.
    assert sorted(read) == [0, 0, 0, 1, 2, 3, 4, 5, 6]
    assert model.seen == 3
    assert len(found.predictions) == 7 and found.metrics["loss"] > 0


def test_ranking_takes_the_candidate_with_the_lowest_loss(model: Model, shards: Path) -> None:
    source = source_of(model, shards, TASK.templates["kim2023"])
    found = evaluate(model, source, TASK, SETTINGS)
    for index, prediction in enumerate(found.predictions):
        question = source.question(index)
        losses = {}
        for candidate in question.rendered.candidates:
            example = source.encoder.with_answer(question, candidate)
            batch = FAMILY.code.collate([example], model.processor)
            with torch.no_grad():
                losses[candidate] = float(model.forward(batch).answer_loss_sum)
        assert prediction.prediction == min(losses, key=lambda one: losses[one])
    right = [prediction.prediction == prediction.target for prediction in found.predictions]
    assert found.metrics["accuracy"] == sum(right) / len(right)


def test_without_choices_nothing_is_ranked(model: Model, shards: Path) -> None:
    def rendered(sample: Any) -> Any:
        return replace(TASK.templates["zhou2024"](sample), candidates=())

    source = source_of(model, shards, Template(rendered, mode="rank"))
    with pytest.raises(DataError, match="has no choices, and its template ranks them"):
        evaluate(model, source, TASK, SETTINGS)


def test_lengths_are_counted_once_and_kept(
    model: Model, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = source_of(model, shards, TASK.templates["zhou2024"])
    counted: list[int] = []

    def count(name: str) -> list[int]:
        lengths = token_lengths(
            source, {"name": name}, model.world, lambda done, _: counted.append(done)
        )
        return list(lengths.tolist())

    wanted = [len(source.example(index).input_ids) for index in range(len(source))]
    assert count("a") == count("a") == wanted
    assert counted == list(range(1, len(source) + 1)), "the second time they were at hand"
    assert count("b") == wanted and len(counted) == 2 * len(source), "another tokenizer, say"
    for file in (tmp_path / "mmtrain" / "lengths").iterdir():
        file.write_bytes(b"no array")
    assert count("a") == wanted and len(counted) == 3 * len(source)
