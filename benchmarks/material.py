"""What both sides train: a LLaVA folder with random weights, and shards of real digit images."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import shapes
from mmtrain import plugins
from mmtrain.data.plan import Layout, Planner
from mmtrain.data.shards import ShardFolder
from mmtrain.models import tiny
from mmtrain.models.building import build_empty
from mmtrain.models.families.llava.prompts import IMAGE_TOKEN, SYSTEM
from mmtrain.models.interface import ModelOptions
from mmtrain.models.weights import initialise_weights

WARM_UP_WINDOWS = 1
# Images are prepared within the step on a CPU: threads ahead of it would work between windows.
DATA_WORKERS = {"cpu": 0, "cuda": 4}
# About 30 M parameters and 102 tokens per sample: what 2 CPU cores train at several samples/s.
SMALL: Mapping[str, Any] = dict(
    text_config=dict(
        model_type="llama",
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=4096,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
    ),
    vision_config=dict(
        model_type="clip_vision_model",
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=24,
        patch_size=4,
        projection_dim=128,
    ),
    vision_feature_layer=-2,
    vision_feature_select_strategy="default",
    projector_hidden_act="gelu",
)
# Linear layers of the LLM, by the names they have in both sides' models.
LLM_LINEARS = (
    r".*language_model\.layers\.\d+\." r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
)


LORA_ALPHA_PER_RANK = 2
SEED = 42


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write everything the peers read; the job that all of them are given.

    A published shape comes without weights: every peer draws the same ones where it trains.
    """
    shards = folder / "shards" / "train"
    task = "digits"
    max_steps = args.steps * (args.windows + WARM_UP_WINDOWS)
    if args.questions:
        task = "scienceqa"
        shapes.write_shards(shards, (max_steps + 1) * args.batch, args.image_every)
    else:
        command = [sys.executable, "-m", "mmtrain", "shards", "build", task]
        subprocess.run([*command, "--split", "train", "--out", str(shards.parent)], check=True)
    texts = write_samples(task, shards, folder, max_steps, args.batch)
    if args.preset:
        shapes.write_folder(folder / "model", "llava", args.preset, texts)
    else:
        write_model(folder / "model", texts, args.dtype)
    return {
        "task": task,
        "draws_weights": args.preset is not None,
        "device": args.device,
        "threads": args.threads,
        "dtype": args.dtype,
        "model": str(folder / "model"),
        "shards": str(shards),
        "samples": str(folder / "samples.jsonl"),
        "seed": SEED,
        "batch": args.batch,
        "max_steps": max_steps + 1,  # no peer ends by itself: ending takes time of its own
        "lr": 2e-4,
        "lora": {
            "r": args.r,
            "alpha": LORA_ALPHA_PER_RANK * args.r,
            "dropout": args.dropout,
            "pattern": LLM_LINEARS,
        },
        "lora_init": str(folder / "lora.safetensors"),
        "workers": DATA_WORKERS[args.device],
        "deepspeed": args.deepspeed,
    }


def write_samples(task: str, shards: Path, folder: Path, max_steps: int, batch: int) -> list[str]:
    """The samples in mmtrain's order as TRL reads them; their texts."""
    render = next(iter(plugins.load("task", task).templates.values()))
    source = ShardFolder.open(shards)
    images = folder / "images"
    images.mkdir()
    rows: list[dict[str, Any]] = []
    planner = Planner(len(source), Layout(1, 0, batch, batch), SEED)
    for position in range(max_steps + 1):
        for index in planner.plan(position).bins[0][0]:
            sample = source.read(int(index))
            rendered = render(sample)
            files = []
            for image in sample.images:
                files.append(images / f"{index}.{image.extension}")
                files[-1].write_bytes(image.data)
            said = f"{IMAGE_TOKEN}\n" * len(files) + rendered.turns[-1].text
            row = {"prompt": f"<s>{SYSTEM} USER: {said} ASSISTANT:"}
            rows.append(row | {"completion": f" {rendered.target}</s>", "images": files})
    (folder / "samples.jsonl").write_text(
        "\n".join(json.dumps(row, default=str) for row in rows), encoding="utf-8"
    )
    return [row["prompt"] + row["completion"] for row in rows]


def write_model(folder: Path, texts: list[str], dtype: str) -> None:
    """A folder as published ones are: configuration, safetensors, tokenizer, processor."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaProcessor

    family = plugins.load("family", "llava")
    config: Any = LlavaConfig(**dict(SMALL))
    tokenizer = tiny.train_tokenizer(texts, IMAGE_TOKEN)
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    size = config.vision_config.image_size
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
    )
    model: Any = build_empty(family.code.skeleton, config, ModelOptions(None, None, dtype), None)
    initialise_weights(dict(model.named_parameters()), seed=0)
    model.save_pretrained(str(folder))
    processor.save_pretrained(str(folder))
