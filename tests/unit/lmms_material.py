"""Shards where task files for lmms-eval look for them, a task of somebody else's, and the truth."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data_shards.writer import ShardWriter
from mmtrain import plugins
from mmtrain.__main__ import main
from mmtrain.commands import evaluate
from mmtrain.tasks.interface import Sample, Task
from mmtrain.training.inference import Ready
from tests import tiny
from tests.unit.llava_material import image

_SAMPLES_AT_MOST = 10


def written_shards(root: Path, digits: Path) -> Path:
    """A folder as `shards build TASK --out shards/TASK` fills it."""
    root.mkdir(exist_ok=True)
    (root / "digits").symlink_to(digits)
    raw = tiny.write_scienceqa_raw(root / "raw")
    out = root / "scienceqa"
    command = ["shards", "build", "scienceqa", "--raw", str(raw), "--out", str(out)]
    assert main([*command, "--split", "train"]) == 0
    (out / "test").symlink_to(out / "train")
    return root


def write_golden(folder: Path) -> None:
    """Shards of `<data set>/<split>`, of the small files beside the golden prompts."""
    name, split = folder.parent.name, folder.name
    task: Task = plugins.load("task", name)
    raw = tiny.REPOSITORY / "tests" / "golden" / "tasks" / name / "raw"
    samples = task.read(raw if task.needs_raw else None, split, task.build_options())
    folder.mkdir(parents=True)
    writer = ShardWriter(folder)
    for sample in islice((one for one in samples if isinstance(one, Sample)), _SAMPLES_AT_MOST):
        writer.add(sample)
    writer.finish(name, split, 0, None, {})


def evaluated(
    ready: Ready, folder: Path, limit: int, out: Path
) -> tuple[list[str], dict[str, float]]:
    """What the command keeps of a folder's first samples: the answers, the metrics."""
    parser = argparse.ArgumentParser()
    evaluate.configure(parser)
    asked = ["run", "--data", str(folder), "--limit", str(limit), "--out", str(out)]
    evaluate.evaluate_all(parser.parse_args(asked), ready)
    lines = (out / "predictions.jsonl").read_text().splitlines()
    answers = [json.loads(line)["prediction"] for line in lines]
    return answers, json.loads((out / "metrics.json").read_text())


# Two pictures, one in grey, none, one.
SHOWN: tuple[list[Any], ...] = ([image(1), image(2)], [image(3).convert("L")], [], [image(4)])
QUESTIONS = ("Which is older?", "What is it?", "Who?", "Where?")
_HERE = f"!function {__name__}"
_OTHERS = {
    "task": "others",
    "dataset_kwargs": "{load_from_disk: true}",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_visual": f"{_HERE}.pictures",
    "doc_to_text": "question",
    "doc_to_target": "question",
    "process_results": f"{_HERE}.lengths",
    "metric_list": "[{metric: acc, aggregation: mean, higher_is_better: true}]",
    "generation_kwargs": "{max_new_tokens: 5, temperature: 0, top_p: 1.0, num_beams: 2}",
}


def pictures(doc: Mapping[str, Any]) -> list[Any]:
    """What a document shows."""
    return list(doc["pictures"])


def film(doc: Mapping[str, Any]) -> list[str]:
    """As lmms-eval gives videos."""
    return ["film.mp4"]


def round_of(doc: Mapping[str, Any], **given: object) -> str:
    """The text of a round."""
    return str(doc["question"])


def lengths(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """A metric."""
    return {"acc": float(len(results[0]))}


def write_others(folder: Path) -> Path:
    """The data of somebody else's task, as the datasets library keeps them."""
    from datasets import Dataset, DatasetDict, Features, Image, List, Value

    words = Value("string")
    features = Features(question=words, pictures=List(Image()), choices=List(words))
    choices = [["a", "b"]] * len(SHOWN)
    rows = {"question": list(QUESTIONS), "pictures": list(SHOWN), "choices": choices}
    DatasetDict({"test": Dataset.from_dict(rows, features)}).save_to_disk(str(folder / "data"))
    return folder


def write_task(folder: Path, **changed: str) -> Path:
    """Its task file, for --include_path; the values are YAML."""
    lines = {**_OTHERS, "dataset_path": str(folder / "data"), **changed}
    text = "\n".join(f"{key}: {value}" for key, value in lines.items() if value)
    (folder / "others.yaml").write_text(text)
    return folder
