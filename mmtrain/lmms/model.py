"""lmms-eval's model `mmtrain`: whatever a run trained, answering by the run's own code.

Only lmms-eval imports this module. Its base class is what its registry accepts; nothing else of
it is used here.
"""

from __future__ import annotations

import atexit
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from lmms_eval.api.model import lmms
from PIL.Image import Image

from mmtrain import distributed
from mmtrain.data.codec import plain_image
from mmtrain.data.source import Encoder, Question
from mmtrain.errors import DataError, MmtrainError
from mmtrain.evaluation.answer import ranked
from mmtrain.lmms.documents import is_ranked, rendered_as
from mmtrain.lmms.requests import Request, batches, cut, overrides_of, settings_of
from mmtrain.tasks.interface import Sample
from mmtrain.training.inference import Ready, ready_from_argument
from mmtrain.training.progress import Progress


class Run(lmms):
    """A run folder's best model, or the base of a run file.

    Further arguments are overrides of the run file, as commands take them.
    """

    def __init__(
        self,
        run: str = "",
        base: bool = False,
        batch_size: int | str | None = None,
        max_batch_size: object = None,
        device: str | None = None,
        **overrides: object,
    ) -> None:
        super().__init__()
        if not run:
            raise MmtrainError("model_args: run is missing.", "Give run=RUN_FOLDER.")
        size = None if batch_size is None else _batch_size(batch_size)
        self._ready = ready_from_argument(str(run), overrides_of(overrides), bool(base))
        # A process group of its own must not live on while Python ends.
        atexit.register(distributed.shut_down)
        self._encoder = _encoder(self._ready)
        self._batch_size = size or self._ready.config.generation.batch_size
        if device not in (None, self.device.type, str(self.device)):
            raise MmtrainError(
                f"device={device}: this rank's is {self.device}.",
                "Leave it out; CUDA_VISIBLE_DEVICES says which GPUs there are.",
            )

    @property
    def device(self) -> torch.device:
        """Where lmms-eval puts what it gathers over ranks."""
        return self._ready.engine.world.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, in the order of the requests."""
        parts = list(batches([request.args for request in requests], self._batch_size))
        texts: list[str] = []
        with Progress("answers", len(parts), self._ready.engine.world.is_main) as progress:
            for number, part in enumerate(parts):
                texts += self._answers(part)
                progress.update(number + 1)
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refused: the evaluator makes text of a pair of numbers before any task scores it."""
        raise MmtrainError(
            "multiple_choice and loglikelihood: lmms-eval 0.7.3 turns what a model returns for them"
            " into text, and then cannot score it, whichever model it is.",
            "Take a task that lets the model speak, or one of mmtrain's whose template ranks.",
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refused: rounds ask what depends on the answers before."""
        raise MmtrainError(
            "generate_until_multi_round: mmtrain answers questions that are known beforehand.",
            "Take a task of one round.",
        )

    def _answers(self, part: Sequence[Request]) -> list[str]:
        """By speaking; by the candidate that costs least where a template of ours says so."""
        engine, asked, ranks = self._ready.engine, part[0][1], False
        questions = []
        for request in part:
            *_, number, task, split = request
            document = self.task_dict[task][split][number]
            ranks = is_ranked(document)
            questions.append(self._question(request, document))
        examples = [question.example for question in questions]
        if not ranks:
            settings = settings_of(asked, self._ready.config.generation)
            return [cut(text, asked) for text in engine.generate(examples, settings)]
        with torch.no_grad():
            batch = engine.family.code.collate(examples, engine.processor)
            features = engine.image_features(batch)
            # Nothing is spread over ranks: whoever has a question with more choices asks alone.
            return ranked(engine, self._encoder, questions, features, in_step=False)

    def _question(self, request: Request, document: Mapping[str, Any]) -> Question:
        context, _, visuals_of, number, task, _ = request
        name = str(document.get("id", f"{task} {number}"))
        rendered = rendered_as(document, context)
        images = [_picture(visual, name) for visual in visuals_of(document) or ()]
        example = self._encoder.example(name, rendered, images)
        return Question(Sample(name), rendered, example, tuple(image.size for image in images))


def _encoder(ready: Ready) -> Encoder:
    """As the run encodes; a base alone may have no data section."""
    data, family = ready.config.data, ready.assembled.family
    max_length = (data.max_length if data else None) or family.default_max_length
    side = data.truncation_side if data else "left"
    return Encoder(family, ready.assembled.processor, max_length, side)


def _batch_size(given: int | str) -> int:
    if not str(given).isdecimal() or int(given) < 1:
        raise MmtrainError(f"batch_size={given}: is no number of questions.", "Give one, as 8.")
    return int(given)


def _picture(visual: object, sample_id: str) -> Image:
    if not isinstance(visual, Image):
        raise DataError(
            f"sample {sample_id}: what it shows is no picture but {type(visual).__name__}, as"
            " lmms-eval gives videos and sounds.",
            "The families of mmtrain see pictures: take another task.",
        )
    return plain_image(visual, sample_id)
