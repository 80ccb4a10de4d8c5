"""Questions about pictures: the papers' prompts and targets, and how their answers are scored."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtrain import plugins
from mmtrain.tasks.interface import Sample
from mmtrain.tasks.templates import own
from mmtrain.tasks.vqa_templates import wang2024

GOLDEN = Path(__file__).parents[1] / "golden" / "tasks"


def samples(name: str, **options: object) -> dict[str, Sample]:
    task = plugins.load("task", name)
    chosen = task.build_options.model_validate(options)
    found = task.read(GOLDEN / name / "raw", "train", chosen)
    return {one.id: one for one in found if isinstance(one, Sample)}


def score(name: str, template: str, given: list[Sample], said: list[str]) -> list[float]:
    task = plugins.load("task", name)
    return list(task.score(given, said, task.templates[template])[1])


# --- prompts and targets --------------------------------------------------------------------------


def test_wang2024_drops_ten_signs_and_cuts_at_fifty_words() -> None:
    sample = Sample("1", question='Is it "U.S.A." (#1; a*b: c~d!)?', answers=("no",))
    assert wang2024(sample).turns[0].text == "question is it usa 1 ab cd? short answer"
    long = Sample("1", question=" ".join(map(str, range(99))), answers=("no",))
    words = wang2024(long).turns[0].text.split(" ")
    assert len(words) == 50 and words[-1] == "48"


@pytest.mark.parametrize(
    ("template", "target"), [("zhou2024", "flan"), ("wang2024", "crème brûlée"), ("plain", "flan")]
)
def test_targets_of_ten_answers(template: str, target: str) -> None:
    task = plugins.load("task", "okvqa")
    assert task.templates[template](samples("okvqa")["816295"]).target == target


def test_iconqa_prompts_of_each_kind() -> None:
    task = plugins.load("task", "iconqa")
    blank = samples("iconqa", kind="fill_in_blank")["30"]
    asked = task.templates["zhou2024"](blank)
    assert asked.turns[0].text == (
        "Count the stars. There are (_) stars."
        " Fill in the blanks in (_) or answer this question."
    )
    assert asked.target == "7" and asked.candidates == ()
    asked = task.templates["kim2023"](blank)
    assert asked.turns[0].text == (
        "<Image> Question: Count the stars. There are (_) stars. Short answer:"
    )
    pictured = task.templates["zhou2024"](samples("iconqa", kind="choose_img")["20"])
    assert pictured.target == "B" and " Choices: A, B Choose an option " in pictured.turns[0].text


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["zhou2024", "wang2024", "plain"])
def test_ten_answers_give_the_vqa_score(template: str) -> None:
    given = [samples("okvqa")["816295"]] * 4
    said = ["Flan.", "crème brûlée", "pudding", "cake"]
    assert score("okvqa", template, given, said) == pytest.approx([1.0, 0.9, 0.3, 0.0])


def test_unanswerable_is_an_answer_among_others() -> None:
    given = [samples("vizwiz")["VizWiz_train_00000002.jpg"]] * 3
    said = ["Unanswerable", "unsuitable", "tomatoes"]
    assert score("vizwiz", "zhou2024", given, said) == pytest.approx([1.0, 0.9, 0.0])


def test_textvqa_tells_the_first_answer_too() -> None:
    task = plugins.load("task", "textvqa")
    given = [samples("textvqa")["1"]] * 4
    said = ["11:38 et", "unanswerable", "live", "noon"]
    metrics, each = task.score(given, said, task.templates["wang2024"])
    assert each == pytest.approx([0.6, 0.9, 0.9, 0.0])
    first = {"first_answer": 0.25, "first_answer_lemmas": 0.25}
    assert metrics == pytest.approx({"vqa_score": 0.6} | first)


def test_aokvqa_scores_what_was_asked_for() -> None:
    given = [samples("aokvqa")["22MexNkBPpdZGX6sxbxVBH"]] * 5
    said = ["ride", "taxi", "cab", "D", "Ride"]
    direct = pytest.approx([2 / 3, 2 / 3, 2 / 3, 0.0, 0.0])
    assert score("aokvqa", "wang2024", given, said) == direct
    assert score("aokvqa", "plain", given, said) == direct
    assert score("aokvqa", "letters", given, said) == [0.0, 0.0, 0.0, 1.0, 0.0]
    task = plugins.load("task", "aokvqa")
    mine = own("{question} {choices}", "{answer}", "generate")
    assert task.score(given, said, mine)[1] == pytest.approx([2 / 3, 2 / 3, 1.0, 0.0, 0.0])


def test_exact_answers_but_for_case() -> None:
    given = [samples("ocrvqa")["761183272-1"]] * 3
    said = [" sandra boynton\n", "Boynton", "Sandra Boynton."]
    assert score("ocrvqa", "zhou2024", given, said) == [1.0, 0.0, 0.0]
    task = plugins.load("task", "ocrvqa")
    worded = own("{question}", "It was {answer}", "generate")
    assert task.score(given, ["it was Sandra Boynton.", *said[1:]], worded)[1] == [1.0, 0.0, 0.0]


def test_iconqa_scores_as_its_papers() -> None:
    given = [samples("iconqa")["10"]] * 4
    said = ["flip", "Flip ", "(c) flip", "C"]
    assert score("iconqa", "zhou2024", given, said) == [1.0, 1.0, 0.0, 0.0]
    assert score("iconqa", "kim2023", given, said) == [0.0, 0.0, 1.0, 0.0]
    task = plugins.load("task", "iconqa")
    lettered = own("{question}\n{lettered_choices}", "{letter}", "generate")
    assert task.score(given, said, lettered)[1] == [0.0, 0.0, 0.0, 1.0]
