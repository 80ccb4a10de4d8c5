"""Loading a base under ZeRO-3: only rank 0 reads it, the others stay near their own shard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtrain.models.families.llava import FAMILY
from mmtrain.models.interface import ModelOptions
from mmtrain.training.tensor_file import TensorFileWriter
from tests import tiny

MIB = 2**20
WIDE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12}


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA folder of 1.3 GB in bf16, few and wide layers; no tokenizer is needed to load it."""
    folder = tmp_path_factory.mktemp("wide")
    config = FAMILY.code.model_config(ModelOptions(None, preset="tiny", dtype="bf16"))
    for key, value in {**WIDE, "num_attention_heads": 16, "num_key_value_heads": 16}.items():
        setattr(config.text_config, key, value)
    config.text_config.head_dim = 128
    config.text_config.vocab_size = 16_000
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = FAMILY.code.skeleton(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    writer = TensorFileWriter(folder / "model.safetensors", shapes, torch.bfloat16)
    for number, (name, shape) in enumerate(shapes.items()):
        writer.write(name, torch.full(shape, 2.0 ** -(number % 7), dtype=torch.bfloat16))
    writer.close()
    return folder


def measured(folder: Path, how: str) -> list[dict[str, Any]]:
    """What both ranks report, in rank order."""
    command = ["tests.distributed.zero3_memory", str(folder), how]
    processes = tiny.start_ranks(command, 2)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)[-5000:]
    lines = [line for output in outputs for line in output.splitlines() if "MEMORY " in line]
    return [json.loads(line.split("MEMORY ")[1]) for line in lines]


def within_bounds(rank: dict[str, Any]) -> bool:
    return rank["grown"] < min(rank["shard"] + 300 * MIB, 1024 * MIB)


def test_other_ranks_stay_near_their_shard(wide_checkpoint: Path) -> None:
    size = (wide_checkpoint / "model.safetensors").stat().st_size
    assert size > 1.2e9
    main, other = measured(wide_checkpoint, "stream")
    print(f"grown by {main['grown'] / MIB:.0f} and {other['grown'] / MIB:.0f} MiB")
    assert abs(other["shard"] - size / 2) < 0.01 * size
    assert within_bounds(other), other
    # The right tensors came: every element of one tensor is the same known power of two.
    assert main["checks"] == other["checks"] and all(main["checks"].values())


@pytest.mark.soak
def test_the_bound_tells_when_every_rank_reads(wide_checkpoint: Path) -> None:
    _, other = measured(wide_checkpoint, "everyone")
    assert not within_bounds(other), other
