"""TRL's side: SFTTrainer.train() on the same folder, samples, order and LoRA initialisation.

Everything is TRL's own (collator, data loader, optimizer, logging); only the pace comes from the
benchmark, through a callback between steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    TrainerCallback,
)
from transformers.initialization import no_init_weights
from trl import SFTConfig, SFTTrainer

from benchmarks.gate import Gate, batch_digest, read_job
from benchmarks.shapes import WEIGHT_SEED
from mmtrain.models.weights import initialise_weights


class Pace(TrainerCallback):
    """Holds the trainer between windows."""

    def __init__(self, gate: Gate, lora_init: Path) -> None:
        self.gate = gate
        self.lora_init = lora_init
        self.loss: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first window; by then mmtrain has written the common initial values."""
        if self.gate.open():
            load_lora(kwargs["model"], self.lora_init)
        else:
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The next step, or the next window, or the end."""
        if not self.gate.step_done(self.loss):
            control.should_training_stop = True


def dataset(samples_file: Path) -> Dataset:
    """The samples in training order, images still encoded, as TRL's documentation has them."""
    rows = []
    for line in samples_file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        row["images"] = [{"bytes": None, "path": path} for path in row["images"]]
        rows.append(row)
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def settings(job: dict[str, Any]) -> SFTConfig:
    """TRL's defaults, but for what the comparison fixes and what `job['options']` says."""
    values = dict(
        output_dir=job["output_dir"],
        per_device_train_batch_size=job["batch"],
        max_steps=job["max_steps"],
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        max_length=None,
        bf16=job["dtype"] == "bf16",
        use_cpu=job["device"] == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return SFTConfig(**{**values, **job["options"]})


def load_lora(model: Any, file: Path) -> None:
    """Give every A and B the values of the other side."""
    values = load_file(str(file))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            ours = name.replace(".weight", ".default.weight")
            parameters.pop(f"base_model.model.{ours}").copy_(value)
    left = [name for name in parameters if "lora_" in name]
    if left:
        raise RuntimeError(f"no common initial value for {left[:3]}")


def record(trainer: SFTTrainer, pace: Pace, digests_file: Path) -> None:
    """Keep each step's loss, and the digests of the first batches."""
    training_step = trainer.training_step
    digests: list[str] = []

    def recorded(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if len(digests) < 2:
            digests.append(batch_digest(inputs))
            digests_file.write_text(json.dumps(digests))
        pace.loss = training_step(model, inputs, *args, **kwargs)
        return pace.loss

    setattr(trainer, "training_step", recorded)


def base_model(job: dict[str, Any]) -> Any:
    """The base, from its folder, or with the random weights that mmtrain's side has as well."""
    dtype = torch.float32 if job["dtype"] == "fp32" else torch.bfloat16
    if not job["draws_weights"]:
        return LlavaForConditionalGeneration.from_pretrained(job["model"], dtype=dtype)
    config = LlavaConfig.from_pretrained(job["model"])
    torch.set_default_dtype(dtype)
    with torch.device(job["device"]), no_init_weights():
        model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    initialise_weights(dict(model.named_parameters()), WEIGHT_SEED)
    return model


def processor(folder: str) -> Any:
    """The folder's processor, its images prepared as on the other side: batches are compared."""
    found: Any = AutoProcessor.from_pretrained(folder)
    found.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return found


def main() -> None:
    """Train until the benchmark has seen enough windows."""
    job, read_fd, write_fd = read_job()
    gate = Gate(read_fd, write_fd, job["device"])
    torch.set_num_threads(job["threads"])
    lora = job["lora"]
    pace = Pace(gate, Path(job["lora_init"]))
    trainer = SFTTrainer(
        model=base_model(job),
        args=settings(job),
        train_dataset=dataset(Path(job["samples"])),
        processing_class=processor(job["model"]),
        peft_config=LoraConfig(
            r=lora["r"],
            lora_alpha=lora["alpha"],
            lora_dropout=lora["dropout"],
            target_modules=lora["pattern"],
            modules_to_save=["multi_modal_projector"],
        ),
        callbacks=[pace],
    )
    record(trainer, pace, Path(job["digests"]))
    gate.ready({})
    trainer.train()


if __name__ == "__main__":
    main()
