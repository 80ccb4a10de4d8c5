"""Runs scored by the installed lmms-eval: the answers and metrics of `mmtrain evaluate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmtrain import plugins
from mmtrain.__main__ import main
from mmtrain.assemble import build_source
from mmtrain.config.schema import DataConfig, GenerationConfig
from mmtrain.errors import ConfigError, DataError, MmtrainError
from mmtrain.evaluation.evaluate import evaluate
from mmtrain.lmms import TASK_FILES
from mmtrain.lmms.requests import batches, cut, settings_of
from mmtrain.models.encoding import encode
from mmtrain.tasks.interface import Rendered, Turn
from mmtrain.training.inference import ready_from_argument
from tests import tiny
from tests.distributed.lmms_program import BATCH, LIMIT, answers_of, scored
from tests.in_process import one_rank, train
from tests.unit.llava_material import write_lively
from tests.unit.lmms_material import (
    QUESTIONS,
    SHOWN,
    evaluated,
    write_golden,
    write_others,
    write_task,
    written_shards,
)

IA3 = {"llm": {"mode": "peft", "method": "ia3", "lr": 0.5, "sublayers": ["attn", "mlp"]}}
SHIPPED = sorted(TASK_FILES.glob("*.yaml"))
TASKS = {"lora": "mmtrain_digits_multiple_choice", "ia3": "mmtrain_scienceqa_kim2023"}


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def shards(digit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_shards(tmp_path_factory.mktemp("shards"), digit_shards)


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA that speaks, and (IA)3 whose template ranks; on a base that says many things."""
    root = tmp_path_factory.mktemp("runs")
    science = {"task": "scienceqa", "template": "kim2023", "limit": 24}
    science["train"] = str(shards / "scienceqa" / "train")
    base = write_lively(root / "base")
    sections: dict[str, dict[str, Any]] = {
        "lora": {"generation": {"max_new_tokens": 6}},
        "ia3": {"components": IA3, "data": science},
    }
    for name, changed in sections.items():
        steps = {"max_steps": 3, "lr": 2e-2}
        train(tiny.run_data(base, shards / "digits", root / name, optim=steps, **changed))
    return {name: root / name for name in sections}


@pytest.mark.parametrize("method", TASKS)
def test_answers_and_metrics_are_those_of_evaluate(
    runs: dict[str, Path],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    monkeypatch.setenv("MMTRAIN_SHARDS", str(shards))
    task, run = TASKS[method], runs[method]
    ready = ready_from_argument(str(run), [f"generation.batch_size={BATCH}"], base=False)
    folder = shards / task.split("_")[1] / "test"
    answers, metrics = evaluated(ready, folder, LIMIT, tmp_path)
    found = scored(f"run={run}", task)
    assert answers_of(found, task) == answers and len(set(answers)) > 1
    for name in set(metrics) - {"loss"}:
        assert found["results"][task][f"{name},none"] == metrics[name]
    untrained = scored(f"run={run},base=true", task)
    assert answers_of(untrained, task) != answers, "the adapter answers, not the base"


def shown_in(path: Path) -> dict[str, Any]:
    """A task file as lmms-eval reads it."""
    from lmms_eval.utils import load_yaml_config

    shown: dict[str, Any] = load_yaml_config(str(path), mode="full")
    return shown


def test_every_shipped_file_scores_as_evaluate_does(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the small files in the published formats, which hold every kind of question."""
    monkeypatch.setenv("MMTRAIN_SHARDS", str(tmp_path))
    asked = {path.stem: shown_in(path) for path in SHIPPED}
    for place in {one["dataset_path"] for one in asked.values()}:
        write_golden(tmp_path / place)
    found = scored(f"run={runs['lora']}", *asked, limit=None)
    ready = ready_from_argument(str(runs["lora"]), [], base=False)
    settings = ready.config.generation.model_copy(update={"batch_size": BATCH})
    for name, shown in asked.items():
        data_set, template = (
            shown["dataset_path"].split("/")[0],
            shown["dataset_kwargs"]["template"],
        )
        data = DataConfig(task=data_set, template=template)
        config = ready.config.model_copy(update={"data": data})
        source = build_source(config, ready.assembled, str(tmp_path / shown["dataset_path"]))
        task = plugins.load("task", data_set)
        truth = evaluate(ready.engine, source, task, settings)
        assert answers_of(found, name) == [one.prediction for one in truth.predictions], name
        for metric in task.metrics:
            given = found["results"][name][f"{metric.name},none"]
            assert given == truth.metrics.get(metric.name), (name, metric.name)


def test_own_words_and_settings_of_the_run_file(
    runs: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    words = {"prompt": "{question} Say it.", "target": "{answer}"}
    folder = str(shards / "scienceqa" / "train")

    def asked(template: object) -> Any:
        shown = (
            f"task: mine\nclass: !function mmtrain.lmms.task.ShardTask\ndataset_path: {folder}\n"
        )
        kwargs = yaml.safe_dump({"dataset_kwargs": {"template": template}})
        (tmp_path / "mine.yaml").write_text(shown + kwargs)
        arguments = f"run={runs['lora']},generation.max_new_tokens=1"
        return scored(arguments, "mine", include_path=tmp_path)

    found = asked(words)
    assert all(one["doc"]["prompt"].endswith("? Say it.") for one in found["samples"]["mine"])
    assert all(len(answer) <= 10 for answer in answers_of(found, "mine")), "one token each"
    with pytest.raises(ConfigError, match="scienceqa has no 'kim2032'; did you mean 'kim2023'"):
        asked("kim2032")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_others(tmp_path_factory.mktemp("others"))


def test_tasks_of_others_with_any_number_of_pictures(runs: dict[str, Path], others: Path) -> None:
    run = runs["lora"]
    found = scored(f"run={run}", "others", include_path=write_task(others), batch_size=4)
    ready = ready_from_argument(str(run), [], base=False)
    family, processor = ready.engine.family, ready.engine.processor
    examples = [
        encode(family, processor, text, Rendered((Turn("user", text),), ""), seen, 2048, "left")
        for text, seen in zip(QUESTIONS, [[one.convert("RGB") for one in seen] for seen in SHOWN])
    ]
    settings = ready.config.generation.model_copy(update={"max_new_tokens": 5, "num_beams": 2})
    answers = ready.engine.generate(examples, settings)
    assert answers_of(found, "others") == answers and len(set(answers)) > 1
    mean = sum(map(len, answers)) / len(answers)
    assert found["results"]["others"]["acc,none"] == pytest.approx(mean)


def raised(call: Any, *given: Any, **named: Any) -> str:
    with pytest.raises(MmtrainError) as caught:
        call(*given, **named)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            {
                "output_type": "generate_until_multi_round",
                "doc_to_text": "!function tests.unit.lmms_material.round_of",
            },
            "known beforehand",
        ),
        (
            {
                "output_type": "multiple_choice",
                "generation_kwargs": "",
                "doc_to_choice": "choices",
                "doc_to_target": "a",
                "process_results": "",
            },
            "into text",
        ),
        ({"generation_kwargs": "{temperature: 0.2}"}, "at random"),
        ({"doc_to_visual": "!function tests.unit.lmms_material.film"}, "no picture but str"),
    ],
)
def test_what_cannot_be_done_is_refused(
    runs: dict[str, Path], others: Path, changed: dict[str, str], reason: str
) -> None:
    path = write_task(others, **changed)
    assert reason in raised(scored, f"run={runs['lora']}", "others", include_path=path)


def test_wrong_arguments_are_errors_with_a_remedy(runs: dict[str, Path]) -> None:
    run, task = f"run={runs['lora']}", TASKS["lora"]
    assert "run is missing" in raised(scored, "base=true", task)
    assert "did you mean 'num_beams'" in raised(scored, f"{run},generation.num_beam=2", task)
    assert "requests of its own" in raised(scored, f"{run},parallel.deepspeed=zero3", task)
    assert "batch_size=auto" in raised(scored, run, task, batch_size="auto")
    assert "this rank's is cpu" in raised(scored, run, task, device="cuda")
    with pytest.raises(DataError, match="shards/digits/test"):
        scored(run, task)


@pytest.mark.parametrize(
    "asked", [{"do_sample": True}, {"temperature": 1}, {"do_sample": True, "temperature": 0.7}]
)
def test_answers_are_never_drawn(asked: dict[str, Any]) -> None:
    assert "at random" in raised(settings_of, asked, GenerationConfig())


def test_settings_of_a_request() -> None:
    usual = GenerationConfig(num_beams=5, length_penalty=-1.0)
    greedy = {"do_sample": False, "temperature": 0.7, "top_k": 1, "until": ["\n"]}
    assert settings_of(greedy, usual) == usual
    assert settings_of({"num_beams": 1, "max_new_tokens": 4}, usual).num_beams == 1
    assert "'min_length' is nothing" in raised(settings_of, {"min_length": 3}, usual)


def test_an_answer_ends_where_the_task_says() -> None:
    assert cut("one\ntwo. three", {"until": [".", "\n"]}) == "one"
    assert cut("one two. three", {"until": "", "stop_sequences": [". "]}) == "one two"
    assert cut(" all ", {"until": None}) == cut("all", {"until": [""]}) == "all"


def test_neighbours_are_asked_together() -> None:
    def request(number: int, task: str, beams: int) -> Any:
        return ("", {"num_beams": beams}, None, number, task, "test")

    asked = [request(0, "a", 1), request(1, "a", 1), request(2, "a", 1), request(3, "a", 2)]
    asked.append(request(0, "b", 2))
    assert [len(part) for part in batches(asked, 2)] == [2, 1, 1, 1]


def test_shipped_files_name_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    from mmtrain.lmms.task import ShardTask

    assert main(["lmms"]) == 0
    assert capsys.readouterr().out.strip() == str(TASK_FILES)
    assert main(["lmms", "--list"]) == 0
    names = capsys.readouterr().out.split()
    assert {*TASKS.values(), "mmtrain_mme_liu2023", "mmtrain_pope_liu2023"} <= set(names)
    for path in SHIPPED:
        shown = shown_in(path)
        data_set, split = shown["dataset_path"].split("/")
        template, task = shown["dataset_kwargs"]["template"], plugins.load("task", data_set)
        assert shown["class"] is ShardTask and path.stem == shown["task"]
        assert shown["task"] == f"mmtrain_{data_set}_{template}"
        assert template in task.templates and split in task.splits
