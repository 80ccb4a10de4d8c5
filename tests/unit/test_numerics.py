"""`deterministic: true` holds, fp32 stays fp32, and what torch cannot repeat is said in words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmtrain.distributed import World
from mmtrain.errors import LaunchError, TrainingError
from mmtrain.models.built import Asked
from mmtrain.models.interface import Batch
from mmtrain.resolve import resolve
from mmtrain.training.engine import Engine
from mmtrain.training.numerics import pin_numerics

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's switches and the environment as before."""
    threads = torch.get_num_threads()
    monkeypatch.setenv(WORKSPACE, ":4096:8")
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "0")
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def pin(deterministic: bool = True, threads: int = 1) -> None:
    """As at the start of a run."""
    model = {"family": "llava", "preset": "tiny"}
    parallel = {"threads": threads}
    pin_numerics(resolve({"model": model, "deterministic": deterministic, "parallel": parallel}))


def test_deterministic_is_no_mere_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE)
    pin(threads=2)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ.pop(WORKSPACE) == ":4096:8"
    assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"
    assert torch.get_num_threads() == 2


def test_a_later_run_may_turn_it_off() -> None:
    pin()
    pin(deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_workspace_that_undoes_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(LaunchError, match="CUBLAS_WORKSPACE_CONFIG=:0:0 makes cuBLAS differ"):
        pin()
    pin(deterministic=False)


def test_fp32_is_not_rounded_to_tf32() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    pin(deterministic=False)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


class Unrepeatable:
    """A family that computes what torch cannot repeat."""

    row_keys: dict[str, Any] = {}

    @property
    def code(self) -> Any:
        return self

    def image_features(self, *_: Any) -> Any:
        """`put_` has no deterministic version on any device."""
        return torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))

    def decoder(self, model: Any) -> Any:
        return model

    def collate(self, *_: Any, **__: Any) -> Batch:
        return Batch({}, [], 0, 0)


def test_what_torch_cannot_repeat_is_named_with_the_remedy() -> None:
    pin()
    world = World(0, 1, torch.device("cpu"))
    settings = {"zero_optimization": {"stage": 0}}
    assembled: Any = SimpleNamespace(
        family=Unrepeatable(), model=torch.nn.Linear(1, 1), processor=None
    )
    engine = Engine(assembled, world, settings, Asked("fp32", "sdpa"), None)
    for compute in (lambda: engine.forward(Batch({}, [], 0, 0)), lambda: engine.generate([], None)):
        with pytest.raises(TrainingError, match="torch computes put_ differently") as caught:
            compute()
        assert "deterministic: false" in caught.value.remedy
    with pytest.raises(TrainingError, match="model.dtype bf16 was asked for"):
        Engine(assembled, world, settings, Asked("bf16", "sdpa"), None)
