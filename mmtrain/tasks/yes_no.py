"""Questions that are answered with yes or no, as several benchmarks ask them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mmtrain.tasks.interface import Rendered, Sample, Template, Turn
from mmtrain.tasks.metrics import target_matches
from mmtrain.tasks.vqa_templates import SHORT_ANSWER

YES_OR_NO = "Please answer yes or no."


def liu2023(sample: Sample) -> Rendered:
    """As LLaVA-1.5 asks (Liu et al. 2023): its own closing sentence in place of the set's."""
    question = sample.question.replace(YES_OR_NO, "").strip()
    prompt = f"{question}\n{SHORT_ANSWER}"
    return Rendered((Turn("user", prompt),), sample.answers[0], candidates=sample.choices)


def right_answers(
    samples: Sequence[Sample],
    predictions: Sequence[str],
    template: Template,
    said: Callable[[str], str | None],
) -> list[bool]:
    """Of each sample, whether `said` reads its answer from the prediction.

    A template whose target is neither yes nor no (a letter) wants that target instead.
    """
    matched = target_matches(samples, predictions, template)
    return [
        (
            said(prediction) == sample.answers[0].casefold()
            if template(sample).target.strip().casefold() in ("yes", "no")
            else bool(match)
        )
        for sample, prediction, match in zip(samples, predictions, matched, strict=True)
    ]
