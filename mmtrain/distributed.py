"""The only user of torch.distributed and of DeepSpeed's parameter-sharding interfaces.

One rank without a launcher is a process group of one: the same code runs everywhere.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from mmtrain import network, ranks
from mmtrain.errors import ConfigError, LaunchError

_joined = False
_Value = TypeVar("_Value")
_TORCHS_LINEAR = torch.nn.functional.linear


@dataclass(frozen=True)
class World:
    """This process's place among the ranks."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and logs."""
        return self.rank == 0


def quieten_libraries() -> None:
    """Keep what libraries say about themselves out of the user's log."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Both: transformers sets its logger's level when it is imported, from this.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)


def initialise(timeout_minutes: float = 30.0) -> World:
    """Join the process group that the launcher named, on this rank's own device."""
    quieten_libraries()
    place = ranks.place_of(os.environ)
    cuda = torch.cuda.is_available()
    index = place.local_rank or 0
    if cuda:
        index = ranks.device_index(place.local_rank, torch.cuda.device_count())
        torch.cuda.set_device(index)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    device = torch.device("cuda", index) if cuda else torch.device("cpu")
    # DeepSpeed reads these even when the group exists, and takes LOCAL_RANK for a device's number.
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.size), LOCAL_RANK=str(index))
    if not dist.is_initialized():
        global _joined
        _initialise_group(place, device, timeout_minutes)
        _joined = True
    return World(dist.get_rank(), dist.get_world_size(), device)


def _initialise_group(place: ranks.Place, device: torch.device, timeout_minutes: float) -> None:
    on_cuda = device.type == "cuda"
    rank, store = place.rank, None
    if place.size == 1 and "MASTER_ADDR" not in os.environ:
        rank, store = 0, dist.HashStore()
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ.setdefault("MASTER_PORT", "29500")
    else:
        ranks.refuse_missing_master(place, os.environ)
        if not on_cuda:
            # Gloo would take whatever address the host name has, often 127.0.0.1.
            master = network.resolve(os.environ["MASTER_ADDR"])
            os.environ.setdefault("GLOO_SOCKET_IFNAME", network.interface_towards(master))
    try:
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
            world_size=place.size,
            rank=rank,
            store=store,
            # NCCL would guess the device from the rank, which is wrong beyond the first host.
            device_id=device if on_cuda else None,
        )
    except (dist.DistNetworkError, dist.DistStoreError, dist.DistBackendError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        fault = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LaunchError(
            f"rank {place.rank} of {place.size} could not join the process group at {address}"
            f" ({fault}).",
            "Check that the master is reachable and that its port is free, or choose another port.",
        ) from error


def was_initialised() -> bool:
    """Whether this process ever joined a group; some of its threads outlive `shut_down`."""
    return _joined


def shut_down() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_main() -> bool:
    """Whether this process is rank 0, or there is only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _group_device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def summed_over_ranks(
    values: Sequence[float] | torch.Tensor, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Sums of a few numbers (counts: int64), left on the device: nobody waits for them."""
    if isinstance(values, torch.Tensor):
        tensor = values.to(_group_device(), dtype)
    else:
        # Filled there: a copy from the host would wait for all that the device has to do.
        filled = [torch.full((), one, dtype=dtype, device=_group_device()) for one in values]
        tensor = torch.stack(filled)
    dist.all_reduce(tensor)
    return tensor


def gather_objects(value: _Value) -> list[_Value]:
    """One JSON-like value from every rank, in rank order, on every rank."""
    gathered = [value] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_main(value: _Value) -> _Value:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_group_device())
    return box[0]


# --- ZeRO-3: building and touching sharded parameters ----------------------------------------


def prepare_deepspeed(config: Mapping[str, object]) -> None:
    """Tell DeepSpeed of the process group; to be called before anything else of it."""
    with _without_mlflow():
        import deepspeed
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig.model_validate(config["zero_optimization"])
    except ValidationError as error:
        raise ConfigError(
            f"parallel.deepspeed: zero_optimization.{'.'.join(map(str, fault['loc']))}:"
            f" {fault['msg']}"
            for fault in error.errors()
        ) from None

    # On a CPU DeepSpeed would compile a C++ operator at the first start, for an inference
    # reduction that training never calls; a rank killed meanwhile leaves a lock others wait for.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Without this it believes in one rank when it checks the batch sizes.
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    # It prints 18 lines about memory at every start, whatever the log level.
    from deepspeed.runtime import bf16_optimizer

    setattr(bf16_optimizer, "see_memory_usage", lambda *_, **__: None)


@contextmanager
def _without_mlflow() -> Iterator[None]:
    """DeepSpeed's autotuner imports MLflow where it can: a fifth of each rank's start, unused."""
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = cast(ModuleType, None)
    try:
        yield
    finally:
        del sys.modules["mlflow"]


@contextmanager
def sharded_construction(deepspeed_config: Mapping[str, object] | None) -> Iterator[None]:
    """Inside, every module's parameters are sharded as soon as they are made (ZeRO-3 only)."""
    if deepspeed_config is None:
        # ZeRO-3 replaces it for good: a later run of this process would round as ZeRO-3 does.
        setattr(torch.nn.functional, "linear", _TORCHS_LINEAR)
        yield
        return
    prepare_deepspeed(deepspeed_config)
    import deepspeed

    # No `dtype` beside the configuration: where the CPU has no fp16 kernels, it means bf16.
    with deepspeed.zero.Init(config_dict_or_path=dict(deepspeed_config)):
        yield


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 holds only a piece of this parameter here."""
    return hasattr(parameter, "ds_id")


def stored_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank keeps of a parameter: the piece that ZeRO-3 left it, else the whole."""
    return getattr(parameter, "ds_tensor", parameter)


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The parameter's shape, sharded or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def gathered(parameters: Iterable[torch.Tensor], writer_rank: int | None = None) -> Iterator[None]:
    """Whole parameters inside; what `writer_rank` changes is kept on every rank."""
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=writer_rank):
        yield


def write_parameter(parameter: torch.Tensor, value: torch.Tensor | None) -> None:
    """Set a parameter before the engine exists. `value` is only needed on rank 0 when sharded."""
    with gathered([parameter], writer_rank=0), torch.no_grad():
        if value is not None and (not is_sharded(parameter) or is_main()):
            parameter.copy_(value)


def spans_ranks(parameter: torch.Tensor) -> bool:
    """Whether a forward needs every rank: a sharded parameter in a group of several."""
    return is_sharded(parameter) and dist.get_world_size() > 1


def restart_trace_at_each_forward(optimizer: object, model: torch.nn.Module) -> None:
    """ZeRO-3 prefetches along a recorded order of modules, restarted at the root's forward.

    Generation calls the inner model, not DeepSpeed's root, so it has to restart it as well.
    """
    offload = getattr(optimizer, "parameter_offload", None)
    if offload is None:
        return

    def restart(*_: object) -> None:
        offload.get_param_coordinator().reset_step()

    model.register_forward_pre_hook(restart)


# --- the optimizer's view of a parameter: fp32 masters and moments, by name ---------------------
# An optimizer here is AdamW at stage 0, else DeepSpeed's wrapper of it, of another class per stage.

MOMENTS = ("exp_avg", "exp_avg_sq")


def _adamw(optimizer: object) -> torch.optim.Optimizer:
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    return getattr(optimizer, "optimizer")


def _optimizer_tensors(optimizer: object) -> list[torch.Tensor]:
    """The fp32 tensors that AdamW itself holds: flat pieces under ZeRO, else the parameters."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(optimizer.fp32_partitioned_groups_flat)
    return [tensor for group in _adamw(optimizer).param_groups for tensor in group["params"]]


def prepare_moments(optimizer: object, step: int) -> None:
    """Allocate AdamW's state as after `step` steps, with zero moments to be filled by name."""
    for tensor in _optimizer_tensors(optimizer):
        _adamw(optimizer).state[tensor] = {
            "step": torch.tensor(float(step), dtype=torch.float32),
            **{moment: torch.zeros_like(tensor) for moment in MOMENTS},
        }
    link_moments(optimizer)


def link_moments(optimizer: object) -> None:
    """Before moments are read. Stages 1-2 link names to them once, too early for several groups."""
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        setattr(optimizer, "_hp_optimizer_states_linked", False)
        optimizer._lazy_init_hp_params_optimizer_state()


def read_state(
    optimizer: object, parameter: torch.nn.Parameter, moment: str | None
) -> torch.Tensor:
    """A whole master weight (moment None) or moment in fp32. Every rank must call."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if moment is None:
        master = safe_get_full_fp32_param(parameter)
        return parameter.detach().float() if master is None else master
    if isinstance(optimizer, torch.optim.Optimizer):
        state = optimizer.state.get(parameter)
        return state[moment] if state else torch.zeros_like(parameter)
    value = safe_get_full_optimizer_state(parameter, moment)
    assert value is not None, "a sharded optimizer gave no state"
    return value


def write_state(
    optimizer: object, parameter: torch.nn.Parameter, moment: str | None, value: torch.Tensor
) -> None:
    """Set a master weight (working weights must already equal its rounding) or a moment."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if isinstance(optimizer, torch.optim.Optimizer):
        target = parameter.data if moment is None else optimizer.state[parameter][moment]
        target.copy_(value)
    elif is_sharded(parameter):
        # The last rank's piece is padded, which DeepSpeed's own setter does not allow for.
        piece = _own_piece(parameter, value)
        if moment is None:
            safe_set_local_fp32_param(parameter, piece)
        else:
            safe_set_local_optimizer_state(parameter, piece, moment)
    elif moment is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)


def _own_piece(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    size: int = getattr(stored_part(parameter), "ds_numel")
    start = size * dist.get_rank()
    piece = torch.zeros(size, dtype=torch.float32, device=value.device)
    own = value.flatten()[start : start + size]
    piece[: own.numel()] = own
    return piece


def broadcast_tensor(
    value: torch.Tensor | None, shape: torch.Size, device: torch.device
) -> torch.Tensor:
    """Rank 0's fp32 tensor, on every rank."""
    tensor = torch.empty(shape, dtype=torch.float32, device=device)
    if is_main():
        assert value is not None
        tensor.copy_(value)
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)
    return tensor


def squared_gradient_norms(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, float]:
    """Squared gradient norms after backward, before the step. Every rank must call."""
    from deepspeed.utils import safe_get_full_grad

    norms = {}
    for name, parameter in parameters.items():
        gradient = safe_get_full_grad(parameter)
        norms[name] = 0.0 if gradient is None else float(gradient.double().square().sum())
    return norms


def own_gradient_norm(optimizer: object) -> torch.Tensor:
    """Norm of what this rank's optimizer is about to use: its own share, where these are sharded.

    On the device: no wait, no message.
    """
    if hasattr(optimizer, "norm_for_param_grads"):  # offloaded, and measured on the way
        pieces = list(optimizer.norm_for_param_grads.values())
    elif hasattr(optimizer, "averaged_gradients"):
        pieces = [piece for group in optimizer.averaged_gradients.values() for piece in group]
    elif hasattr(optimizer, "fp32_groups_gradient_flat_partition"):
        pieces = list(optimizer.fp32_groups_gradient_flat_partition)
    else:
        pieces = [tensor.grad for tensor in _optimizer_tensors(optimizer)]
    return torch.nn.utils.get_total_norm([piece for piece in pieces if piece is not None])
