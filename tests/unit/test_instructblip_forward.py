"""InstructBLIP's forward and generation against transformers' own, sample by sample."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from safetensors.torch import save_file

from mmtrain.models import decoding
from mmtrain.models.interface import LoadedModel
from tests.unit.folder_faults import stored_tensors
from tests.unit.instructblip_material import (
    FAMILY,
    GREEDY,
    TINY_MODELS,
    example,
    image,
    load,
    mixed,
    our_logits,
    reference_inputs,
    reference_logits,
    reference_of,
    text_and_answer,
    write_lively,
)

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=TINY_MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lively(tmp_path_factory.mktemp("instructblip"), request.param)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return reference_of(folder)


def loss_of(loaded: LoadedModel, examples: list[Any]) -> Any:
    with torch.no_grad():
        return decoding.forward(
            FAMILY, loaded.model, FAMILY.code.collate(examples, loaded.processor)
        )


def test_logits_of_a_mixed_batch_equal_transformers(loaded: LoadedModel, reference: Any) -> None:
    examples = mixed(loaded.processor)
    with torch.no_grad():
        ours = our_logits(loaded.model, FAMILY.code.collate(examples, loaded.processor))
    wanted = [reference_logits(reference, loaded.processor, one) for one in examples]
    assert min(one.abs().max() for one in wanted) > 0.5, "weights too small to tell anything"
    difference = (ours - torch.cat(wanted)).abs().max()
    assert difference <= TOLERANCE * torch.cat(wanted).abs().max(), float(difference)


def test_t5_keeps_the_exact_activation_of_its_folder(loaded: LoadedModel, reference: Any) -> None:
    """`gated-gelu` alone is transformers' name for the approximate one."""
    activations = [
        [type(one.act).__name__ for one in model.modules() if hasattr(one, "wi_0")]
        for model in (loaded.model, reference)
    ]
    assert activations[0] == activations[1]
    assert set(activations[0]) <= {"GELUActivation"}
    is_t5 = loaded.config.text_config.model_type == "t5"
    assert bool(activations[0]) == is_t5
    assert not is_t5 or loaded.config.text_config.dense_act_fn == "gelu"


def test_loss_is_the_sum_over_answer_tokens(loaded: LoadedModel, reference: Any) -> None:
    examples = mixed(loaded.processor)
    result = loss_of(loaded, examples)
    wanted, num_answer_tokens = [], 0
    for one in examples:
        answer = torch.tensor(text_and_answer(one)[1])
        logits = reference_logits(reference, loaded.processor, one)
        wanted.append(functional.cross_entropy(logits, answer, reduction="sum"))
        num_answer_tokens += len(answer)
    assert torch.allclose(result.per_sample_loss, torch.stack(wanted), rtol=TOLERANCE)
    assert float(result.answer_loss_sum) == pytest.approx(float(sum(wanted)), rel=TOLERANCE)
    assert int(result.per_sample_tokens.sum()) == num_answer_tokens


def test_loss_equals_the_one_transformers_computes_from_labels(
    loaded: LoadedModel, reference: Any
) -> None:
    one = mixed(loaded.processor)[0]
    prompt, answer = text_and_answer(one)
    inputs = reference_inputs(loaded.processor, one)
    labels = answer if loaded.processor.decoder_start_token_id is not None else one.labels
    if labels is one.labels:
        inputs["input_ids"] = torch.tensor([prompt + answer])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        wanted = reference(**inputs, labels=torch.tensor([labels])).loss * len(answer)
    found = loss_of(loaded, [one]).answer_loss_sum
    assert float(found) == pytest.approx(float(wanted), rel=TOLERANCE)


def test_prompts_equal_those_of_transformers_processor(loaded: LoadedModel, folder: Path) -> None:
    from transformers import AutoProcessor

    question = "Which digit is in the picture?"
    one = example(loaded.processor, "a", question, "5", [image(1)])
    wanted = AutoProcessor.from_pretrained(folder)(image(1), question, return_tensors="pt")
    assert text_and_answer(one)[0] == wanted["input_ids"][0].tolist()
    assert one.extras["instruction_ids"] == wanted["qformer_input_ids"][0].tolist()
    assert torch.equal(one.pixels[0], wanted["pixel_values"][0])


def test_images_and_instructions_count(loaded: LoadedModel) -> None:
    variants = [(1, None), (2, None), (1, "Say 7.")]
    losses = [
        float(
            loss_of(
                loaded,
                [example(loaded.processor, "a", "Which?", "5", [image(n)], instruction=told)],
            ).answer_loss_sum
        )
        for n, told in variants
    ]
    assert min(abs(losses[0] - losses[1]), abs(losses[0] - losses[2])) > 1e-3, losses


def test_several_images_are_several_rows(loaded: LoadedModel) -> None:
    one = example(loaded.processor, "two", "Same?", "no", [image(1), image(2)])
    other = example(loaded.processor, "two", "Same?", "no", [image(2), image(1)])
    batch = FAMILY.code.collate([one], loaded.processor)
    assert batch.tensors["pixel_values"].shape[0] == 2
    losses = [float(loss_of(loaded, [each]).answer_loss_sum) for each in (one, other)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_padding_samples_run_but_change_nothing(loaded: LoadedModel) -> None:
    examples = mixed(loaded.processor)
    found = loss_of(loaded, [*examples, replace(examples[0], weight=0.0)])
    wanted = loss_of(loaded, examples)
    assert found.per_sample_tokens.tolist() == [*wanted.per_sample_tokens.tolist(), 0]
    assert float(found.per_sample_loss[-1]) == 0.0
    assert float(found.answer_loss_sum) == pytest.approx(float(wanted.answer_loss_sum), rel=1e-6)


# --- ZeRO-3: the same calls whatever a batch holds, and no weight read outside its module ---------


def called(loaded: LoadedModel, examples: list[Any]) -> list[str]:
    """The names of the modules with parameters, in the order of their calls."""
    names: list[str] = []
    with ExitStack() as stack:
        for name, module in loaded.model.named_modules():
            if list(module.parameters(recurse=False)):
                hook = module.register_forward_hook(lambda *_, name=name: names.append(name))
                stack.callback(hook.remove)
        loss_of(loaded, examples)
    return names


def test_every_batch_calls_the_same_modules(loaded: LoadedModel) -> None:
    examples = mixed(loaded.processor)
    wanted = called(loaded, examples)
    assert called(loaded, [examples[1]]) == called(loaded, [examples[0]]) == wanted
    for once in ("vision_model.embeddings", "vision_model.post_layernorm", "language_projection"):
        assert wanted.count(once) == wanted.count("language_model.lm_head") == 1


def test_nothing_reads_the_blank_image(loaded: LoadedModel) -> None:
    batch = FAMILY.code.collate([mixed(loaded.processor)[1]], loaded.processor)
    losses = []
    for value in (0.0, 1.0):
        batch.tensors["pixel_values"].fill_(value)
        with torch.no_grad():
            losses.append(float(decoding.forward(FAMILY, loaded.model, batch).answer_loss_sum))
    assert losses[0] == losses[1]


@contextmanager
def gathered_by_calls(model: Any) -> Iterator[None]:
    """Parameters exist only while the module that owns them runs, as under ZeRO-3."""

    def swap(module: Any, present: bool) -> None:
        for parameter in module.parameters(recurse=False):
            full.setdefault(parameter, parameter.data)
            parameter.data = full[parameter] if present else full[parameter].new_empty(0)

    full: dict[Any, torch.Tensor] = {}
    # The query tokens belong to no submodule: DeepSpeed gathers them where they are read.
    owners = [module for module in model.modules() if module is not model]
    with ExitStack() as stack:
        for module in owners:
            swap(module, False)
            before = module.register_forward_pre_hook(lambda one, _: swap(one, True))
            after = module.register_forward_hook(lambda one, *_: swap(one, False))
            stack.callback(before.remove)
            stack.callback(after.remove)
        try:
            yield
        finally:
            for module in owners:
                swap(module, True)


def test_weights_are_only_read_by_calling_their_modules(loaded: LoadedModel) -> None:
    examples = mixed(loaded.processor)
    wanted = float(loss_of(loaded, examples).answer_loss_sum)
    texts = decoding.generate(FAMILY, loaded.model, loaded.processor, examples, GREEDY)
    with gathered_by_calls(loaded.model):
        found = float(loss_of(loaded, examples).answer_loss_sum)
        found_texts = decoding.generate(FAMILY, loaded.model, loaded.processor, examples, GREEDY)
    assert (found, found_texts) == (wanted, texts)


def test_every_parameter_is_made_with_its_module(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharded construction cuts a module's parameters once its own constructor has run."""
    made: dict[int, Any] = {}
    plain = torch.nn.Linear.__init__

    def remembering(self: Any, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **options)
        made.update({id(parameter): parameter for parameter in self.parameters()})

    monkeypatch.setattr(torch.nn.Linear, "__init__", remembering)
    model = FAMILY.code.skeleton(loaded.config)
    late = [
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        for leaf, parameter in module.named_parameters()
        if id(parameter) not in made
    ]
    assert made and not late


@pytest.mark.parametrize("base_dropout", [0, "checkpoint"])
def test_recomputed_activations_give_the_same_gradients(
    folder: Path, base_dropout: int | str
) -> None:
    gradients: list[dict[str, torch.Tensor]] = []
    for recompute in (False, True):
        fresh = load(folder, base_dropout=base_dropout)
        model: Any = fresh.model
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        batch = FAMILY.code.collate(mixed(fresh.processor), fresh.processor)
        decoding.forward(FAMILY, model, batch).answer_loss_sum.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    # To rounding: T5 adds up what its layers send to the shared position bias in another order.
    scale = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    for name, wanted in gradients[0].items():
        assert torch.allclose(gradients[1][name], wanted, rtol=0, atol=1e-5 * scale), name


# --- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 2])
def test_batched_generation_equals_one_by_one(loaded: LoadedModel, beams: int) -> None:
    settings = SimpleNamespace(**{**vars(GREEDY), "num_beams": beams})
    examples = mixed(loaded.processor)
    together = decoding.generate(FAMILY, loaded.model, loaded.processor, examples, settings)
    single = [
        decoding.generate(FAMILY, loaded.model, loaded.processor, [one], settings)[0]
        for one in examples
    ]
    assert together == single
    assert len(set(together)) > 1 and any(together), together


def test_generation_equals_transformers_own(loaded: LoadedModel, reference: Any) -> None:
    tokenizer = loaded.processor.tokenizer
    for one in mixed(loaded.processor):
        inputs = reference_inputs(loaded.processor, one)
        model = reference if one.pixels else reference.language_model
        out = model.generate(
            **inputs, max_new_tokens=GREEDY.max_new_tokens, do_sample=False, pad_token_id=0
        )[0].tolist()
        prompt = inputs["input_ids"][0].tolist()
        new = out[len(prompt) :] if out[: len(prompt)] == prompt else out
        wanted = tokenizer.decode(new, skip_special_tokens=True).strip()
        assert decoding.generate(FAMILY, loaded.model, loaded.processor, [one], GREEDY) == [wanted]


def test_unpadded_vocabulary(folder: Path, reference: Any, tmp_path: Path) -> None:
    """The image token's id is the vocabulary's size: it has no embedding and no logit."""
    target = tmp_path / "unpadded"
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    size = config["image_token_index"]
    assert size < config["text_config"]["vocab_size"]
    tensors = {
        name: tensor[:size].contiguous() if name.startswith(VOCABULARY_ROWS) else tensor
        for name, tensor in stored_tensors(folder).items()
    }
    config["text_config"]["vocab_size"] = size
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    unpadded = load(target)
    examples = mixed(unpadded.processor)
    batch = FAMILY.code.collate(examples, unpadded.processor)
    assert int(batch.tensors["input_ids"].max()) == size
    with torch.no_grad():
        ours = our_logits(unpadded.model, batch)
    wanted = [reference_logits(reference, unpadded.processor, one)[:, :size] for one in examples]
    assert (ours - torch.cat(wanted)).abs().max() <= TOLERANCE
    answers = decoding.generate(FAMILY, unpadded.model, unpadded.processor, examples, GREEDY)
    assert len(answers) == len(examples)


VOCABULARY_ROWS = (
    "language_model.lm_head.",
    "language_model.shared.",
    "language_model.model.embed_tokens.",
)
