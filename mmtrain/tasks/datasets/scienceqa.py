"""ScienceQA: multiple choice school questions, about half of them with an image.

Raw files as published: `problems.json`, `pid_splits.json`, `images/<split>/<id>/image.png`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmtrain.errors import DataError
from mmtrain.tasks.interface import ImageBytes, Metric, Rendered, Sample, Template, Turn
from mmtrain.tasks.metrics import ACCURACY, exact_matches, mean, target_matches
from mmtrain.tasks.raw_files import json_object
from mmtrain.tasks.templates import answer_index, bracketed, without_signs

LETTERS = "ABCDE"  # no question has more than five choices
_META_KEYS = ("hint", "lecture", "solution", "subject", "topic", "category", "skill", "grade")
_NAMED_AT_MOST = 5
_REMEDY = "give --raw the folder with problems.json, pid_splits.json and images/."
ACCURACY_IMAGE = Metric("accuracy_image", larger_is_better=True, unit="%")


class ScienceQAOptions(BaseModel):
    """Options of `mmtrain shards build scienceqa --set key=value`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: Literal["all", "only", "none"] = Field(
        "all", description="'only' keeps the questions with an image, 'none' those without"
    )


def zhou2024(sample: Sample) -> Rendered:
    """Question and lettered choices, answered by the letter (Zhou et al. 2024, Table 10)."""
    letters = LETTERS[: len(sample.choices)]
    options = ", ".join(
        f"{letter}. {choice}" for letter, choice in zip(letters, sample.choices, strict=True)
    )
    prompt = f"{sample.question} {options}"
    target = letters[answer_index(sample)]
    return Rendered((Turn("user", prompt),), target, candidates=tuple(letters))


def kim2023(sample: Sample) -> Rendered:
    """The form of the InstructBLIP PEFT papers, with its literal braces and removed signs."""
    candidates = bracketed(sample.choices)
    context = f"{sample.meta.get('hint', '')} {sample.meta.get('lecture', '')}"
    options = "".join(f"{candidate}\n" for candidate in candidates)
    text = f"Context: {{{context}}} Question: {{{sample.question}}} Options: {{{options}}} Answer:"
    prompt = without_signs(text)
    target = candidates[answer_index(sample)]
    return Rendered((Turn("user", prompt),), target, instruction=prompt, candidates=candidates)


def instructblip_peft(sample: Sample) -> Rendered:
    """What `kim2023` was called: run files that say so go on."""
    return kim2023(sample)


def chosen_letter(prediction: str) -> str | None:
    """The letter that LLaVA's ScienceQA evaluator reads from an answer, if it reads one."""
    text = prediction.strip()
    if text in tuple(LETTERS):
        return text
    if text[:1] in tuple(LETTERS) and text[1:3] == ". ":
        return text[0]
    # Its pattern ends in an unescaped dot: any sign may follow, but one must.
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def _letter_scores(samples: Sequence[Sample], predictions: Sequence[str]) -> list[float]:
    return [
        float(chosen_letter(prediction) == LETTERS[answer_index(sample)])
        for sample, prediction in zip(samples, predictions, strict=True)
    ]


def _scores(
    samples: Sequence[Sample], predictions: Sequence[str], template: Template
) -> list[float]:
    """As the template's paper scores its answers."""
    if template.name == zhou2024.__name__:
        return _letter_scores(samples, predictions)
    if template.name in (kim2023.__name__, instructblip_peft.__name__):
        return exact_matches(predictions, [template(sample).target for sample in samples])
    return target_matches(samples, predictions, template)


class ScienceQA:
    """The ScienceQA task."""

    description = "21,208 school questions with choices, 10,332 of them with an image"
    splits: tuple[str, ...] = ("train", "val", "test")
    build_options: type[BaseModel] = ScienceQAOptions
    needs_raw = True
    templates: Mapping[str, Template] = {
        "zhou2024": Template(zhou2024),
        # Its papers rank the choices by their loss.
        "kim2023": Template(kim2023, mode="rank"),
        "instructblip_peft": Template(instructblip_peft, mode="rank"),
    }
    metrics: tuple[Metric, ...] = (ACCURACY, ACCURACY_IMAGE)
    primary_metric = ACCURACY

    def read(self, raw: Path | None, split: str, options: ScienceQAOptions) -> Iterator[Sample]:
        """The questions of a split in the order of `pid_splits.json`."""
        assert raw is not None, "needs_raw is True"
        problems = json_object(raw / "problems.json", _REMEDY)
        chosen = [
            (problem_id, problem)
            for problem_id, problem in _problems_of_split(raw, problems, split)
            if _wanted(problem, options.images)
        ]
        _check_images(raw, chosen)
        for problem_id, problem in chosen:
            yield _sample(raw, problem_id, problem)

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """Accuracy as the template's paper computes it, and the same over images alone."""
        scores = _scores(samples, predictions, template)
        metrics = {ACCURACY.name: mean(scores)}
        with_image = [score for sample, score in zip(samples, scores, strict=True) if sample.images]
        if with_image:
            metrics[ACCURACY_IMAGE.name] = mean(with_image, ACCURACY_IMAGE.name)
        return metrics, scores


def _problems_of_split(
    raw: Path, problems: Mapping[str, object], split: str
) -> Iterator[tuple[str, dict[str, object]]]:
    path = raw / "pid_splits.json"
    splits = json_object(path, _REMEDY)
    if split not in splits:
        raise DataError(f"'{path}' has no split '{split}';", f"it has: {', '.join(splits)}.")
    ids = splits[split]
    if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
        raise DataError(f"split '{split}' of '{path}' is no list of texts;", "download it again.")
    for problem_id in ids:
        if problem_id not in problems:
            raise DataError(
                f"problem {problem_id} of '{path}' is not in problems.json;",
                "the two files must come from the same download.",
            )
        yield problem_id, _checked(problem_id, problems[problem_id])


def _checked(problem_id: str, problem: Any) -> dict[str, object]:
    """A problem whose answer points at one of its two to five choices."""
    try:
        choices, answer = problem["choices"], problem["answer"]
        sound = (
            isinstance(problem["question"], str)
            and isinstance(answer, int)
            and 0 <= answer < len(choices) <= len(LETTERS)
            and all(isinstance(choice, str) for choice in choices)
        )
    except (KeyError, TypeError, AttributeError) as fault:
        raise DataError(
            f"problem {problem_id} lacks a field or has a wrong type ({fault!r});",
            "download problems.json again.",
        ) from fault
    if not sound:
        raise DataError(
            f"problem {problem_id} has answer {answer!r} among {len(choices)} choices;",
            f"the answer must be the number of one of at most {len(LETTERS)} texts.",
        )
    return problem


def _wanted(problem: Mapping[str, object], images: str) -> bool:
    has_image = bool(problem.get("image"))
    return images == "all" or has_image == (images == "only")


def _image_path(raw: Path, problem_id: str, problem: Mapping[str, object]) -> Path:
    parts = (str(problem.get("split", "")), problem_id, str(problem["image"]))
    # Names only: a raw file must not lead to files outside its own folder.
    return raw.joinpath("images", *(Path(part).name for part in parts))


def _check_images(raw: Path, chosen: Sequence[tuple[str, Mapping[str, object]]]) -> None:
    """Fail before anything is written, and name the gaps."""
    paths = [_image_path(raw, key, problem) for key, problem in chosen if problem.get("image")]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} images are missing, first"
            f" {', '.join(missing[:_NAMED_AT_MOST])};",
            "unpack the image archives below images/, or pass --set images=none.",
        )


def _sample(raw: Path, problem_id: str, problem: Mapping[str, Any]) -> Sample:
    images: tuple[ImageBytes, ...] = ()
    if problem.get("image"):
        path = _image_path(raw, problem_id, problem)
        images = (ImageBytes(path.suffix.removeprefix(".").lower(), path.read_bytes()),)
    meta = {key: problem[key] for key in _META_KEYS if problem.get(key)}
    return Sample(
        id=problem_id,
        images=images,
        question=problem["question"],
        answers=(problem["choices"][problem["answer"]],),
        choices=tuple(problem["choices"]),
        meta={**meta, "answer_index": problem["answer"]},
    )


TASK = ScienceQA()
