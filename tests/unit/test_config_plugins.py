"""`resolve`: the schema and every plug-in the file names, in one report."""

from __future__ import annotations

from typing import Any

import pytest

from mmtrain import plugins
from mmtrain.config import yaml_text
from mmtrain.config.load import dump_run
from mmtrain.errors import ConfigError, MmtrainError
from mmtrain.resolve import method_options, resolve

MODEL = {"family": "llava", "preset": "tiny"}
LORA = {"mode": "peft", "method": "lora"}


def problems(data: dict[str, Any], world_size: int | None = None) -> set[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(data, world_size=world_size)
    assert len(caught.value.problems) == len(set(caught.value.problems))
    return set(caught.value.problems)


def test_a_key_that_the_family_does_not_read_is_an_error() -> None:
    others = {"max_pixels": 1000, "grounding_tokens": False}
    assert problems({"model": MODEL | others | {"vision_tower": "/data/clip"}}) == {
        "model.max_pixels: 'llava' does not read it (only qwen2_vl); remove it",
        "model.grounding_tokens: 'llava' does not read it (only qwen_vl); remove it",
    }


def test_schema_and_plugins_in_one_report() -> None:
    data = {
        "model": MODEL | {"preset": "llava-1.5-7"},
        "seed": "x",
        "components": {
            "lm": LORA,
            "llm": LORA | {"method": "lra"},
            "vision": LORA | {"rank": 3, "alpha": -1, "sublayers": ["mpl"], "leyers": 3},
            "connector": LORA,
        },
        "data": {"task": "sciencqa", "limit": 0},
        "parallel": {"deepspeed": "zro1"},
    }
    assert problems(data, world_size=3) == {
        'seed: got "x"; give a whole number',
        "model.preset: 'llava' has no preset 'llava-1.5-7'; did you mean 'llava-1.5-7b'?",
        "components.lm: unknown component; did you mean 'llm'?",
        "components.llm.method: unknown method 'lra'; did you mean 'lora'?",
        "components.vision.rank: unknown key; did you mean 'r'?",
        "components.vision.leyers: unknown key; did you mean 'layers'?",
        "components.vision.alpha: got -1; give a number above 0",
        "components.vision.sublayers: no sublayer 'mpl'; did you mean 'mlp'?",
        "components.connector: has no sublayers to adapt; use 'full', or one of: llm, vision",
        "data.task: unknown task 'sciencqa'; did you mean 'scienceqa'?",
        "data.limit: got 0; give at least 1",
        "parallel.deepspeed: 'zro1': no such file in ds_configs; did you mean 'zero1'? "
        "or a path ending .json",
        "optim.global_batch: 128 is no multiple of micro_batch 16 x 3 ranks; "
        "use a multiple of 3 ranks",
    }


def test_unknown_family_role_and_template() -> None:
    (problem,) = problems({"model": MODEL | {"family": "lava"}, "components": {"llm": LORA}})
    assert problem == "model.family: unknown family 'lava'; did you mean 'llava'?"
    roles = LORA | {"sublayers": {"attn": ["q", "qq"], "mlp": []}}
    assert problems({"model": MODEL, "components": {"llm": roles}}) == {
        "components.llm.sublayers.attn: no role 'qq'; did you mean 'q'?",
        "components.llm.sublayers.mlp: is empty; valid: down, gate, up",
    }
    data = {"task": "scienceqa", "template": "zhou24"}
    (problem,) = problems({"model": MODEL, "data": data})
    assert (
        "data.template: 'scienceqa' has no template 'zhou24'; did you mean 'zhou2024'?" == problem
    )


@pytest.mark.parametrize(
    ("optim", "ranks", "expected"),
    [
        ({"global_batch": 8}, None, "8 is no multiple of micro_batch 16; use micro_batch 8"),
        ({}, 16, "128 is no multiple of micro_batch 16 x 16 ranks; use micro_batch 8"),
        (
            {"micro_batch": 2**20},
            1,
            f"128 is no multiple of micro_batch {2**20} x 1 ranks; use micro_batch 128",
        ),
        ({}, 8, ""),
        ({"global_batch": 48, "micro_batch": 4}, 12, ""),
    ],
)
def test_batch_arithmetic(optim: dict[str, int], ranks: int | None, expected: str) -> None:
    data = {"model": MODEL, "optim": optim}
    if expected:
        assert problems(data, ranks) == {f"optim.global_batch: {expected}"}
    else:
        resolve(data, world_size=ranks)


def test_what_would_only_fail_after_hours_is_in_the_report() -> None:
    data: dict[str, Any] = {
        "model": MODEL,
        "data": {"task": "scienceqa"},
        "validate": {"metric": "acuracy_image", "patience": 3},
        "tracking": {"uri": "./mlruns"},
        "seed": "x",
    }
    assert problems(data) == {
        "validate.metric: 'scienceqa' gives no 'acuracy_image'; did you mean 'accuracy_image'?",
        "validate.patience: counts validations, and there is no data.val; "
        "set data.val or remove patience",
        "tracking.uri: './mlruns' is a folder, which MLflow no longer takes; "
        "use sqlite:///mlflow.db, the address of a server (http://host:port) or none",
        'seed: got "x"; give a whole number',
    }


@pytest.mark.parametrize("metric", ["loss", "accuracy", "accuracy_image"])
@pytest.mark.parametrize("uri", ["none", "sqlite:///a.db", "http://host:5000"])
def test_metrics_and_trackers_that_exist_are_taken(metric: str, uri: str) -> None:
    data = {
        "model": MODEL,
        "data": {"task": "scienceqa", "val": "somewhere"},
        "validate": {"metric": metric, "patience": 1},
        "tracking": {"uri": uri},
    }
    assert resolve(data).validation.metric == metric


def test_a_tracker_s_password_is_not_repeated() -> None:
    (problem,) = problems({"model": MODEL, "tracking": {"uri": "file://me:geheim@host/a"}})
    assert "geheim" not in problem and "file://***@host/a" in problem


def test_the_result_says_all_that_the_run_will_do() -> None:
    data: dict[str, Any] = {"model": MODEL, "components": {"llm": LORA | {"r": 4}}}
    config = resolve(data | {"data": {"task": "scienceqa"}})
    options = plugins.load("method", "lora").options(r=4)
    assert config.components["llm"].method_options == options.model_dump()
    assert method_options(config.components["llm"]) == options
    assert config.data is not None
    assert config.data.template == next(iter(plugins.load("task", "scienceqa").templates))
    assert resolve(yaml_text.parse(dump_run(config))[0]) == config


def test_plugins_are_found_by_listing() -> None:
    assert "llava" in plugins.names("family") and "lora" in plugins.names("method")
    with pytest.raises(MmtrainError, match="unknown task 'digit'; did you mean 'digits'"):
        plugins.load("task", "digit")
