"""Folders in the format of LLaVA's own code, made from a tiny Hugging Face model."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from mmtrain.models.interface import LoadedModel, ModelOptions
from tests import tiny
from tests.unit.folder_faults import Tensors, edit_json
from tests.unit.llava_material import FAMILY

BACKWARDS = (
    (r"^model\.language_model\.", "model."),
    (r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
)
TOWER = "model.vision_tower."
RUNS_OF_SPACES = (2, 3, 4, 8, 16)  # lengths of pieces
NUM_MARKS = 3 + 256  # unknown, begin, end, and the bytes
IDENTITY = {"llava": "LlavaLlamaForCausalLM", "share4v": "Share4VLlamaForCausalLM"}


def tiny_model_tensors(tiny_model: Path) -> Tensors:
    """The tiny model's parameters under today's names, its vocabulary without the image token."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32)
    size = model.config.image_token_id
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:size].clone()
    return tensors


def original_name(name: str) -> str:
    """Today's name of a tensor, outside the tower, as LLaVA's own code calls it."""
    for pattern, replacement in BACKWARDS:
        name = re.sub(pattern, replacement, name)
    return name


def write_original(
    tiny_model: Path,
    target: Path,
    tower: str = "named",
    kind: str = "safetensors",
    shards: int = 1,
    model_type: str = "llava",
) -> Path:
    """The model in LLaVA's format; `tower` is inside, named (by config.json), beside or missing."""
    target.mkdir(parents=True)
    tensors = tiny_model_tensors(tiny_model)
    llm = {original_name(n): t for n, t in tensors.items() if not n.startswith(TOWER)}
    vision = {n.removeprefix(TOWER): t for n, t in tensors.items() if n.startswith(TOWER)}
    if tower == "inside":
        llm |= {f"{TOWER}vision_tower.vision_model.{n}": t for n, t in vision.items()}
    llm["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(12)
    write_weights(target, llm, kind, shards)
    _write_config(tiny_model, target, model_type)
    _write_tokenizer(tiny_model, target)
    if tower in ("named", "inside"):
        write_tower(tiny_model, target / "tower", vision if tower == "named" else None)
    if tower == "beside":
        write_tower(tiny_model, target.with_name(f"{target.name}-tower"), vision)
    if tower in ("beside", "missing"):
        edit_json(target / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336")
    return target


def _write_config(tiny_model: Path, target: Path, model_type: str) -> None:
    stored = json.loads((tiny_model / "config.json").read_text())
    text = stored["text_config"]
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
    keys += ["num_key_value_heads", "rms_norm_eps", "max_position_embeddings"]
    config = {key: text[key] for key in keys} | {
        "model_type": model_type,
        "architectures": [IDENTITY[model_type]],
        "vocab_size": stored["image_token_index"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rope_scaling": None,
        "torch_dtype": "float16",
        "image_aspect_ratio": "pad",
        "mm_vision_tower": "tower",
        "mm_hidden_size": stored["vision_config"]["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
    }
    (target / "config.json").write_text(json.dumps(config))


def _write_tokenizer(tiny_model: Path, target: Path) -> None:
    """The tiny model's tokenizer without the image token, which is its last."""
    tokenizer = json.loads((tiny_model / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [
        token for token in tokenizer["added_tokens"] if token["content"] != "<image>"
    ]
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, **named}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))


def write_tower(
    tiny_model: Path, folder: Path, tensors: Tensors | None, full: bool = False
) -> Path:
    """A CLIP folder: the tower alone, or with CLIP's text side; without tensors: only settings."""
    vision = json.loads((tiny_model / "config.json").read_text())["vision_config"]
    processor = json.loads((tiny_model / "processor_config.json").read_text())["image_processor"]
    folder.mkdir(parents=True)
    config = {"model_type": "clip", "vision_config": vision, "text_config": {}} if full else vision
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    if tensors is not None:
        stored = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
        stored["vision_model.embeddings.position_ids"] = torch.arange(17)
        if full:
            stored |= {
                "logit_scale": torch.ones(()),
                "text_model.embeddings.token_embedding.weight": torch.ones(3, 2),
                "text_projection.weight": torch.ones(2, 2),
                "visual_projection.weight": torch.ones(2, 2),
            }
        write_weights(folder, stored, "bin", 1)
    return folder


def write_weights(
    folder: Path, tensors: Mapping[str, torch.Tensor], kind: str, shards: int
) -> None:
    """safetensors or .bin files, with an index when there are several."""
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        several = f"-{number + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        file = f"{stem}{several}.{suffix}"
        part = {name: tensors[name].clone() for name in names[number::shards]}
        weight_map |= dict.fromkeys(part, file)
        if kind == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    if shards > 1:
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / f"{stem}.{suffix}.index.json").write_text(index)


def load_original(folder: Path, vision_tower: Path | None = None) -> LoadedModel:
    """The folder through the family, in fp32."""
    tower = None if vision_tower is None else str(vision_tower)
    options = ModelOptions(str(folder), None, dtype="fp32", vision_tower=tower)
    return FAMILY.code.load(options, None)


@cache
def train_sentencepiece(size: int) -> bytes:
    """A Llama-like sentencepiece model: BPE, bytes for what is unknown, a space put in front.

    As in LLaMA's, runs of spaces have the first numbers behind the bytes, and the lowest score.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    from mmtrain.models.families.llava.prompts import SYSTEM

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{SYSTEM} USER: ASSISTANT:", *tiny.DIGITS_TEXTS] * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=size - len(RUNS_OF_SPACES),
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    read = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    trained = list(read.pieces)
    runs = [read.SentencePiece(piece="\u2581" * n, score=-1e9) for n in RUNS_OF_SPACES]
    del read.pieces[:]
    read.pieces.extend([*trained[:NUM_MARKS], *runs, *trained[NUM_MARKS:]])
    read.trainer_spec.vocab_size = size
    return bytes(read.SerializeToString())


def write_with_sentencepiece(
    tiny_model: Path, target: Path, size: int = 380, legacy: bool | None = False
) -> Path:
    """An original folder whose tokenizer is `tokenizer.model`, as the published ones'."""
    write_original(tiny_model, target)
    tensors = tiny_model_tensors(tiny_model)
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:size]
    llm = {original_name(n): t for n, t in tensors.items() if not n.startswith(TOWER)}
    write_weights(target, llm, "safetensors", 1)
    (target / "tokenizer.json").unlink()
    (target / "tokenizer.model").write_bytes(train_sentencepiece(size))
    edit_json(target / "tokenizer_config.json", legacy=legacy)
    edit_json(target / "config.json", vocab_size=size)
    return target
