"""The decoder's frozen linears in four or eight bits, by bitsandbytes.

They stay linears under the names they had: methods are placed on them as on any other. A weight is
quantised when it is set, one at a time, so that no rank ever holds the whole base unquantised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from mmtrain.distributed import full_shape, write_parameter
from mmtrain.errors import ConfigError

# Per weight. nf4: half a byte, with a byte of scale for 64 of them and a float for 256 scales.
BYTES = {"nf4": 0.5 + (1 + 4 / 256) / 64, "int8": 1.0}
# LLM.int8 multiplies channels of the input with larger values in 16 bits.
_INT8_THRESHOLD = 6.0
_TAKE = "quantise"  # what sets a parameter that is not there yet


def quantised_linears(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Linear]:
    """The linears that the patterns name, also where an adapter wraps them."""
    found = {}
    for name, module in model.named_modules():
        plain = name.removesuffix(".base_layer")
        if isinstance(module, nn.Linear) and any(re.fullmatch(one, plain) for one in patterns):
            found[name] = module
    return found


def make_room(
    model: nn.Module, how: str, patterns: Sequence[str], device: torch.device | None
) -> None:
    """Give a model on the meta device its place; of what is to be quantised, an empty one."""
    for name, linear in quantised_linears(model, patterns).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, _empty(linear, how, device))
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and not hasattr(parameter, _TAKE):
                empty = partial(torch.empty_like, parameter, device=device or "cpu")
                module._parameters[leaf] = made.setdefault(id(parameter), nn.Parameter(empty()))
        for leaf, buffer in module._buffers.items():
            if buffer is not None and device is not None:
                module._buffers[leaf] = buffer.to(device)


def set_parameter(parameter: torch.Tensor, value: torch.Tensor | None) -> None:
    """As `write_parameter`; in fewer bits where these were asked for."""
    take = getattr(parameter, _TAKE, None)
    if take is None:
        write_parameter(parameter, value)
    else:
        take(value)


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape that a weight has unquantised and unsharded."""
    state = getattr(parameter, "quant_state", None)
    return full_shape(parameter) if state is None else state.shape


def unlike_asked(model: nn.Module, how: str | None, patterns: Sequence[str]) -> Mapping[str, str]:
    """Linears that are not in the bits that were asked for: name -> type of the weight."""
    wanted = {"nf4": torch.uint8, "int8": torch.int8}
    return {
        name: str(linear.weight.dtype)
        for name, linear in quantised_linears(model, patterns).items()
        if how is not None and linear.weight.dtype != wanted[how]
    }


def settings_code(model: nn.Module, how: str, patterns: Sequence[str], dtype: str) -> str:
    """How transformers quantises the same linears, in Python."""
    skipped = ", ".join(map(repr, _others(model, patterns)))
    if how == "int8":
        return f"BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[{skipped}])"
    return (
        "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4',"
        f" bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype={dtype},"
        f" llm_int8_skip_modules=[{skipped}])"
    )


def _others(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The highest modules with linears of which none is quantised."""
    quantised = {one.removesuffix(".base_layer") for one in quantised_linears(model, patterns)}
    found: list[str] = []
    for name, module in model.named_modules():
        inside = f"{name}." if name else ""
        if any(one == name or one.startswith(inside) for one in quantised):
            continue
        if any(name.startswith(f"{one}.") for one in (*found, *quantised)):
            continue
        if any(isinstance(part, nn.Linear) for part in module.modules()):
            found.append(name)
    return found


def _library() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        remedy = "pip install 'mmtrain[quantization]'"
        raise ConfigError(
            [f"model.quantization: needs bitsandbytes ({error}); {remedy}"]
        ) from error
    return bitsandbytes.nn


def _empty(linear: nn.Linear, how: str, device: torch.device | None) -> nn.Module:
    """A quantised linear without a weight."""
    library = _library()
    shape, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
    with torch.device("meta"):
        made: Any
        if how == "nf4":
            made = library.Linear4bit(
                *shape, bias=has_bias, compute_dtype=linear.weight.dtype, quant_type="nf4"
            )
            # On CPUs with AVX512_BF16 it would repack weights for good in the first forward
            # without gradients, in a form that rounds to bf16 and fits blocks of 64 alone.
            made.support_avx512bf16_for_cpu = False
        else:
            made = library.Linear8bitLt(
                *shape, bias=has_bias, has_fp16_weights=False, threshold=_INT8_THRESHOLD
            )
    made.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
    setattr(made.weight, _TAKE, partial(_quantise, made, how, device or torch.device("cpu")))
    return made


def _quantise(linear: Any, how: str, device: torch.device, value: torch.Tensor | None) -> None:
    """Set the weight; from the working precision, as every other weight is."""
    assert value is not None, "quantised weights are not sharded"
    # From the host: bitsandbytes rounds to eight bits on the way to a card, and there alone.
    library, weight = _library(), value.to("cpu", linear.weight.dtype)
    if how == "nf4":
        made = library.Params4bit(
            weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=linear
        )
    else:
        made = library.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    linear.weight = made.to(device)
