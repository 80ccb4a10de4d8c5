"""`mmtrain init`: a commented run file to start from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtrain import plugins
from mmtrain.commands.init_own import OwnFacts, look_at
from mmtrain.config import yaml_text
from mmtrain.errors import MmtrainError

HELP = "write a commented run file for a family and a task, or for data of your own"
EXAMPLES = """examples:
  mmtrain init
  mmtrain init --task jsonl --raw photos.jsonl --checkpoint /data/llava-1.5-7b-hf
  mmtrain init --family llava --task scienceqa --checkpoint /data/llava-1.5-7b-hf --out run.yaml
"""
RUN_FILE = """\
# A run. Count it with `mmtrain check`, train it here with `mmtrain train`, on many hosts with
# `mmtrain launch`. Any key can be changed on the command line: mmtrain train FILE optim.lr=1e-4

# The run's folder is runs/<name>.
name: {family}-lora-{task}
seed: 42

model:
  family: {family}
  {base}
  # fp32 on machines without bf16
  dtype: bf16

# Per component: freeze, full, or peft with a method. What is not named stays frozen.
components:
{components}
data:
  task: {task}
  # {other_prompts}{own_words}
  template: {template}
  # Folders that this writes:
  # {build}
  train: {train}
  val: {val}
  # tokens per sample, those of images included
  max_length: {max_length}

optim:
  # Components may set their own.
  lr: 2e-4
  schedule: cosine
  warmup_ratio: 0.03
  epochs: {epochs}
  # Samples per optimizer step, all ranks together
  global_batch: {global_batch}
  # Samples per forward on one rank; lower it when memory runs out, results stay the same.
  micro_batch: {micro_batch}

generation:
  # Upper limit of an answer's tokens in validation
  max_new_tokens: {answer_tokens}

validate:
  # or a number of optimizer steps
  every: epoch
  # What decides the best checkpoint; 3 validations without gain end the run.
  metric: {metric}
  patience: 3

parallel:
  # zero1 moves the fewest bytes for adapters; zero3 when the base does not fit on one GPU
  deepspeed: zero1
  # true needs less memory and about 1.3x the time
  activation_checkpointing: false

tracking:
  # Any MLflow URI. To look at it: mlflow ui --backend-store-uri sqlite:///mlflow.db
  uri: sqlite:///mlflow.db
  experiment: {task}
"""

_OWN_WORDS = """
  # Or words of your own: template: {prompt: "{question} In one word.", target: "{answer}"}"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.epilog = EXAMPLES
    parser.add_argument("--family", default="llava", help="model family (default: llava)")
    parser.add_argument("--task", default="scienceqa", help="data set (default: scienceqa)")
    parser.add_argument("--checkpoint", metavar="DIR", help="folder of the base model")
    parser.add_argument(
        "--raw", type=Path, metavar="FILE", help="your own rows: columns and sizes come from them"
    )
    parser.add_argument(
        "--images", metavar="DIR", help="folder that their pictures' names start from"
    )
    parser.add_argument("--out", default="run.yaml", metavar="FILE", help="default: run.yaml")


def run(args: argparse.Namespace) -> int:
    """Write the file; an existing one stays as it is."""
    family = plugins.load("family", args.family)
    task = plugins.load("task", args.task)
    if "train" not in task.splits:
        raise MmtrainError(
            f"nobody trains on '{args.task}', which has a test split alone.",
            "Write the run file of another task; docs/tasks.md says how this one scores it.",
        )
    own = None if args.raw is None else look_at(args.task, args.raw, args.images)
    text = run_file(args.family, family, args.task, task, args.checkpoint, own)
    try:
        with open(args.out, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise MmtrainError(f"{args.out} exists.", "Choose another --out, or remove it.") from None
    if own is not None:
        named = ", ".join(f"{ours}: {theirs}" for ours, theirs in own.columns.items())
        print(f"{args.raw}: {own.rows:,} rows" + (f"; columns: {named}" if named else ""))
        print(f"wrote {args.out}; next: {own.build}")
    else:
        print(f"wrote {args.out}; next: mmtrain check {args.out}")
    return 0


def run_file(
    family_name: str,
    family: Any,
    task_name: str,
    task: Any,
    checkpoint: str | None,
    own: OwnFacts | None = None,
) -> str:
    """The text, with defaults that suit a 7B model on 8 GPUs of 80 GB, and the size of own data."""
    templates = list(task.templates)
    preset = next(iter(family.presets))
    if checkpoint is None:
        base = f"""preset: {preset}
  # A preset is the published shape with random weights: enough for `mmtrain check`.
  # To train, replace that line by your folder in Hugging Face format:
  # checkpoint: /data/{preset}-hf"""
    else:
        base = f"checkpoint: {_scalar(checkpoint)}"
    shards = f"shards/{task_name}"
    build = f"mmtrain shards build {task_name} --out {shards}"
    facts = own or OwnFacts(0, shards, build, epochs=3, global_batch=128, answer_tokens=32)
    return RUN_FILE.format(
        family=family_name,
        task=task_name,
        base=base,
        components=_components(family),
        template=templates[0],
        max_length=family.default_max_length,
        other_prompts=_others(templates),
        own_words=_OWN_WORDS if own is not None and own.columns else "",
        train=_scalar(f"{facts.shards}/{task.splits[0]}"),
        val=_scalar(f"{facts.shards}/{_validation(task.splits)}"),
        metric=task.primary_metric.name,
        build=facts.build,
        epochs=facts.epochs,
        global_batch=facts.global_batch,
        micro_batch=min(8, facts.global_batch),
        answer_tokens=facts.answer_tokens,
    )


def _components(family: Any) -> str:
    blocks = []
    if "connector" in family.components:
        blocks.append("  connector: {mode: full, lr: 2e-5}")
    sublayers = ", ".join(family.sublayers["llm"])
    blocks.append(f"""\
  llm:
    mode: peft
    method: lora
    # Some of: {sublayers}. Without this line: all that the model has.
    # sublayers: [{next(iter(family.sublayers["llm"]))}]
    r: 128
    alpha: 256
    dropout: 0.05""")
    return "\n".join(blocks) + "\n"


def _others(templates: Sequence[str]) -> str:
    listed = ", ".join(templates[1:])
    return f"Other prompts: {listed}" if listed else "The only prompt of this task"


def _validation(splits: Sequence[str]) -> str:
    return next((split for split in splits if split.startswith("val")), splits[-1])


def _scalar(text: str) -> str:
    """A path as YAML, quoted where it must be."""
    return yaml_text.dump(text).removesuffix("...\n").strip()
