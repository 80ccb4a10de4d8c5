"""What a request of lmms-eval asks for, told in settings of ours; what we cannot do is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from mmtrain.config.schema import GenerationConfig
from mmtrain.errors import MmtrainError

# context, generation settings, document -> visuals, document's number, task, split
Request = tuple[str, dict[str, Any], Any, int, str, str]

_OURS = ("max_new_tokens", "num_beams", "length_penalty", "repetition_penalty")
_SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "seed")
_STOPS = ("until", "stop_sequences")
_FAMILYS = ("image_aspect_ratio",)  # pictures are cut as the run was trained on them


def batches(requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
    """Neighbours of one task with the same settings, at most `size` together."""
    for _, alike in groupby(requests, key=lambda request: (request[4], request[1])):
        found = list(alike)
        yield from (found[start : start + size] for start in range(0, len(found), size))


def settings_of(asked: Mapping[str, Any], usual: GenerationConfig) -> GenerationConfig:
    """The run's own settings, with what the request says in their place."""
    unknown = sorted(asked.keys() - {*_OURS, *_SAMPLING, *_STOPS, *_FAMILYS})
    if unknown:
        raise MmtrainError(
            f"generation_kwargs: '{unknown[0]}' is nothing that mmtrain can do.",
            f"It can: {', '.join((*_OURS, *_STOPS))}.",
        )
    sampled = asked.get("do_sample", True)
    temperature = asked.get("temperature", float("do_sample" in asked))
    if sampled and temperature:
        raise MmtrainError(
            f"generation_kwargs: temperature {temperature} draws answers at random, and mmtrain"
            " answers greedily or by beams, the same at every time.",
            "Add --gen_kwargs temperature=0,do_sample=False.",
        )
    wanted = {name: asked[name] for name in _OURS if name in asked}
    return GenerationConfig.model_validate(usual.model_dump() | wanted)


def cut(text: str, asked: Mapping[str, Any]) -> str:
    """An answer up to the first of the texts that a request lets it end at."""
    for name in _STOPS:
        for stop in _texts(asked.get(name)):
            text = text.split(stop, 1)[0]
    return text.strip()


def _texts(given: str | Iterable[str] | None) -> list[str]:
    return [given] if isinstance(given, str) and given else [one for one in given or () if one]


def overrides_of(given: Mapping[str, object]) -> list[str]:
    """`a.b=c` of the command line again, which lmms-eval has made numbers and booleans of."""
    if "parallel.deepspeed" in given:
        raise MmtrainError(
            "model_args: parallel.deepspeed spreads the model, but lmms-eval gives every rank"
            " requests of its own: ranks would wait for each other for ever.",
            "Leave it out: every rank holds the whole model; `mmtrain evaluate` spreads it.",
        )
    words = {True: "true", False: "false"}
    texts = (
        f"{key}={words[value] if isinstance(value, bool) else value}"
        for key, value in given.items()
    )
    return [*texts, "parallel.deepspeed=zero1"]
