"""One rank that loads a base under ZeRO-3 and says how much host memory that took at its peak.

`python -m tests.distributed.zero3_memory CHECKPOINT how`; `how` is `stream`, as mmtrain loads, or
`everyone`, where every rank reads the whole file first, as transformers' own loader does.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from mmtrain import distributed
from mmtrain.models import building, weights
from mmtrain.models.families.llava import FAMILY
from mmtrain.models.families.llava.layouts import rename
from mmtrain.models.interface import ModelOptions
from mmtrain.training.engine import complete_config


class PeakMemory:
    """The largest resident memory of its own while it runs, sampled; mapped files count too."""

    def __init__(self) -> None:
        self.baseline = self.peak = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, resident_bytes())
            time.sleep(0.002)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def resident_bytes() -> int:
    """VmRSS of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def load(folder: Path, how: str, zero3: dict) -> torch.nn.Module:
    """The model alone: tokenizer and processor play no part here."""
    options = ModelOptions(str(folder), None, dtype="bf16")
    config = FAMILY.code.model_config(options)
    model = building.build_empty(FAMILY.code.skeleton, config, options, zero3)
    everything = {}
    if how == "everyone":
        from safetensors.torch import load_file

        stored = load_file(folder / "model.safetensors")
        everything = {name: tensor.clone() for name, tensor in stored.items()}
    weights.load_weights(model, [(folder, rename)], options)
    del everything
    return model


def main(folder: Path, how: str) -> None:
    """Load and print one JSON line per rank."""
    for name in ("deepspeed", "transformers.models.llava.modeling_llava"):
        importlib.import_module(name)  # belongs to the baseline
    world = distributed.initialise()
    settings = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    zero3 = complete_config(settings, "bf16", 1, 1, world.size, 0.0)
    dist.barrier()
    with PeakMemory() as memory:
        model = load(folder, how, zero3)
        dist.barrier()
    shard = sum(parameter.ds_tensor.numel() * 2 for parameter in model.parameters())
    checks = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("layers.1.mlp.up_proj.weight", "lm_head.weight")):
            with distributed.gathered([parameter]):
                checks[name] = float(parameter.float().sum())
    grown = {"rank": world.rank, "grown": memory.peak - memory.baseline, "shard": shard}
    print("MEMORY " + json.dumps({**grown, "checks": checks}), flush=True)
    distributed.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
