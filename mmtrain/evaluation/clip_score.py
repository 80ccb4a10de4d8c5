"""How well texts fit their pictures, by a CLIP model from a folder of this machine.

`clip_cosine` is the cosine of the two embeddings as it stands; `clip_score` is CLIPScore, two and a
half times what of it is above zero. Texts longer than the model reads are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from mmtrain.errors import CheckpointError
from mmtrain.evaluation.judged import Column, Judged
from mmtrain.tasks.interface import Metric

CLIP_COSINE = Metric("clip_cosine", larger_is_better=True)
CLIP_SCORE = Metric("clip_score", larger_is_better=True)
_WEIGHT = 2.5
_BATCH = 32

Pair = tuple[str, str, list[Image.Image]]  # a sample's id, a text, its pictures


class Clip:
    """The model and its processor, on the device that is there."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
        from transformers.utils import logging

        from mmtrain.models.weights import read_json

        kind = read_json(folder / "config.json").get("model_type")
        if kind != "clip":
            raise CheckpointError(f"{folder}: holds a '{kind}', no CLIP.", "Give --clip a CLIP.")
        logging.disable_progress_bar()
        torch.backends.cudnn.allow_tf32 = False  # fp32 is not rounded
        safe: Any = {"local_files_only": True, "trust_remote_code": False}
        try:
            loaded: Any = CLIPModel.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, **safe
            )
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, **safe)
            # The same whether torchvision is installed or not.
            self._images: Any = AutoImageProcessor.from_pretrained(folder, backend="pil", **safe)
        except (OSError, ValueError) as fault:
            raise CheckpointError(
                f"{folder}: cannot be loaded ({fault}).", "Download the whole folder again."
            ) from fault
        model, facts = loaded
        lacking = sorted(map(str, (*facts["missing_keys"], *facts["mismatched_keys"])))
        if lacking:  # which transformers would draw at random
            raise CheckpointError(
                f"{folder}: lacks {len(lacking)} weights, {lacking[0]} among them.",
                "Download the whole folder again.",
            )
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = model.eval().to(self._device)

    def cosines(self, texts: list[str], images: list[list[Image.Image]]) -> list[float]:
        """Of each text with its pictures; of several pictures, the mean."""
        import torch
        from torch.nn.functional import cosine_similarity

        limit = self._model.config.text_config.max_position_embeddings
        said = self._tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=limit
        )
        seen = self._images([one for mine in images for one in mine], return_tensors="pt")
        inputs = {
            "input_ids": said["input_ids"].to(self._device),
            "attention_mask": said["attention_mask"].to(self._device),
            "pixel_values": seen["pixel_values"].to(self._device),
        }
        with torch.inference_mode():
            out = self._model(**inputs)
        owners = torch.tensor(
            [row for row, mine in enumerate(images) for _ in mine], device=self._device
        )
        found = cosine_similarity(out.image_embeds, out.text_embeds[owners], dim=-1)
        sums = found.new_zeros(len(texts)).index_add(0, owners, found)
        return (sums / torch.bincount(owners, minlength=len(texts))).tolist()


def clip_judged(clip: Clip, pairs: Iterable[Pair], on_batch: Callable[[int], None]) -> Judged:
    """Both metrics over all samples; each sample's score is its cosine."""
    scores: dict[str, float] = {}
    for batch in _batches(pairs):
        ids, texts, images = zip(*batch, strict=True)
        scores |= zip(ids, clip.cosines(list(texts), list(images)), strict=True)
        on_batch(len(scores))
    cosines = tuple(scores.values())
    weighted = tuple(_WEIGHT * max(one, 0.0) for one in cosines)
    return Judged((Column(CLIP_COSINE, cosines), Column(CLIP_SCORE, weighted)), scores)


def _batches(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    rest = iter(pairs)
    while batch := list(islice(rest, _BATCH)):
        yield batch
