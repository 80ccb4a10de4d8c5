"""Where the time of one optimizer step goes: a profile, added up by kind of work."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mmtrain.training.step import StepResult

SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
# The first that fits an operator's name; only dropout's masks are made of integer operations,
# or are a kernel of ours within a function of ours.
KINDS = {
    "attention": r"aten::.*(attention|softmax).*",
    "matrix products": r"aten::(mm|addmm|bmm|baddbmm|linear|matmul|mv|dot|conv\w*|.*convolution.*)",
    "dropout": r"(?i:.*(drop|keyed).*)"
    r"|aten::(bitwise_\w+|__i?(rshift|xor|and)__|masked_fill_|where|lt|ge_?)",
    "norms": r"aten::(pow|mean|rsqrt|native_layer_norm\w*|.*norm.*)",
    "optimizer": r"(aten::_foreach_\w+|aten::_fused_adam\w*|Optimizer\..*)",
}
LARGEST = 10


@dataclass(frozen=True)
class Profiled:
    """A step that ran under the profiler."""

    result: StepResult
    profile: Any
    wall_s: float


def profiled(step: Callable[[], StepResult]) -> Profiled:
    """Run a step under the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        began_s = time.perf_counter()
        result = step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall_s = time.perf_counter() - began_s
    return Profiled(result, profile, wall_s)


def kind_of(name: str, shapes: Any, rank: int) -> str:
    """What kind of work an operator does; products with a rank-wide side are the adapter's."""
    for kind, pattern in KINDS.items():
        if re.fullmatch(pattern, name):
            sides = [side for shape in shapes or () if isinstance(shape, list) for side in shape]
            is_adapter = kind == "matrix products" and rank in sides
            return "adapter products" if is_adapter else kind
    return "elementwise and copies"


def summarise(step: Profiled, adapter_rank: int) -> dict[str, Any]:
    """Shares of the wall time per kind, the largest kernels, counts of kernels and waits."""
    on_card = torch.cuda.is_available()
    own = "self_device_time_total" if on_card else "self_cpu_time_total"
    seconds: dict[str, float] = defaultdict(float)
    for event in step.profile.key_averages(group_by_input_shape=True):
        if event.device_type == torch.autograd.DeviceType.CPU:
            kind = kind_of(event.key, event.input_shapes, adapter_rank)
            seconds[kind] += getattr(event, own) * 1e-6
    kernels, waits = [], 0
    for event in step.profile.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            kernels.append((event.self_device_time_total * 1e-6, event.count, event.key))
        elif event.key in SYNCS:
            waits += event.count
    kernels.sort(reverse=True)
    busy_s = sum(seconds.values())
    shares = {kind: spent / step.wall_s for kind, spent in sorted(seconds.items(), key=_by_time)}
    return {
        "wall_s": step.wall_s,
        "shares": {**shares, "idle": max(0.0, 1.0 - busy_s / step.wall_s)},
        "kernels": sum(count for _, count, _ in kernels),
        "waits": waits,
        "largest": [
            {"seconds": spent, "count": count, "name": name[:100]}
            for spent, count, name in kernels[:LARGEST]
        ],
        "attention_kernels": sorted(
            {name[:100] for _, _, name in kernels if re.search(r"flash|fmha|attention", name)}
        ),
    }


def _by_time(item: tuple[str, float]) -> float:
    return -item[1]
