"""Published shapes to measure with: their weights are drawn on the card, never written or read.

A folder holds what a checkpoint holds but its weights: the published configuration, a processor
and a small tokenizer. `random_weights` makes training fill a model from such a folder.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from data_shards.writer import ShardWriter
from mmtrain import plugins
from mmtrain.models import building, tiny
from mmtrain.models.weights import initialise_weights
from mmtrain.tasks.interface import ImageBytes, Sample

WEIGHT_SEED = 0
# Short and few: even a vocabulary of a few hundred tokens holds most of them as one token each.
WORDS = (
    "the moon sand leaf fish bird rain wind tree rock hot cold red map soil seed"
    " iron salt ice sun sea ant egg root"
).split()
CHOICES = ("sand", "fish", "iron", "salt")
IMAGE_SIDE = 336
# Words of question and choices, so that a sample has about the tokens that ScienceQA's have.
MEDIAN_WORDS, SPREAD, LEAST_WORDS, MOST_WORDS = 90, 0.6, 20, 400
# Images of the size above stay as they are in families that keep an image's size.
PIXEL_RANGE = {"shortest_edge": 56 * 56, "longest_edge": 1024 * 1024}


def write_shards(folder: Path, num_samples: int, image_every: int = 1) -> list[str]:
    """Questions as long as ScienceQA's, with an image or without; their texts."""
    folder.mkdir(parents=True)
    writer = ShardWriter(folder)
    drawn = random.Random(WEIGHT_SEED)
    texts = []
    for number in range(num_samples):
        length = int(drawn.lognormvariate(0.0, SPREAD) * MEDIAN_WORDS)
        words = drawn.choices(WORDS, k=min(max(length, LEAST_WORDS), MOST_WORDS))
        answer = drawn.randrange(len(CHOICES))
        image = ImageBytes("jpg", _image(drawn))
        sample = Sample(
            id=f"question-{number}",
            images=(image,) if number % image_every == 0 else (),
            question=" ".join(words),
            answers=(CHOICES[answer],),
            choices=CHOICES,
            meta={"answer_index": answer},
        )
        writer.add(sample)
        texts.append(sample.question)
    writer.finish("scienceqa", "train", WEIGHT_SEED, None, {})
    return texts


def _image(drawn: random.Random) -> bytes:
    from PIL import Image

    coarse = Image.frombytes("RGB", (8, 8), drawn.randbytes(3 * 64))
    buffer = BytesIO()
    coarse.resize((IMAGE_SIDE, IMAGE_SIDE)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_folder(folder: Path, family_name: str, preset: str, texts: Sequence[str]) -> None:
    """All of a published checkpoint but its weights and its vocabulary."""
    family: Any = plugins.load("family", family_name)

    with patch.object(tiny, "write_model", _write_names):
        family.code.write_tiny(folder, [*texts, *CHOICES, "A. B. C. D. , "], WEIGHT_SEED, preset)
    _restore_vocabulary(folder / "config.json", family.presets[preset])
    images = folder / "preprocessor_config.json"
    if images.exists() and family_name == "qwen2_vl":
        stored = json.loads(images.read_text())
        images.write_text(json.dumps({**stored, "size": PIXEL_RANGE}))


def _write_names(skeleton: tiny.Skeleton, config: Any, folder: Path, *_: Any) -> None:
    """Configuration and the list of weights; the file that should hold them has none."""
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    with torch.device("meta"):
        names = [name for name, _ in skeleton(config).named_parameters()]
    save_file({}, str(folder / "empty.safetensors"))
    index = {"weight_map": dict.fromkeys(names, "empty.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _restore_vocabulary(config_file: Path, published: Any) -> None:
    """As many rows of the embeddings and of the head as published; most have no token here."""
    config = json.loads(config_file.read_text())
    inner, inner_published = config.get("text_config", config), published.get("text_config")
    rows = (inner_published or published).get("vocab_size")
    if rows is not None:
        inner["vocab_size"] = max(rows, inner["vocab_size"])
    config_file.write_text(json.dumps(config))


@contextmanager
def random_weights() -> Iterator[None]:
    """Inside, a folder's weights are drawn where the model lies, the same for every peer."""

    def draw(model: Any, *_: Any) -> tuple[Path, ...]:
        initialise_weights(dict(model.named_parameters()), WEIGHT_SEED)
        return ()

    with patch.object(building, "load_weights", draw):
        yield
