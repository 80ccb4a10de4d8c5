"""MME: 2,374 yes-or-no questions in 14 sub-tasks, two about each picture. Evaluation only.

Raw: the 14 files of its evaluation tool, `<sub-task>.txt` with picture, question and answer between
tabs, and beside them (or in --images) the pictures as released: `<sub-task>/<picture>`, or
`<sub-task>/images/<picture>`.

Scores as its tool counts them. A sub-task gives 100 points for its share of right answers and 100
for its share of pictures with all answers right. `perception` is the sum of ten (at most 2000),
`cognition` of four (at most 800), `overall` of both.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from mmtrain.errors import DataError
from mmtrain.tasks.interface import Dropped, Metric, Sample, Template
from mmtrain.tasks.metrics import ACCURACY, mean
from mmtrain.tasks.pictures import Unusable
from mmtrain.tasks.published import PictureOptions, picture
from mmtrain.tasks.templates import plain
from mmtrain.tasks.yes_no import liu2023, right_answers

PERCEPTION_TASKS = (
    "existence count position color posters celebrity scene landmark artwork OCR"
).split()
COGNITION_TASKS = (
    "commonsense_reasoning numerical_calculation text_translation code_reasoning"
).split()
SUB_TASKS = (*PERCEPTION_TASKS, *COGNITION_TASKS)
CHOICES = ("Yes", "No")
OVERALL = Metric("overall", larger_is_better=True, unit="points")
PERCEPTION = Metric("perception", larger_is_better=True, unit="points")
COGNITION = Metric("cognition", larger_is_better=True, unit="points")
ACCURACY_PLUS = Metric("accuracy_plus", larger_is_better=True, unit="%")
_POINTS = 100.0
_READ_CHARACTERS = 4


def said(prediction: str) -> str | None:
    """The yes or no that the evaluation tool reads from an answer."""
    start = prediction.strip().lower()[:_READ_CHARACTERS]
    return next((word for word in ("yes", "no") if word in start), None)


class Mme:
    """The MME task."""

    description = "2,374 yes-or-no questions about perception and cognition, evaluation only"
    splits: tuple[str, ...] = ("test",)
    build_options: type[BaseModel] = PictureOptions
    needs_raw = True
    templates: Mapping[str, Template] = {"plain": Template(plain), "liu2023": Template(liu2023)}
    metrics: tuple[Metric, ...] = (
        OVERALL,
        PERCEPTION,
        COGNITION,
        ACCURACY,
        ACCURACY_PLUS,
        *(Metric(name.lower(), larger_is_better=True, unit="points") for name in SUB_TASKS),
    )
    primary_metric = OVERALL

    def read(
        self, raw: Path | None, split: str, options: PictureOptions
    ) -> Iterator[Sample | Dropped]:
        """The questions, sub-task by sub-task, in the order of their files."""
        assert raw is not None, "needs_raw is True"
        missing = [f"{name}.txt" for name in SUB_TASKS if not (raw / f"{name}.txt").is_file()]
        if missing:
            raise DataError(
                f"MME needs {', '.join(missing)} in '{raw}';",
                "give --raw the folder with the files of its evaluation tool.",
            )
        for name in SUB_TASKS:
            yield from _questions(raw, name, options.image_folder or raw)

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """Points of the sub-tasks that are asked, and their sums."""
        right = right_answers(samples, predictions, template, said)
        scores = [float(one) for one in right]
        metrics = {ACCURACY.name: mean(scores)}
        asked: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for sample, score in zip(samples, scores, strict=True):
            asked[str(sample.meta["sub_task"])][str(sample.meta["picture"])].append(score)
        both = [min(one) for pictures in asked.values() for one in pictures.values()]
        metrics[ACCURACY_PLUS.name] = mean(both, ACCURACY_PLUS.name)
        points = {name: _points(pictures) for name, pictures in asked.items()}
        metrics |= {name.lower(): value for name, value in points.items()}
        for metric, names in (
            (PERCEPTION, PERCEPTION_TASKS),
            (COGNITION, COGNITION_TASKS),
            (OVERALL, SUB_TASKS),
        ):
            if points.keys() & set(names):
                metrics[metric.name] = sum(points.get(name, 0.0) for name in names)
        return metrics, scores


def _points(pictures: Mapping[str, Sequence[float]]) -> float:
    accuracy = mean([score for asked in pictures.values() for score in asked])
    return _POINTS * accuracy + _POINTS * mean([min(asked) for asked in pictures.values()])


def _questions(raw: Path, name: str, pictures: Path) -> Iterator[Sample | Dropped]:
    folders = (pictures / name, pictures / name / "images")
    asked: Counter[str] = Counter()
    for number, line in enumerate(_lines(raw / f"{name}.txt"), start=1):
        if not line.strip():
            continue
        try:
            image, question, answer = _columns(line)
            pixels = picture(image, folders)
            asked[image] += 1
        except Unusable as fault:
            yield fault.dropped(f"{name}.txt, line {number}")
            continue
        sample_id, meta = f"{name}/{image}/{asked[image]}", {"sub_task": name, "picture": image}
        yield Sample(sample_id, (pixels,), (), question, (answer,), CHOICES, meta)
    for image in (image for image, times in asked.items() if times == 1):
        lone = Unusable("its picture is asked once, not twice", "Download the file again.")
        yield lone.dropped(f"{name}/{image}/2")


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as fault:
        raise DataError(f"'{path}' is not UTF-8: {fault.reason};", "download it again.") from fault
    if not any(line.strip() for line in lines):
        raise DataError(f"'{path}' holds no question;", "download it again.")
    return lines


def _columns(line: str) -> tuple[str, str, str]:
    """Picture, question, answer; a fourth column, of somebody's predictions, is nobody's."""
    columns = [column.strip() for column in line.split("\t")]
    answer = columns[2].capitalize() if len(columns) > 2 else ""
    if answer not in CHOICES or not columns[0]:
        raise Unusable(
            "its line is not picture, question and Yes or No between tabs",
            "Download the file again.",
            line.strip(),
        )
    return columns[0], columns[1], answer


TASK = Mme()
