"""IconQA: questions about drawn icons, by texts to choose from, pictures, or a blank to fill.

Raw files as published, the folder `iconqa_data`: `problems.json`, `pid_splits.json`,
`iconqa/<split>/<kind>/<id>/image.png`, and beside it the pictures of choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from mmtrain.errors import DataError
from mmtrain.tasks.interface import Dropped, Metric, Rendered, Sample, Template, Turn
from mmtrain.tasks.json_rows import read_items
from mmtrain.tasks.metrics import (
    ACCURACY,
    exact_matches,
    lower_case_matches,
    mean,
    target_matches,
)
from mmtrain.tasks.pictures import Unusable
from mmtrain.tasks.published import PictureOptions
from mmtrain.tasks.raw_files import needed
from mmtrain.tasks.templates import LETTERS, answer_index, bracketed, plain, without_signs
from mmtrain.tasks.vqa_files import (
    Row,
    built,
    number_of,
    pictures,
    text_of,
    texts_of,
)

_FILES = "give --raw the folder iconqa_data, with problems.json, pid_splits.json and iconqa/."
_FIX = "Download problems.json again."


class IconQAOptions(PictureOptions):
    """Options of `mmtrain shards build iconqa --set key=value`."""

    kind: Literal["choose_txt", "choose_img", "fill_in_blank"] = Field(
        "choose_txt",
        description="texts to choose from, pictures that are chosen by letter, or a free answer",
    )


def zhou2024(sample: Sample) -> Rendered:
    """The question with its choices, answered by their text; or with a blank (Zhou et al. 2024)."""
    if not sample.choices:
        prompt = f"{sample.question} Fill in the blanks in (_) or answer this question."
        return Rendered((Turn("user", prompt),), sample.answers[0])
    prompt = (
        f"{sample.question} Choices: {', '.join(sample.choices)}"
        " Choose an option from the choices to answer the question."
    )
    return Rendered((Turn("user", prompt),), sample.answers[0], candidates=sample.choices)


def kim2023(sample: Sample) -> Rendered:
    """The form of the InstructBLIP PEFT papers, `<Image>` spelt out; they ask choose_txt alone."""
    candidates = bracketed(sample.choices)
    options = f" Options: {' '.join(candidates)}." if candidates else ""
    prompt = without_signs(f"<Image> Question: {sample.question}{options} Short answer:")
    target = candidates[answer_index(sample)] if candidates else sample.answers[0]
    return Rendered((Turn("user", prompt),), target, instruction=prompt, candidates=candidates)


def _sample(problem_id: str, problem: Row, kind: str, place: str, folder: Path) -> Sample:
    """A problem; `place` is where its kind and split lie below the folder."""
    names, meta = ["image.png"], {key: problem[key] for key in ("grade", "label") if key in problem}
    question, choices = text_of(problem, "question"), tuple[str, ...]()
    if kind == "fill_in_blank":
        answer = text_of(problem, "answer")
    else:
        choices, right = _choices(problem)
        if kind == "choose_img":
            names += choices
            choices = tuple(LETTERS[: len(choices)])
        answer, meta["answer_index"] = choices[right], right
    images = pictures([f"{place}/{problem_id}/{name}" for name in names], folder)
    return Sample(problem_id, images, (), question, (answer,), choices, {**meta, "kind": kind})


def _choices(problem: Row) -> tuple[tuple[str, ...], int]:
    """What can be chosen, and the number of the right one."""
    choices, right = texts_of(problem, "choices"), number_of(problem, "answer")
    if not right < len(choices) <= len(LETTERS):
        raise Unusable("its answer is none of its choices", _FIX)
    return choices, right


class IconQA:
    """The IconQA task."""

    description = (
        "107,439 questions about icons: 31,578 choose a text, 57,672 a picture, 18,189 fill"
    )
    splits: tuple[str, ...] = ("train", "val", "test")
    build_options: type[BaseModel] = IconQAOptions
    needs_raw = True
    templates: Mapping[str, Template] = {
        "zhou2024": Template(zhou2024),
        # Its papers rank the choices by their loss.
        "kim2023": Template(kim2023, mode="rank"),
        "plain": Template(plain),
    }
    metrics: tuple[Metric, ...] = (ACCURACY,)
    primary_metric = ACCURACY

    def read(
        self, raw: Path | None, split: str, options: IconQAOptions
    ) -> Iterator[Sample | Dropped]:
        """The problems of a kind and split in the order of `pid_splits.json`."""
        problems_file = needed(raw, ["problems.json"], _FILES)
        splits_file = needed(raw, ["pid_splits.json"], _FILES)
        kind, place = options.kind, f"iconqa/{split}/{options.kind}"
        folder = options.image_folder or problems_file.parent
        rows = _rows(problems_file, splits_file, kind, split)
        return built(rows, lambda name, row: _sample(name, row, kind, place, folder))

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """Accuracy as the template's paper computes it."""
        targets = [template(sample).target for sample in samples]
        if template.name == kim2023.__name__:
            scores = exact_matches(predictions, targets)
        elif template.name in self.templates:
            scores = lower_case_matches(predictions, targets)
        else:
            scores = target_matches(samples, predictions, template)
        return {ACCURACY.name: mean(scores)}, scores


def _rows(
    problems_file: Path, splits_file: Path, kind: str, split: str
) -> Iterator[tuple[str, Any]]:
    splits = dict(read_items(splits_file))
    key = f"{kind}_{split}"
    if not isinstance(splits.get(key), list):
        raise DataError(f"'{splits_file}' has no list '{key}';", "download it again.")
    wanted = {str(problem_id): None for problem_id in splits[key]}
    problems = {name: row for name, row in read_items(problems_file) if name in wanted}
    for problem_id in wanted:
        if problem_id not in problems:
            raise DataError(
                f"problem {problem_id} of '{splits_file}' is not in problems.json;",
                "the two files must come from the same download.",
            )
        yield problem_id, problems[problem_id]


TASK = IconQA()
