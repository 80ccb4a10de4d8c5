"""Learned tokens: LLaMA-Adapter in attentions, MaPLe beside a Q-Former's queries and words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import AdaptionPromptConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from mmtrain.assemble import Assembled, build_model
from mmtrain.config.schema import RunConfig
from mmtrain.errors import ConfigError
from mmtrain.models import decoding
from mmtrain.models.interface import BatchSize
from mmtrain.peft.gated_prompts import GatedPrompts, look_at
from mmtrain.planning.census import adapted
from mmtrain.planning.report import examine
from mmtrain.resolve import resolve

SIZE = BatchSize(samples=2, tokens=40, answer_tokens=4)
TOKENS, DEPTH = 3, 1


def run_of(family: str, preset: str, **components: dict[str, Any]) -> RunConfig:
    blocks = {name: {"mode": "peft", **block} for name, block in components.items()}
    model = {"family": family, "preset": preset, "dtype": "fp32"}
    optim = {"global_batch": SIZE.samples, "micro_batch": SIZE.samples}
    return resolve({"model": model, "components": blocks, "optim": optim})


@pytest.mark.parametrize(("kv_heads", "tokens"), [(4, 5), (2, 1)])
def test_llama_adapter_equals_pefts_own(kv_heads: int, tokens: int) -> None:
    """Where peft can: in a language model alone; its forward knows no groups of heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
    )
    ids = torch.randint(0, 60, (2, 7))
    model = LlamaForCausalLM(config).eval()
    base = model(ids).logits
    tables, gates = torch.randn(2, tokens, 32), torch.tensor([[0.7], [-1.3]])
    handles = []
    for layer, table, gate in zip(model.model.layers, tables, gates, strict=True):
        prompts = GatedPrompts(tokens, 32)
        prompts.prompts.data, prompts.gate.data = table, gate
        handles.append(prompts)
        look_at(layer.self_attn, prompts)
    found = model(ids).logits
    assert not torch.allclose(found, base, atol=1e-3)
    for layer in model.model.layers:
        layer.self_attn._forward_hooks.clear()
        layer.self_attn._forward_hooks_with_kwargs.clear()
    assert torch.equal(model(ids).logits, base)
    adapted = get_peft_model(
        model, AdaptionPromptConfig(adapter_len=tokens, adapter_layers=2, task_type="CAUSAL_LM")
    )
    for layer, table, gate in zip(model.model.layers, tables, gates, strict=True):
        layer.self_attn.adaption_prompt.data = table.unsqueeze(0)
        layer.self_attn.adaption_gate.data = gate
    torch.testing.assert_close(found, adapted(ids).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "preset", "components", "wanted"),
    [
        ("llava", "llava-1.5-7b", {"llm": {"method": "llama_adapter"}}, 32 * (10 * 4096 + 1)),
        (
            "instructblip",
            "instructblip-flan-t5-xl",
            {"qformer": {"method": "maple"}},
            9 * (768 * 768 + 768) + 9 * 2 * 768,
        ),
    ],
)
def test_what_trains(family: str, preset: str, components: dict[str, Any], wanted: int) -> None:
    found = adapted(run_of(family, preset, **components)).components
    assert sum(part.trainable_params for part in found.values()) == wanted


def maple(**options: Any) -> Assembled:
    block = {"method": "maple", "tokens": TOKENS, "depth": DEPTH, **options}
    assembled = build_model(run_of("instructblip", "tiny", qformer=block), None)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in assembled.trained_parameters().values():
            parameter.copy_(torch.randn(parameter.shape))
    return assembled


@pytest.mark.parametrize("depth", [1, 2])
def test_maple_equals_a_plain_walk_through_the_layers(depth: int) -> None:
    """Of words padded on the right, which nobody sees."""
    assembled = maple(depth=depth)
    model: Any = assembled.model
    qformer = model.qformer
    torch.manual_seed(2)
    width = qformer.config.hidden_size
    queries, pictures = torch.randn(2, 4, width), torch.randn(
        2, 9, qformer.config.encoder_hidden_size
    )
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    mask = torch.tensor([[1] * 7, [1] * 6 + [0]])
    with torch.no_grad():
        found = qformer(
            input_ids=ids, attention_mask=mask, query_embeds=queries, encoder_hidden_states=pictures
        ).last_hidden_state
        wanted = walked(model, queries, ids, mask, pictures, depth)
    torch.testing.assert_close(found[:, :6], wanted[:, :6])
    torch.testing.assert_close(found[0], wanted[0])


def walked(
    model: Any,
    queries: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    pictures: torch.Tensor,
    depth: int,
) -> torch.Tensor:
    """Hooks off: prompts put in and taken out by hand."""
    table = model.maple_qformer
    hidden = model.qformer.embeddings(input_ids=ids, query_embeds=queries)
    ones = torch.ones(2, TOKENS)
    seen = torch.cat([ones, mask, ones], 1)[:, None, None].bool()
    seen = seen.expand(-1, -1, seen.shape[-1], -1)
    for number, layer in enumerate(model.qformer.encoder.layer):
        if number < depth:
            words = table.prompts[number]
            asked = table.couplings[number](words)
            inner = hidden if number == 0 else hidden[:, TOKENS:-TOKENS]
            hidden = torch.cat([asked.expand(2, -1, -1), inner, words.expand(2, -1, -1)], 1)
        hidden = type(layer).forward(
            layer, hidden, seen, pictures, query_length=queries.shape[1] + TOKENS
        )
    return hidden[:, TOKENS:-TOKENS]


def test_maple_reaches_the_answer() -> None:
    assembled = maple()
    batch = assembled.family.code.planned_batch(assembled.model.config, SIZE)
    decoding.forward(assembled.family, assembled.model, batch).answer_loss_sum.backward()
    for name, parameter in assembled.trained_parameters().items():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


@pytest.mark.parametrize(
    ("component", "block", "wanted"),
    [
        ("qformer", {"method": "maple", "depth": 9}, "depth: got 9; there are 2 layers"),
        ("qformer", {"method": "maple", "layers": "first-1"}, "'maple' says 'depth' instead"),
        ("qformer", {"method": "llama_adapter"}, "goes into a language model's attentions"),
        ("llm", {"method": "llama_adapter"}, "needs attentions of separate q_proj"),
        ("llm", {"method": "maple"}, "couples words and queries of a Q-Former"),
    ],
)
def test_where_they_cannot_go_they_say_so(
    component: str, block: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        examine(run_of("instructblip", "tiny", **{component: block}), world_size=1)


def test_two_at_one_place_are_refused_and_at_two_are_not() -> None:
    block = {"mode": "peft", "method": "llama_adapter"}
    model = {"family": "llava", "preset": "tiny", "dtype": "fp32"}
    for layers, fits in (("first-2", False), ("first-1", True)):
        blocks = {"llm": block | {"layers": layers}, "llm/b": block | {"layers": "last-3"}}
        run = resolve({"model": model, "components": blocks})
        if fits:
            assert examine(run, world_size=1)["trainable_params"] > 0
        else:
            with pytest.raises(ConfigError, match="'llama_adapter' is there already"):
                examine(run, world_size=1)


def test_every_reason_is_told_at_once() -> None:
    blocks = {
        "qformer": {"method": "maple", "depth": 9},
        "llm": {"method": "llama_adapter"},
        "vision": {"method": "lora", "r": 4096},
    }
    with pytest.raises(ConfigError) as caught:
        examine(run_of("instructblip", "tiny", **blocks), world_size=1)
    assert len(caught.value.problems) == 3
    assert any("vision.r: got 4096, and" in problem for problem in caught.value.problems)
