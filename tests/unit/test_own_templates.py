"""A run file's own template: filled in by name alone, and told early where it does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from mmtrain import plugins
from mmtrain.errors import ConfigError
from mmtrain.tasks import templates
from mmtrain.tasks.interface import Sample, Turn
from tests.unit.test_own_data import row, shards, write_rows

SAMPLE = Sample("a", (), (), "Which?", ("green",), ("red", "green"), {"hint": "a {leaf}", "n": 3})


def test_an_own_template_is_filled_in_by_name_and_nothing_else() -> None:
    text = "{hint}|{n}|{question}|{choices}|{lettered_choices}|{letter}|{answer}|{{x}}"
    found = templates.own(text, "It is {answer}.", "rank")(SAMPLE)
    wanted = "a {leaf}|3|Which?|red, green|A. red\nB. green|B|green|{x}"
    assert found.turns == (Turn("user", wanted),)
    assert found.target == "It is green."
    assert found.candidates == ("It is red.", "It is green.")


def test_scores_follow_the_template() -> None:
    task = plugins.load("task", "jsonl")
    template = templates.own("{question}", "It is {answer}.", "generate")
    said = ["it is green", "green", "It is red."]
    assert task.score([SAMPLE] * 3, said, template)[1] == [1.0, 0.0, 0.0]
    several = Sample("b", answers=("red", "crimson"), question="?")
    plain = task.templates["plain"]
    assert task.score([several] * 3, ["Crimson", " red. ", "re"], plain)[1] == [1.0, 1.0, 0.0]


def test_an_own_template_fits_data_with_gaps_and_no_conversation() -> None:
    first = [SAMPLE, Sample("b", (), (), "Why?", ("so",), (), {"more": "!"})]
    found = templates.own_for("{more}{hint} {question}", "{answer}", "generate", first)
    assert found(first[1]).turns[0].text == "! Why?"
    with pytest.raises(ConfigError, match="no 'mode'.*did you mean 'more'"):
        templates.own_for("{mode}", "{answer}", "generate", first)
    with pytest.raises(ConfigError, match="no choices to rank"):
        templates.own_for("{question}", "{answer}", "rank", first[1:])
    talk = Sample("c", (), (Turn("user", "?"), Turn("assistant", "!")), "", ("!",))
    with pytest.raises(ConfigError, match="no 'question'"):
        templates.own_for("{question}", "{answer}", "generate", [talk])
    with pytest.raises(ValueError, match="its own words"):
        templates.own("Say!", "{answer}", "generate")(talk)


def own_run(template: Mapping[str, object], shards_folder: Path) -> dict[str, object]:
    return {
        "model": {"family": "llava", "preset": "tiny"},
        "components": {"llm": {"mode": "peft", "method": "lora"}},
        "data": {"task": "jsonl", "template": template, "train": str(shards_folder / "train")},
    }


def test_what_an_own_template_cannot_mean_is_told_by_check(tmp_path: Path) -> None:
    from mmtrain.planning.report import examine
    from mmtrain.resolve import resolve

    with pytest.raises(ConfigError) as caught:
        resolve(own_run({"prompt": "{question.id} {", "target": "}", "kind": 1}, tmp_path))
    text = str(caught.value)
    assert "data.template.prompt: a single '{' at character 1" in text
    assert "data.template.target: a single '}' at character 1" in text and "kind" in text
    raw = write_rows(tmp_path, [row(hint="x", question=f"{n}?") for n in range(20)])
    shards("build", "jsonl", "--raw", raw, "--out", tmp_path / "shards")
    config = resolve(own_run({"prompt": "{hin} {question}"}, tmp_path / "shards"))
    with pytest.raises(ConfigError, match="no 'hin'; did you mean 'hint'"):
        examine(config, 1)
    assert examine(resolve(own_run({"prompt": "{hint}"}, tmp_path / "shards")), 1)
