"""The DeepSpeed files say how state is spread; what is learned is the run file's business."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmtrain.config.deepspeed import deepspeed_names, find_deepspeed_config, zero_stage
from mmtrain.errors import ConfigError

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
