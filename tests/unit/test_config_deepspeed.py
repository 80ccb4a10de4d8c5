"""The DeepSpeed files say how state is spread; what is learned is the run file's business."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmtrain.config.deepspeed import deepspeed_names, find_deepspeed_config, zero_stage
from mmtrain.distributed import prepare_deepspeed
from mmtrain.errors import ConfigError
from mmtrain.training.engine import complete_config

STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def test_the_package_has_one_file_per_stage() -> None:
    assert set(deepspeed_names()) == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_shipped_files_hold_no_batch_rate_schedule_or_precision(name: str) -> None:
    settings = find_deepspeed_config(name)
    assert zero_stage(settings) == STAGES[name]
    text = json.dumps(settings)
    for word in ("batch_size", "accumulation", '"lr"', 'optimizer": {"type', "scheduler", "auto"):
        assert word not in text
    assert set(settings) <= {
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    }
    # torch.optim.AdamW is not on DeepSpeed's list, and offload would insist on its own.
    assert settings["zero_allow_untested_optimizer"] is True
    assert ("offload" in name) == (settings.get("zero_force_ds_cpu_optimizer") is False)


def test_a_file_that_decides_too_much_is_refused_with_reasons(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(
        json.dumps(
            {
                "train_batch_size": 8,
                "optimizer": {"type": "AdamW"},
                "scheduler": {"type": "WarmupLR"},
                "bf16": {"enabled": "auto"},
                "zero_optimization": {"stage": 4, "reduce_bucket_size": "auto"},
            }
        )
    )
    with pytest.raises(ConfigError) as caught:
        find_deepspeed_config(str(file))
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 6
    for expected in (
        "'train_batch_size' does not belong here, the run file's optim.global_batch decides it",
        "'scheduler' does not belong here, the run file's optim.schedule decides it",
        "'zero_optimization.reduce_bucket_size' is 'auto'",
        "stage is 4; give 0, 1, 2 or 3",
    ):
        assert expected in told


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    assert zero_stage(find_deepspeed_config(str(file))) == 2
    file.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        find_deepspeed_config(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        find_deepspeed_config(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="did you mean 'zero1'"):
        find_deepspeed_config("zro1")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("data_types", {"grad_accum_dtype": "bf16"}, "gradients are always summed in fp32"),
        ("communication_data_type", "bf16", "gradients always travel in fp32"),
        ("bfloat16", {"enabled": True}, "the run file's model.dtype decides it"),
        ("gradient_accumulation_steps", 4, "optim.global_batch and optim.micro_batch"),
        ("steps_per_print", 10, "progress is logged by mmtrain"),
        ("zero_allow_untested_optimizer", False, "must be true"),
        ("zero_optimisation", {"stage": 3}, "did you mean 'zero_optimization'?"),
        ("prescale_gradients", True, "valid: aio, zero_allow_untested_optimizer"),
    ],
)
def test_what_would_be_overridden_or_ignored_is_refused(
    tmp_path: Path, key: str, value: object, told: str
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: value}))
    with pytest.raises(ConfigError) as caught:
        find_deepspeed_config(str(file))
    [problem] = caught.value.problems
    assert f"'{key}'" in problem and told in problem


def test_nothing_of_an_accepted_file_is_overridden_but_bf16s_stage(tmp_path: Path) -> None:
    given = {
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "aio": {"block_size": 1048576},
    }
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(given))
    completed = complete_config(find_deepspeed_config(str(file)), "bf16", 2, 3, 4, 1.0)
    assert {key: completed[key] for key in given} == given


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x80\x02binary\xff", "is no text, so no JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"aio": {"a": 1, "a": 2}}', "'a' stands there twice"),
        (b'{"aio": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b" " * 2**21, "is larger than 1 MiB"),
        (b"[]", "must be a JSON object"),
        (b'{"zero_optimization": {"stage": true}}', "stage is True; give 0, 1, 2 or 3"),
    ],
)
def test_what_is_no_deepspeed_file_is_told_in_one_line(
    tmp_path: Path, content: bytes, told: str
) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        find_deepspeed_config(str(file))
    assert any(told in problem for problem in caught.value.problems)
    assert all("\n" not in problem and len(problem) < 500 for problem in caught.value.problems)


def test_offload_without_deepspeeds_own_optimizer_is_refused_with_the_key(tmp_path: Path) -> None:
    settings = find_deepspeed_config("zero3_offload")
    del settings["zero_force_ds_cpu_optimizer"]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match='needs "zero_force_ds_cpu_optimizer": false'):
        find_deepspeed_config(str(file))


def test_settings_that_deepspeed_does_not_know_are_named() -> None:
    zero = {"stage": 2, "reduce_bucket_sise": 1, "reduce_bucket_size": -1}
    with pytest.raises(ConfigError) as caught:
        prepare_deepspeed({"zero_optimization": zero})
    told = "\n".join(caught.value.problems)
    assert "zero_optimization.reduce_bucket_sise: Extra inputs are not permitted" in told
    assert "zero_optimization.reduce_bucket_size: Input should be greater than 0" in told


def test_paths_that_are_no_files_are_told_in_one_line(tmp_path: Path) -> None:
    for path, told in (
        (str(tmp_path) + "/", "is no regular file"),
        ("/dev/null", "is no regular file"),
        ("a\0b.json", "holds a NUL character"),
    ):
        with pytest.raises(ConfigError, match=told):
            find_deepspeed_config(path)
