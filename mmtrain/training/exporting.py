"""A finished run for other tools: a merged model, an adapter folder, or what vLLM serves.

What was written is read back as others will read it, and must give the run's logits.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import mmtrain
from mmtrain import plugins
from mmtrain.config.schema import RunConfig
from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.files import replaced_folder
from mmtrain.models import decoding
from mmtrain.models.dropout import stable_hash
from mmtrain.models.interface import BatchSize, Family
from mmtrain.peft.trainable import Attachment, Trainable
from mmtrain.resolve import model_options
from mmtrain.training.export import class_for_others, loading_snippet, merged_state
from mmtrain.training.inference import Ready

_PROBE = BatchSize(samples=2, tokens=64, answer_tokens=8)
# Of the largest logit: sums in another order; merging rounds every weight of a model in bf16.
_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
# vLLM serves these families with LoRA, in ranks up to this.
_SERVED, _SERVED_RANK = ("llava", "qwen_vl", "qwen2_vl"), 512


def export_run(ready: Ready, out: Path, form: str) -> float | None:
    """Write it and read it back; how far its logits are from the run's, relatively.

    None: what reads it has no logits to compare.
    """
    config, assembled = ready.config, ready.assembled
    if form == "vllm" and (reasons := vllm_reasons(config, assembled.trainable)):
        raise ConfigError(
            reasons, f"vLLM cannot serve {ready.run_dir} as an adapter; use --to merged"
        )
    lasting = [one for one in assembled.trainable.attachments if not one.method.merges]
    if form == "merged" and lasting:
        names = ", ".join(f"components.{one.block_name} ({one.method_name})" for one in lasting)
        raise CheckpointError(
            f"cannot be folded into the base's weights: {names}.", "Use --to peft instead."
        )
    if form == "merged" and config.model.quantization:
        raise CheckpointError(
            f"weights in {config.model.quantization} cannot take an adapter up without being"
            " quantised again, which changes answers.",
            "Use --to peft; its card shows how to load it on the quantised base.",
        )
    wanted = _logits(assembled.family, assembled.model)
    device = next(assembled.model.parameters()).device
    if form == "merged":
        state = merged_state(assembled.model, assembled.trainable)
        with replaced_folder(out) as folder:
            assembled.family.code.save(assembled.model, assembled.processor, state, folder)
            found = _logits(assembled.family, _merged_model(config, folder).to(device))
            return _compared(found, wanted, config)
    with replaced_folder(out) as folder:
        _copy_exports(ready.folder, folder)
        if any(one.method_name == "prefix" for one in assembled.trainable.attachments):
            return None  # peft gives a prefix to the whole model's own forward
        base_class = class_for_others(config, assembled)
        snippet = loading_snippet(config, assembled.trainable, base_class, assembled.model)
        return _compared(_snippets_logits(folder, snippet, config), wanted, config)


def _copy_exports(run_dir: Path, folder: Path) -> None:
    """adapter/ and full/ of a run, and its run file, as its card expects them."""
    for part in ("adapter", "full"):
        if (run_dir / part).is_dir():
            shutil.copytree(run_dir / part, folder / part)
    if not any(folder.iterdir()):
        raise CheckpointError(
            f"{run_dir}: exported nothing yet.", "Train it to its end, or use --to merged."
        )
    shutil.copy(run_dir / "run.yaml", folder)


def vllm_reasons(config: RunConfig, trainable: Trainable) -> list[str]:
    """Why vLLM cannot load what was trained beside a base that it serves."""
    reasons = []
    family = config.model.family
    if family not in _SERVED:
        reasons.append(f"model.family: vLLM serves no '{family}' with LoRA")
    if config.model.vision_tower or config.model.overrides:
        reasons.append("model: vLLM reads the base's own folder, and this run changed it")
    for component in trainable.full_components:
        reasons.append(f"components.{component}: is trained in full, and an adapter holds none")
    if len(trainable.attachments) != 1:
        count = len(trainable.attachments)
        reasons.append(f"components: {count} adapters are trained, vLLM takes one")
    return [*reasons, *(text for one in trainable.attachments for text in _unknown_to_vllm(one))]


def _unknown_to_vllm(one: Attachment) -> list[str]:
    place = f"components.{one.block_name}"
    if one.method_name != "lora":
        return [f"{place}.method: vLLM knows LoRA, not '{one.method_name}'"]
    rank = max([one.options.r, *one.options.rank_pattern.values()])
    faults = {
        ": vLLM adapts the language model alone": one.component != "llm",
        ".dora: vLLM leaves out the norms of DoRA": one.options.dora,
        f".r: got {rank}, vLLM takes at most {_SERVED_RANK}": rank > _SERVED_RANK,
    }
    return [f"{place}{fault}" for fault, holds in faults.items() if holds]


def _merged_model(config: RunConfig, folder: Path) -> Any:
    """What is in a merged folder, read as any base."""
    changes: dict[str, object] = {
        "checkpoint": str(folder),
        "preset": None,
        "vision_tower": None,
        "overrides": {},
    }
    plain = config.model.model_copy(update=changes)
    options = model_options(config.model_copy(update={"model": plain}))
    family: Family = plugins.load("family", config.model.family)
    return family.code.load(options, None).model


def _snippets_logits(folder: Path, snippet: str, config: RunConfig) -> torch.Tensor:
    """Of what the card's own lines build, in a process of their own, run where its reader would."""
    with tempfile.TemporaryDirectory() as place:
        file = str(Path(place) / "logits.safetensors")
        asked = f"write_logits(model, {config.model.family!r}, {file!r})"
        program = f"{snippet}\nfrom mmtrain.training.exporting import write_logits\n{asked}\n"
        # mmtrain may run from a plain folder, which its reader's process must find.
        paths = [
            str(Path(mmtrain.__file__).parents[1]),
            *os.environ.get("PYTHONPATH", "").split(":"),
        ]
        ran = subprocess.run(
            [sys.executable, "-c", program],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": ":".join(filter(None, paths))},
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode != 0:
            said = ran.stderr.strip().splitlines() or ["nothing was said"]
            raise CheckpointError(
                f"the lines of the adapter's card failed: {said[-1]}",
                "Nothing was kept; the lines are in the card in the run's adapter/.",
            )
        return load_file(file)["logits"]


def write_logits(model: Any, family_name: str, file: str) -> None:
    """What the process that reads an export tells the one that wrote it."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if torch.cuda.is_available():
        model = model.to("cuda")
    logits = _logits(plugins.load("family", family_name), model)
    save_file({"logits": logits.contiguous()}, file)


def _logits(family: Family, model: Any) -> torch.Tensor:
    """Of a few answers about noise, the same noise for all who ask."""
    device = next(model.parameters()).device
    batch = family.code.planned_batch(model.config, _PROBE)
    generator = torch.Generator().manual_seed(stable_hash("probe"))
    for name, tensor in batch.tensors.items():
        if tensor.is_floating_point():
            batch.tensors[name] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    with torch.no_grad():
        batch = batch.to(device)
        hidden, tensors = decoding.hidden_states(family, model, batch)
        picked = hidden.reshape(-1, hidden.shape[-1])[tensors["answer_positions"]]
        return family.code.decoder(model).get_output_embeddings()(picked).float().cpu()


def _compared(found: torch.Tensor, wanted: torch.Tensor, config: RunConfig) -> float:
    """The largest difference, of the largest logit; an error where it is none of rounding."""
    apart = float((found - wanted).abs().max() / wanted.abs().max())
    # On a CPU, who reads a quantised base multiplies in bf16 whatever was asked for.
    tolerance = _TOLERANCE["bf16" if config.model.quantization else config.model.dtype]
    if not apart <= tolerance:
        raise CheckpointError(
            f"what was written gives other logits than the run: {apart:.2g} of the largest apart,"
            f" {tolerance:g} is rounding.",
            "Nothing was kept. Was the base changed since the run? `mmtrain evaluate` tells.",
        )
    return apart
