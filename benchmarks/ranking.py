"""Ranking four candidates of each question, batched and with shared prompts, beside one by one.

    python -m benchmarks.ranking [--questions 4] [--windows 5]

The models are of the real classes, with random weights and shapes scaled so that tower and language
model share the work about as in the published ones; questions are as long as ScienceQA's, each with
a picture. One by one, each candidate is a forward of its own, its picture through the tower. Checks
that all choose the same; writes benchmarks/results/. Takes about 2 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import shapes
from benchmarks.results import RESULTS, machine, shown, spread
from mmtrain import plugins
from mmtrain.assemble import build_source
from mmtrain.data.source import Question, Source
from mmtrain.evaluation.answer import ranked
from mmtrain.models.interface import Batch, ForwardResult, ImageFeatures, SharedPrompts
from mmtrain.resolve import resolve
from mmtrain.training.engine import Engine
from mmtrain.training.inference import build_ready

CHUNK = 2  # questions at once, where they are batched
Ranking = Callable[[Source, Sequence[Question]], list[str]]
# The tower has 4 % of a forward's work in LLaVA-1.5-7B and 59 % in InstructBLIP-FlanT5-XL.
MODELS: dict[str, Mapping[str, Any]] = {
    "LLaVA-1.5": {
        "family": "llava",
        "preset": "llava-1.5-7b",
        "text_config": {
            **{"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4},
            **{"num_attention_heads": 8, "num_key_value_heads": 8},
        },
        "vision_config": {
            **{"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4},
            "num_attention_heads": 2,
        },
    },
    "InstructBLIP-FlanT5": {
        "family": "instructblip",
        "preset": "instructblip-flan-t5-xl",
        "text_config": {
            **{"d_model": 256, "d_ff": 688, "num_heads": 4},
            **{"num_layers": 4, "num_decoder_layers": 4},
        },
        "vision_config": {
            **{"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4},
            "num_attention_heads": 4,
        },
        "qformer_config": {
            **{"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "encoder_hidden_size": 256},
        },
    },
}


class TowerOnce:
    """An engine whose batches share their pictures' features, and not their prompts."""

    def __init__(self, engine: Engine) -> None:
        self.family, self.processor, self.world = engine.family, engine.processor, engine.world
        self.image_features, self.generate = engine.image_features, engine.generate
        self._engine = engine

    def forward(
        self,
        batch: Batch,
        features: ImageFeatures | None = None,
        shared: SharedPrompts | None = None,
    ) -> ForwardResult:
        """One forward over whole rows."""
        return self._engine.forward(batch, features)


def batched(executor: Any) -> Ranking:
    """As evaluation ranks."""

    def rank(source: Source, questions: Sequence[Question]) -> list[str]:
        found: list[str] = []
        for start in range(0, len(questions), CHUNK):
            chunk = questions[start : start + CHUNK]
            examples = [question.example for question in chunk]
            batch = executor.family.code.collate(examples, executor.processor)
            found += ranked(executor, source.encoder, chunk, executor.image_features(batch))
        return found

    return rank


def one_by_one(engine: Engine) -> Ranking:
    """Each candidate a forward of its own, from its picture on."""

    def loss(source: Source, question: Question, candidate: str) -> float:
        example = source.encoder.with_answer(question, candidate)
        batch = engine.family.code.collate([example], engine.processor)
        return float(engine.forward(batch).answer_loss_sum)

    def rank(source: Source, questions: Sequence[Question]) -> list[str]:
        return [
            min(one.rendered.candidates, key=lambda said: loss(source, one, said))
            for one in questions
        ]

    return rank


def prepare(name: str, folder: Path, count: int) -> tuple[Engine, Source]:
    """A model of its shapes, and its questions."""
    shards, base, chosen = folder / "shards", folder / name, MODELS[name]
    texts = shapes.write_shards(shards, count)
    family = plugins.load("family", chosen["family"])
    published = family.presets[chosen["preset"]]
    parts = {key: {**published[key], **chosen[key]} for key in chosen if key.endswith("_config")}
    with patch.dict(family.presets, {"scaled": {**published, **parts}}):
        family.code.write_tiny(base, [*texts, *shapes.CHOICES], shapes.WEIGHT_SEED, "scaled")
    model = {"family": chosen["family"], "checkpoint": str(base), "dtype": "fp32"}
    data = {"task": "scienceqa", "train": str(shards), "template": "kim2023"}
    components = {"llm": {"mode": "peft", "method": "lora", "sublayers": ["attn"]}}
    optim = {"global_batch": 1, "micro_batch": 1}
    run = {"model": model, "components": components, "data": data, "optim": optim}
    run["parallel"] = {"threads": 1}
    ready = build_ready(resolve(run), None, None)
    ready.engine.evaluation_mode()
    return ready.engine, build_source(ready.config, ready.assembled, str(shards), count)


def measure(name: str, args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Questions per second of CPU time, window by window in turn; the first only warms up."""
    engine, source = prepare(name, folder, args.questions)
    questions = [source.question(index) for index in range(args.questions)]
    ways = {
        "one by one": one_by_one(engine),
        "tower once": batched(TowerOnce(engine)),
        "mmtrain": batched(engine),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for window in range(args.windows + 1):
        choices = {}
        for way, rank in ways.items():
            start = time.process_time()
            with torch.no_grad():
                choices[way] = rank(source, questions)
            if window:
                found[way].append(len(questions) / (time.process_time() - start))
        if len({tuple(chosen) for chosen in choices.values()}) > 1:
            raise RuntimeError(f"{name}: different choices: {choices}")
    print(f"  {name}: {', '.join(f'{way} {shown(one)}' for way, one in found.items())}", flush=True)
    return found


def ratios(found: Mapping[str, Sequence[float]], way: str) -> list[float]:
    """How many times faster than one by one, window beside window."""
    return [a / b for a, b in zip(found[way], found["one by one"], strict=True)]


def write(args: argparse.Namespace, found: Mapping[str, Mapping[str, Any]]) -> Path:
    """The record, and the table beside it."""
    where, day = machine("cpu"), time.strftime("%Y-%m-%d")
    record = {
        "benchmark": "ranking",
        "date": day,
        "machine": where,
        "models": {name: dict(chosen) for name, chosen in MODELS.items()},
        "questions_per_s": found,
        "ratio": {
            name: {way: spread(ratios(ways, way)) for way in ways} for name, ways in found.items()
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Ranking four candidates",
        "",
        f"{day}, {where['cpu']}, {where['cores']} cores, fp32; torch {where['torch']},"
        f" transformers {where['transformers']}.",
        f"Questions per second of CPU time, median (min–max) of {args.windows} windows in turn",
        f"of {args.questions} questions as long as ScienceQA's with a picture each; all choose",
        "the same. One by one, each candidate is a forward with its picture. Questions are",
        f"batched by {CHUNK} with pictures computed once (`tower once`), in mmtrain with prompts",
        "computed once, too. Shapes are scaled so that the tower's share is about the published",
        "model's.",
        "",
        "| | one by one | tower once | mmtrain | mmtrain / one by one | mmtrain / tower once |",
        "|---|---|---|---|---|---|",
    ]
    for name, ways in found.items():
        once = [a / b for a, b in zip(ways["mmtrain"], ways["tower once"], strict=True)]
        cells = [*map(shown, ways.values()), shown(ratios(ways, "mmtrain")), shown(once)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    table = args.out.with_suffix(".md")
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranking", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--questions", type=int, default=4, help="of a window")
    parser.add_argument("--windows", type=int, default=5, help="timed windows per way")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path, default=RESULTS / "ranking-small-cpu.json")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="mmtrain-benchmark-") as scratch:
        found = {name: measure(name, args, Path(scratch) / name) for name in args.models}
    print(write(args, found).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
