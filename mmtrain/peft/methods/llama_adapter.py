"""LLaMA-Adapter: learned tokens that attentions also look at, behind a gate that starts at zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mmtrain.errors import ConfigError, MmtrainError
from mmtrain.peft import injection
from mmtrain.peft.interface import Added, Surroundings, Target

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LlamaAdapterOptions(BaseModel):
    """Options of a component block with `method: llama_adapter`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int = Field(10, ge=1, description="learned tokens of each layer")


class LlamaAdapter:
    """The method plug-in."""

    options = LlamaAdapterOptions
    needs_linears = False
    merges = False
    imports = None

    def conflicts(self, options: object, around: Surroundings) -> Sequence[str]:
        """It goes into the attentions of a language model."""
        if around.component != "llm":
            return ("method: 'llama_adapter' goes into a language model's attentions; use llm",)
        return ()

    def attach(self, target: Target, options: Any, seed: int) -> Added:
        """Tokens N(0, 1) as in peft and the original; gates at zero."""
        from torch import nn

        from mmtrain.peft.gated_prompts import GatedPrompts, look_at

        assert target.attention is not None
        dtype = next(target.model.parameters()).dtype
        names: list[str] = []
        for block_name in (name for blocks in target.blocks.values() for name in blocks):
            attention: Any = getattr(target.model.get_submodule(block_name), "self_attn", None)
            if not all(hasattr(attention, linear) for linear in _LINEARS):
                raise ConfigError([_refusal(target)])
            prompts = GatedPrompts(options.tokens, target.attention.hidden).to(dtype)
            name = f"{block_name}.self_attn.llama_adapter"
            injection.fill(prompts.prompts, nn.init.normal_, "llama_adapter", seed, name)
            attention.add_module("llama_adapter", prompts)
            look_at(attention, prompts)
            names += [f"{name}.prompts", f"{name}.gate"]
        return Added(tuple(names))

    def export_config(self, target: Target, options: Any, base: str) -> dict[str, object]:
        """Read by mmtrain alone: peft's own refuses models that see."""
        return {
            "peft_type": "LLAMA_ADAPTER",
            "base_model_name_or_path": base,
            "tokens": options.tokens,
            "layers": sorted(target.blocks),
        }

    def export_name(self, name: str, target: Target) -> str:
        """The name in the model."""
        return name

    def merge(self, target: Target) -> None:
        """Not defined."""
        raise MmtrainError(
            "LLaMA-Adapter's tokens cannot be folded into matrices: a softmax of their own weighs"
            " them.",
            "Use the adapter folder of the run.",
        )


def _refusal(target: Target) -> str:
    return (
        f"components.{target.block_name}.method: 'llama_adapter' needs attentions of separate"
        f" {', '.join(_LINEARS)} that are told their rotation; this model's are others: use prefix,"
        " or lora"
    )


METHOD = LlamaAdapter()
