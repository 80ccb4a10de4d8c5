"""Prefix tuning: learned keys and values before every layer's own, in decoder-only language models.

A hook on the stack of layers puts them into its cache, so training, ranking and generation see
them alike: real tokens follow behind the prefix, as in the peft library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from mmtrain.errors import ConfigError, MmtrainError
from mmtrain.peft import injection
from mmtrain.peft.interface import Added, Computed, Surroundings, Target

if TYPE_CHECKING:
    import torch


class PrefixOptions(BaseModel):
    """Options of a component block with `method: prefix`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int = Field(20, ge=1, description="length of the prefix")
    projection: bool = Field(
        False, description="train two linears that make it; only what they make is exported"
    )


class Prefix:
    """The method plug-in."""

    options = PrefixOptions
    needs_linears = False
    merges = False
    imports = ()

    def conflicts(self, options: object, around: Surroundings) -> Sequence[str]:
        """It is a cache, which activation checkpointing throws away."""
        reasons = []
        if around.component != "llm":
            reasons.append("method: 'prefix' goes before the tokens of a language model; use llm")
        if around.recomputes:
            reasons.append(
                "method: 'prefix' is lost where activations are recomputed;"
                " set parallel.activation_checkpointing: false"
            )
        return reasons

    def attach(self, target: Target, options: Any, seed: int) -> Added:
        """One table for all layers, N(0, 1) as in peft; layers are all or none."""
        from mmtrain.peft.prefix_cache import PrefixTable, projected, put_before

        place, shape = f"components.{target.block_name}.method", target.attention
        if any(len(blocks) > 1 for blocks in target.blocks.values()):
            raise ConfigError(
                [f"{place}: 'prefix' needs a decoder alone, this model has an encoder"]
            )
        assert shape is not None
        if len(target.blocks) != shape.layers:
            raise ConfigError([f"{place}: 'prefix' goes before all layers; leave out 'layers'"])
        model: Any = target.model
        context = model.config.get_text_config().max_position_embeddings
        if options.tokens >= context:
            fault = f"got {options.tokens}, which leaves none of this model's {context} positions"
            raise ConfigError([f"components.{target.block_name}.tokens: {fault}; give fewer"])
        table = PrefixTable(
            options.tokens, shape.layers, shape.kv_heads, shape.head_dim, options.projection
        )
        for name, parameter in table.named_parameters():
            key = () if name == "weight" else (name,)
            injection.fill(parameter, _draw(name), "prefix", seed, target.adapter, *key)
        table.to(next(target.model.parameters()).dtype)
        module_name = f"prefix_{target.adapter}"
        target.model.add_module(module_name, table)
        put_before(target.model.get_submodule(_stack_name(target)), table, options.tokens)
        names = tuple(f"{module_name}.{name}" for name, _ in table.named_parameters())
        computed = {}
        if options.projection:
            whole = (options.tokens, 2 * shape.layers * shape.kv_heads * shape.head_dim)
            computed["prompt_embeddings"] = Computed(names, whole, projected)
        return Added(names, starts_at_identity=False, computed=computed)

    def export_config(self, target: Target, options: Any, base: str) -> dict[str, object]:
        """adapter_config.json as peft reads it for a language model alone."""
        assert target.attention is not None
        return {
            "peft_type": "PREFIX_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "num_virtual_tokens": options.tokens,
            "token_dim": target.attention.kv_heads * target.attention.head_dim,
            "num_attention_heads": target.attention.kv_heads,
            "num_layers": target.attention.layers,
            "num_transformer_submodules": 1,
            "prefix_projection": False,
            "inference_mode": True,
        }

    def export_name(self, name: str, target: Target) -> str:
        """peft's key."""
        return "prompt_embeddings"

    def merge(self, target: Target) -> None:
        """Not defined."""
        raise MmtrainError(
            "a prefix cannot be folded into a matrix: it is keys and values beside the tokens'.",
            "Use the adapter folder of the run.",
        )


def _draw(name: str) -> Callable[[torch.Tensor], object]:
    """The table is drawn as in peft, linears as torch draws them, but for their biases."""
    from torch import nn

    if name.endswith("bias"):
        return nn.init.zeros_
    return nn.init.normal_ if name == "weight" else partial(nn.init.kaiming_uniform_, a=5**0.5)


def _stack_name(target: Target) -> str:
    """What runs the blocks one after another: the owner of their list."""
    first, *_ = target.blocks[min(target.blocks)]
    return first.rpartition(".")[0].rpartition(".")[0]


METHOD = Prefix()
