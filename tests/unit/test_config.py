"""Run files: what is read, what is refused and in which words, what is written back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmtrain.config import yaml_text
from mmtrain.config.load import (
    difference,
    dump_run,
    flatten_run,
    load_run_file,
    with_overrides,
)
from mmtrain.config.problems import checked
from mmtrain.config.schema import RunConfig
from mmtrain.errors import ConfigError

SMALLEST: dict[str, Any] = {"model": {"family": "llava", "preset": "tiny"}}


def parse_run(data: Any, overrides: Sequence[str] = ()) -> RunConfig:
    """The core schema's view of data in memory; no plug-in is asked."""
    merged, problems = with_overrides(data, overrides)
    config, more = checked(RunConfig, merged)
    if config is None or problems or more:
        raise ConfigError([*problems, *more])
    return config


def problems(data: Any, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_run(data, overrides)
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        ("-1.5e3", -1500.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("010", "010"),
        ("007.5", 7.5),
        ("12:30", "12:30"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("[1, 2e-5]", [1, 2e-5]),
        ("e5", "e5"),
    ],
)
def test_scalars_mean_what_people_mean(text: str, value: Any) -> None:
    read, faults = yaml_text.parse(text)
    assert (read, type(read), faults) == (value, type(value), [])


def test_every_problem_is_reported_at_once_in_plain_words() -> None:
    data = {
        "name": "a b",
        "nam": "x",
        "seed": True,
        "model": {"family": "llava", "precision": "bf16", "dtype": "fp8"},
        "components": {"llm": {"mode": "peft"}, "vision": {"mode": "full", "r": 3}, "x": 3},
        "optim": {
            "learning_rate": 1e-4,
            "lr": "2e-4x",
            "betas": [0.9],
            "dtype": "bf16",
            "global_batch": 0,
            "warmup_ratio": 0.1,
            "warmup_steps": 3,
        },
        "validate": {"every": "week"},
        "parallel": 3,
        "tracking": {"tags": {"a": 1}},
    }
    found = problems(data, "optim.epochs=1.5", "optim.min_lr=.inf", "name.x=3", "nonsense", "a=[1")
    assert sorted(found) == sorted(
        [
            'name.x: cannot be set, name is "a b", not a section',
            'override "nonsense": write it as section.key=value',
            "override \"a=[1\": line 1, column 3: not valid YAML: expected ',' or ']', "
            "but got '<stream end>'",
            "model.precision: unknown key; did you mean 'dtype'?",
            "model.dtype: got \"fp8\"; give 'fp32' or 'bf16'",
            "model: give exactly one of 'checkpoint' and 'preset'",
            "components.llm: mode 'peft' needs a 'method', e.g. lora",
            "components.vision: mode 'full' takes no r; use mode 'peft'",
            "components.x: got 3; give a mapping of keys to values",
            "optim.learning_rate: unknown key; did you mean 'lr'?",
            "optim.dtype: unknown key; did you mean 'model.dtype'?",
            'optim.lr: got "2e-4x"; give a number',
            "optim.betas.1: is missing; give it a value",
            "optim.global_batch: got 0; give at least 1",
            "optim.epochs: got 1.5; give a whole number",
            "optim.min_lr: got inf; give a finite number",
            "optim: give 'warmup_ratio' or 'warmup_steps', not both",
            "nam: unknown key; did you mean 'name'?",
            "name: got \"a b\"; give a name of at most 100 letters, digits, '.', '_' or '-' "
            "that starts with a letter or digit",
            "seed: got true; give a whole number",
            "validate.every: got \"week\"; give 'epoch' or a whole number",
            "parallel: got 3; give a mapping of keys to values",
            "tracking.tags.a: got 1; give text, as in '1' with its quotes",
        ]
    )


def test_numbers_that_torch_would_stumble_over_are_bounded() -> None:
    """AdamW raises where a beta is 1 or more; a million threads end in a segmentation fault."""
    data = {
        "model": {"family": "llava", "preset": "tiny"},
        "optim": {"betas": [-0.1, 1.0]},
        "parallel": {"threads": 1_000_000},
    }
    assert problems(data) == [
        "optim.betas.0: got -0.1; give at least 0",
        "optim.betas.1: got 1.0; give a number below 1",
        "parallel.threads: got 1000000; give at most 1,024",
    ]


def test_flash_attention_computes_in_bf16_only() -> None:
    model = {"family": "llava", "preset": "tiny", "attention": "flash_attention_2"}
    parse_run({"model": model}, ())
    assert problems({"model": model | {"dtype": "fp32"}}) == [
        "model: attention 'flash_attention_2' has no fp32; use 'sdpa', or dtype bf16"
    ]


def test_layers_have_three_forms() -> None:
    for layers in ("all", "last-4", "first-12", [0, 3]):
        block = {"mode": "full", "layers": layers}
        config = parse_run(SMALLEST | {"components": {"llm": block}})
        assert config.components["llm"].layers == layers
    (problem,) = problems(SMALLEST | {"components": {"llm": {"mode": "full", "layers": "last4"}}})
    assert problem == ('components.llm.layers: got "last4"; give all, first-N, last-N or a list')


def test_a_key_given_twice_is_an_error_with_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {family: llava, preset: tiny}\noptim:\n  lr: 1\n  lr: 2\n")
    with pytest.raises(ConfigError) as caught:
        load_run_file(file)
    assert caught.value.problems == ["line 4: 'lr' is given twice (first on line 3); remove one"]
    assert str(file) in str(caught.value)


def test_merged_keys_are_no_repeats() -> None:
    lines = [
        "base: &b {optim: {lr: 1}, seed: 0}",
        "a: {inner: &i {<<: *b, optim: {lr: 2}}}",
        "z: {<<: *i}",
        "y: {<<: [*i, *b], seed: 1}",
    ]
    data, problems_found = yaml_text.parse("\n".join(lines))
    assert not problems_found
    assert data["a"]["inner"] == data["z"] == {"optim": {"lr": 2}, "seed": 0}
    assert data["y"] == {"optim": {"lr": 2}, "seed": 1}
    _, (problem,) = yaml_text.parse("\n".join([*lines, "x: {<<: *i, <<: *b}"]))
    assert problem == "line 5: '<<' is given twice (first on line 5); remove one"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "mapping"),
        ("model: [", "not valid YAML"),
        ("model: !!python/object:os.system {}", "not valid YAML"),
        ("{? [a] : b}", "a key must be plain text"),
        ("&a {b: *a}", "circular"),
        ("[" * 3000, "line 1, column 51: .*nested too deeply"),
        ("\0", "special characters are not allowed"),
        ("!!bool x", "tags are not read here; remove '!!bool'"),
        ('seed: !!int ""', "line 1, column 7: .*tags are not read here"),
        ('output_dir: "a\\0b"', "line 1, column 13: .*NUL or half of a surrogate pair"),
        ('name: "\\ud800"', "NUL or half of a surrogate pair"),
        (f"seed: {'9' * 5000}", "a whole number has at most 18 digits"),
        ("a: 1\n---\nb: 1", "expected a single document in the stream but found another"),
        ("x" * 300_000, "more than 256 KiB are no settings"),
    ],
)
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_run_file(file)


def nested_aliases(levels: int, first: str, following: str) -> str:
    """Each level repeats the one before, as often as `following` has %s."""
    times = following.count("%s")
    lines = [f"a0: &a0 {first}"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} " + following % ((f"*a{level - 1}",) * times))
    return "\n".join(lines)


TEN_TIMES = ", ".join(["%s"] * 10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Written out, these are 10^7 and 10^30 words, 10^9 pairs, and text of 10^8 characters.
        (nested_aliases(7, f"[{'x, ' * 10}]", f"[{TEN_TIMES}]"), "too large; write out"),
        (nested_aliases(30, f"[{'x, ' * 10}]", f"[{TEN_TIMES}]"), "too large; write out"),
        (nested_aliases(9, "{x: 1}", f"{{<<: [{TEN_TIMES}]}}"), "too large; write out"),
        (f"a: &a {'x' * 10_000}\nb: [{'*a, ' * 10_000}]", "too large; write out"),
        (nested_aliases(60, "[x]", "[%s]"), "nested too deeply by its alias"),
    ],
)
def test_aliases_are_bounded_before_anything_is_built(
    text: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yaml_text._Loader, "construct_document", None)
    data, (fault,) = yaml_text.parse(text)
    assert data is None and expected in fault and fault.startswith("line ")


def test_aliases_of_a_usual_size_are_copies() -> None:
    data, faults = yaml_text.parse("a: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, y: 3}")
    assert not faults and data == {
        "a": {"x": [1, 2]},
        "b": {"x": [1, 2]},
        "c": {"x": [1, 2], "y": 3},
    }
    data["a"]["x"].append(3)
    assert data["b"] == {"x": [1, 2]}


def test_what_has_no_end_is_no_run_file() -> None:
    with pytest.raises(ConfigError, match="/dev/zero.*1 problem.*\n.*more than 256 KiB"):
        load_run_file("/dev/zero")


PATHS = [
    "model.checkpoint",
    "model.vision_tower",
    "data.train",
    "data.val",
    "output_dir",
    "parallel.deepspeed",
]


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("text", ["", "  ", "a\0b"])
def test_a_path_is_not_empty(key: str, text: str) -> None:
    section, _, last = key.rpartition(".")
    data = {**SMALLEST, "data": {"task": "digits"}}
    data |= {section: {**data.get(section, {}), last: text}} if section else {last: text}
    assert f"{key}: got {json.dumps(text)}; give a path" in problems(data)


def test_conflicts_are_told_beside_several_wrong_entries_of_one_list() -> None:
    optim = {"betas": ["x", "y"], "warmup_ratio": 0.1, "warmup_steps": 3}
    assert problems(SMALLEST | {"optim": optim}) == [
        'optim.betas.0: got "x"; give a number',
        'optim.betas.1: got "y"; give a number',
        "optim: give 'warmup_ratio' or 'warmup_steps', not both",
    ]


def test_an_empty_section_takes_its_defaults() -> None:
    data = SMALLEST | {"components": None, "optim": None, "data": None}
    assert parse_run(data) == parse_run(SMALLEST)


def test_a_union_reports_the_branch_that_was_meant() -> None:
    block = {"mode": "peft", "method": "lora"}
    for sublayers, problem in (
        ({"attn": "q"}, 'components.llm.sublayers.attn: got "q"; give a list'),
        ([1], "components.llm.sublayers.0: got 1; give text, as in '1' with its quotes"),
        (3, "components.llm.sublayers: got 3; give a list or a mapping of keys to values"),
    ):
        data = SMALLEST | {"components": {"llm": block | {"sublayers": sublayers}}}
        assert problems(data) == [problem]
    assert problems(SMALLEST, "seed=99999999999") == [
        "seed: got 99999999999; give a number below 2,147,483,648"
    ]


def test_keys_are_text_and_merges_work() -> None:
    text = "base: &base {r: 1}\n1: {<<: *base, true: x}\n"
    assert yaml_text.parse(text) == ({"base": {"r": 1}, "1": {"r": 1, "true": "x"}}, [])


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mmtrain init"):
        load_run_file(tmp_path / "none.yaml")


def test_overrides_reach_everything_and_leave_the_data_alone() -> None:
    data = SMALLEST | {"components": {"llm": {"mode": "freeze"}}}
    overrides = (
        "optim.lr=2e-4",
        "optim.betas=[0.9, 0.95]",
        "components.llm={mode: peft, method: lora, r: 4}",
        "components.connector.mode=full",
        "model.preset=null",
        "model.checkpoint=/data/a=b",
    )
    config = parse_run(data, overrides)
    assert (config.optim.lr, config.optim.betas) == (2e-4, (0.9, 0.95))
    assert config.components["llm"].method_options == {"r": 4}
    assert config.components["connector"].mode == "full"
    assert (config.model.preset, config.model.checkpoint) == (None, "/data/a=b")
    assert data == SMALLEST | {"components": {"llm": {"mode": "freeze"}}}


def full_run() -> RunConfig:
    tags = {
        "a": "1e5",
        "b": "no",
        "c": "007",
        "d": "",
        "e": "null",
        "f": "=",
        "g": "x: y\nz",
        "h": "é",
    }
    components = {
        "llm": {
            "mode": "peft",
            "method": "lora",
            "sublayers": {"attn": ["q"]},
            "layers": [0, 3],
            "r": 4,
            "flag": False,
            "rate": 1e-7,
        }
    }
    data = SMALLEST | {
        "components": components,
        "data": {"task": "digits", "train": "relative/path"},
        "tracking": {"tags": tags},
        "validate": {"every": 3},
        "seed": 0,
    }
    return parse_run(data, ["optim.lr=2e-4"])


def test_the_dump_reads_back_equal(tmp_path: Path) -> None:
    config = full_run()
    file = tmp_path / "run.yaml"
    file.write_text(dump_run(config), encoding="utf-8")
    again = load_run_file(file)
    assert again == config
    assert dump_run(again) == dump_run(config)
    # Readers of YAML 1.1 may take some numbers for text, but never text for something else.
    assert yaml.safe_load(dump_run(config))["tracking"]["tags"] == config.tracking.tags
    assert again.data is not None and again.data.train == "relative/path"


def test_difference_names_the_keys() -> None:
    config = full_run()
    assert difference(config, full_run()) == []
    other = parse_run(
        config.model_dump(by_alias=True),
        ["optim.lr=1e-4", "components.llm.r=8", "validate.every=4", "components.vision.mode=full"],
    )
    changed = difference(config, other)
    assert {"optim.lr", "components.llm.r", "validate.every"} <= set(changed)
    assert all(
        key.startswith("components.vision.")
        for key in set(changed) - {"optim.lr", "components.llm.r", "validate.every"}
    )
    assert flatten_run(other)["components.vision.mode"] == "full"
