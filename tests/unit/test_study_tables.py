"""Studies with named options and columns: what they expand to, and the table they end in."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmtrain.errors import ConfigError, MmtrainError
from mmtrain.report.crosstab import csv_text, html_page, latex, markdown_page
from mmtrain.tasks.metrics import ACCURACY
from ray_tune import papers
from ray_tune.journal import FAILED, FINISHED, Journal, Record
from ray_tune.study import Study, load_study
from ray_tune.table import table_of, write_study_table
from ray_tune.trials import check_trials, columns_of, expand

VAL_ACCURACY = replace(ACCURACY, name="val/accuracy")
METHODS: dict[str, Any] = {
    "LoRA": {"components.llm.method": "lora", "components.llm.sublayers": ["attn"]},
    "IA3": {"components.llm.method": "ia3", "components.llm.sublayers": ["attn"]},
}
BASE: dict[str, Any] = {
    "model": {"family": "llava", "preset": "tiny"},
    "components": {"llm": {"mode": "peft"}},
    "data": {"task": "digits", "val": "shards/val"},
    "validate": {"metric": "accuracy"},
}
PAPERS = sorted(Path(papers.__file__).parent.glob("studies/paper-*.yaml"))


def study(**changed: Any) -> Study:
    sections: dict[str, Any] = {"name": "methods", "base": BASE, "metric": "val/accuracy"}
    sections |= {"axes": {"method": METHODS, "connector": {"frozen": {}, "tuned": TUNED}}}
    return Study.model_validate(sections | changed)


TUNED = {"components.connector": {"mode": "full", "lr": 1e-3}}
COLUMNS = {
    "digits": {},
    "shifted": {"run": {"data.val": "shards/shifted"}, "times": 10},
}


def test_every_combination_of_options_is_a_trial() -> None:
    trials = expand(study(search={"seed": {"grid": [1, 2]}}))
    assert len(trials) == 2 * 2 * 2
    assert trials[0].params == {"method": "LoRA", "connector": "frozen", "seed": 1}
    assert trials[0].name.startswith("LoRA-frozen-seed1-")
    assert trials[2].run["components"] == {
        "llm": {"mode": "peft", "method": "lora", "sublayers": ["attn"]},
        "connector": {"mode": "full", "lr": 1e-3},
    }
    tags = {"study": "methods", "method": "LoRA", "connector": "tuned"}
    assert trials[2].tracking["tags"] == tags, "MLflow filters by them"
    assert BASE["components"] == {"llm": {"mode": "peft"}}, "the base is not written into"
    assert study().group_by == ["method", "connector"]


def test_a_key_is_searched_where_it_holds() -> None:
    rank = {"grid": [4, 8], "when": {"method": "LoRA"}}
    scale = {"grid": [16, 32], "when": {"components.llm.r": [8]}}
    search = {"components.llm.r": rank, "components.llm.alpha": scale}
    axes = {"method": METHODS}
    found = [dict(trial.params) for trial in expand(study(axes=axes, search=search))]
    assert found == [
        {"method": "LoRA", "components.llm.r": 4},
        {"method": "LoRA", "components.llm.r": 8, "components.llm.alpha": 16},
        {"method": "LoRA", "components.llm.r": 8, "components.llm.alpha": 32},
        {"method": "IA3"},
    ]
    check_trials(study(axes=axes, search=search), expand(study(axes=axes, search=search)), "it")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"axes": {}}, "give 'search', 'axes' or both"),
        ({"axes": {"method": {}}}, "axes: 'method' has no options"),
        ({"search": {"method": {"grid": [1]}}}, "axes: 'method' is a search key, too"),
        ({"axes": {"place": {"here": {"output_dir": "x"}}}}, "does not change what a run computes"),
        ({"search": {"seed": {"grid": [1], "when": {"metod": "LoRA"}}}}, "did you mean 'method'"),
        ({"printed": {"LoRA / frosen": {"digits": 1.0}}}, "did you mean 'LoRA / frozen'"),
        ({"printed": {"LoRA / frozen": {"digit": 1.0}}}, "did you mean 'digits'"),
        ({"by": ["methods"]}, "did you mean 'method'"),
    ],
)
def test_what_is_wrong_is_said(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        study(columns=COLUMNS, **changed)


def test_a_column_is_a_study_of_its_own() -> None:
    parts = columns_of(study(columns=COLUMNS, printed={"LoRA / frozen": {"digits": 91.0}}))
    assert list(parts) == ["digits", "shifted"]
    shifted = parts["shifted"]
    assert shifted.name == "methods-shifted" and shifted.study_dir == "studies/methods/shifted"
    assert {trial.run["data"]["val"] for trial in expand(shifted)} == {"shards/shifted"}
    names = [{trial.name for trial in expand(part)} for part in parts.values()]
    assert not names[0] & names[1], "a trial's name is that of what it computes"


def journal_of(part: Study, folder: Path, values: dict[str, list[float]]) -> Journal:
    """Finished trials, a value for each row and seed; what has none failed."""
    records = [Record(t.name, t.id, dict(t.params)) for t in expand(part)]
    left = {row: list(numbers) for row, numbers in values.items()}
    for record in records:
        row = f"{record.params['method']} / {record.params['connector']}"
        record.status = FAILED if not left.get(row) else FINISHED
        if record.status == FINISHED:
            record.add(1, {"val/accuracy": left[row].pop(0)}, 0.0)
        else:
            record.reason = "out of memory"
    return Journal(folder, records, VAL_ACCURACY, None)


def test_the_table_has_ours_beside_what_was_printed(tmp_path: Path) -> None:
    whole = study(
        columns=COLUMNS,
        search={"seed": {"grid": [1, 2]}},
        printed={"LoRA / frozen": {"digits": 91.0, "shifted": 5.0}, "IA3 / tuned": {"digits": 7.0}},
        notes=["a_note & more"],
        output_dir=str(tmp_path),
    )
    parts = columns_of(whole)
    values = {
        "digits": {"LoRA / frozen": [0.9, 0.92], "LoRA / tuned": [0.5]},
        "shifted": {"LoRA / frozen": [0.4, 0.6]},
    }
    journals = {name: journal_of(parts[name], tmp_path, values[name]) for name in parts}
    table = table_of(whole, dict.fromkeys(parts, VAL_ACCURACY), journals)
    header, *rows = table.lines()
    assert header == [
        "method",
        "connector",
        "digits ↑",
        "shifted ↑",
        "mean",
    ]
    first = "91.0 ± 1.4 (91.0 +0.0)"
    assert rows[0][2:] == [
        first,
        "5.0 ± 1.4 (5.0 +0.0)",
        "48.0 (48.0 +0.0)",
    ]
    assert rows[1][2:] == ["50.0", "—", "—"] and rows[3][2] == "— (7.0)"
    lines = list(csv.DictReader(io.StringIO(csv_text(table))))
    assert len(lines) == 8 and lines[0]["values"] == "90.0 92.0" and lines[7]["printed"] == ""
    assert first in markdown_page(table, []) and first in html_page(table, [])
    assert r"a\_note" not in latex(table) and r"$\pm$" in latex(table)
    paths = write_study_table(whole, dict.fromkeys(parts, VAL_ACCURACY), journals)
    page = paths["html"].read_text()
    assert "a_note &amp; more" in page and "out of memory" in page
    # A column that has not run yet leaves its cells empty.
    early = table_of(whole, dict.fromkeys(parts, VAL_ACCURACY), {"digits": journals["digits"]})
    assert early.lines()[1][3] == "— (5.0)"


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_a_paper_says_what_it_prints_and_leaves_open(path: Path) -> None:
    study = load_study(path)
    assert study.printed and study.notes


def test_papers_are_found_by_their_number() -> None:
    assert papers.study_path("paper/004", None).name == "paper-004-table-1.yaml"
    assert papers.study_path("paper/002", "1-qwen").name == "paper-002-table-1-qwen.yaml"
    for given, table, told in (
        ("paper/002", None, "has several tables"),
        ("paper/002", "9", "has no table '9'"),
        ("paper/02", None, "there is no paper '02'"),
        ("study.yaml", "1", "is of papers"),
    ):
        with pytest.raises(MmtrainError, match=told):
            papers.study_path(given, table)


def test_what_a_table_lacks_is_known_before_it_starts(tmp_path: Path) -> None:
    path = papers.study_path("paper/003", "4")
    bare = columns_of(load_study(path))
    trials = [trial for part in bare.values() for trial in expand(part)]
    with pytest.raises(ConfigError) as caught:
        papers.refuse_missing(trials, "it")
    assert len(caught.value.problems) == 5
    for name in ("models/instructblip-flan-t5-xxl", "aokvqa/train", "aokvqa/val"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("flickr30k/train", "flickr30k/test"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models/instructblip-flan-t5-xxl/config.json").write_text("{}")
    there = papers.placed(load_study(path), str(tmp_path), str(tmp_path / "models"))
    trials = [trial for part in columns_of(there).values() for trial in expand(part)]
    papers.refuse_missing(trials, "it")
    assert trials[0].run["model"]["checkpoint"] == str(tmp_path / "models/instructblip-flan-t5-xxl")
    assert trials[0].run["data"]["train"] == str(tmp_path / "aokvqa/train")


@pytest.mark.soak
@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_every_cell_attaches_to_its_published_shapes(path: Path) -> None:
    from mmtrain.planning.census import adapted
    from mmtrain.resolve import resolve

    for trial in expand(next(iter(columns_of(load_study(path)).values()))):
        assert adapted(resolve(trial.run)).trainable.owner, trial.name
