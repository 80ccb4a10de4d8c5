"""Shards: building, reading, decoding and preprocessing beside stock webdataset, window by window.

    python -m benchmarks.data [--samples 1500] [--windows 7] [--per-window 30]

Both sides read the same shards of photos, decode with Pillow and make the same tensors, which is
checked to the bit: mmtrain by a keyed order, webdataset one after another, with transformers' own
image processors. Prints samples per second of CPU time, which is what one core does, and the
seconds until the first batch of a resume at 75 % of an epoch; writes benchmarks/results/. Takes
about 3 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import webdataset
from PIL import Image

from benchmarks.results import RESULTS, installed_version, machine, shown, spread
from data_shards.writer import ShardWriter
from mmtrain import plugins
from mmtrain.data.order import epoch_order
from mmtrain.data.plan import PADDING, Layout, Planner
from mmtrain.data.shards import ShardFolder
from mmtrain.data.source import open_images
from mmtrain.tasks.interface import ImageBytes, Sample

SEED = 42
PHOTO = (640, 480)
DISTINCT_PHOTOS = 50
RESUMED_BATCH, RESUMED_AT = 16, 0.75
PACKAGES = ("webdataset", "pillow", "transformers", "torch")
Steps = Iterator[object]  # each step is one sample


def processors() -> Mapping[str, tuple[str, Any]]:
    """Of each family, the class whose tensors training has, as transformers ships it."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    square = {"height": 336, "width": 336}
    padding = LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size=square, do_pad=True)
    return {
        "LLaVA-1.5": ("llava", padding),
        "InstructBLIP": ("instructblip", BlipImageProcessorPil(size={"height": 224, "width": 224})),
        "Qwen2-VL": ("qwen2_vl", Qwen2VLImageProcessorPil()),
    }


# --- material -----------------------------------------------------------------------------------


@cache
def photos() -> list[bytes]:
    """Smooth colours, of about the size and the bytes that COCO's pictures have."""
    drawn, found = random.Random(SEED), []
    for _ in range(DISTINCT_PHOTOS):
        coarse = Image.frombytes("RGB", (80, 60), drawn.randbytes(80 * 60 * 3))
        file = BytesIO()
        coarse.resize(PHOTO, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def samples(count: int) -> Iterator[Sample]:
    """Questions with four choices, a photo each."""
    pictures = photos()
    for number in range(count):
        yield Sample(
            id=f"question-{number}",
            images=(ImageBytes("jpg", pictures[number % DISTINCT_PHOTOS]),),
            question=f"What is shown in picture {number}, and what is it for?",
            answers=("a lamp",),
            choices=("a kettle", "a lamp", "a chair", "a map"),
            meta={"answer_index": 1},
        )


def write_ours(folder: Path, given: Sequence[Sample]) -> None:
    """As `mmtrain shards build` does: each sample is looked at, indexed and digested as well."""
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, samples_per_shard=500)
    for sample in given:
        writer.add(sample)
    writer.finish("scienceqa", "train", SEED, None, {})


def write_theirs(folder: Path, given: Sequence[Sample]) -> None:
    """The same members, and nothing else."""
    folder.mkdir(parents=True)
    pattern = f"file:{folder}/shard-%06d.tar"
    with webdataset.ShardWriter(pattern, maxcount=500, verbose=0) as writer:
        for number, sample in enumerate(given):
            record = {"id": sample.id, "question": sample.question, "answers": sample.answers}
            record |= {"choices": sample.choices, "meta": sample.meta}
            picture = sample.images[0].data
            writer.write({"__key__": f"{number:09d}", "json": record, "0.jpg": picture})


# --- the two sides ------------------------------------------------------------------------------


def ours(folder: Path, finish: Callable[[Sample], object]) -> Steps:
    """Samples by a keyed order over all shards."""
    source = ShardFolder.open(folder)
    for index in cycle(epoch_order(len(source), SEED, epoch=0).tolist()):
        yield finish(source.read(index))


def theirs(folder: Path, decode: Sequence[str], finish: Callable[[Any], object]) -> Steps:
    """Samples one after another, as they lie."""
    while True:
        for sample in stock(folder).decode(*decode):
            yield finish(sample)


def stock(folder: Path) -> Any:
    """webdataset's own pipeline over all shards."""
    return webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False)


def pixels_of(family: str, processor: Any) -> Callable[[Sample], torch.Tensor]:
    """Our decoding and a family's pixels of a sample's photo."""
    code, settings = plugins.load("family", family).code, SimpleNamespace(image_processor=processor)
    return lambda sample: code.pixels(settings, open_images(sample))[0]


def their_pixels(processor: Any) -> Callable[[Any], torch.Tensor]:
    """The processor's tensor of a decoded sample."""

    def of_sample(sample: Any) -> torch.Tensor:
        found: torch.Tensor = processor(sample["0.jpg"], return_tensors="pt")["pixel_values"]
        return found[0] if found.ndim > 2 else found

    return of_sample


def check_equal(folder: Path, family: str, processor: Any, count: int) -> None:
    """Both sides' tensors of the same samples, or nothing here means anything."""
    source, make = ShardFolder.open(folder), pixels_of(family, processor)
    pairs = islice(theirs(folder, ["pilrgb"], lambda one: one), count)
    for number, sample in enumerate(pairs):
        if not torch.equal(make(source.read(number)), their_pixels(processor)(sample)):
            raise RuntimeError(f"{family}: the tensors of sample {number} differ")


# --- measuring ----------------------------------------------------------------------------------


def cpu_windows(sides: Mapping[str, Steps], windows: int, count: int) -> dict[str, list[float]]:
    """Samples per second of CPU time, window by window in turn; the first only warms up."""
    found: dict[str, list[float]] = {label: [] for label in sides}
    for window in range(windows + 1):
        for label, steps in sides.items():
            start = time.process_time()
            for _ in islice(steps, count):
                pass
            if window:
                found[label].append(count / (time.process_time() - start))
    return found


def building(folder: Path, given: Sequence[Sample], windows: int) -> dict[str, list[float]]:
    """Samples written per second of CPU time."""
    found: dict[str, list[float]] = {"mmtrain": [], "webdataset": []}
    for window in range(windows + 1):
        for label, write in (("mmtrain", write_ours), ("webdataset", write_theirs)):
            start = time.process_time()
            write(folder, given)
            if window:
                found[label].append(len(given) / (time.process_time() - start))
            shutil.rmtree(folder)
    return found


def resuming(folder: Path, windows: int) -> dict[str, list[float]]:
    """Seconds until the first batch after 75 % of an epoch, nothing opened before."""
    found: dict[str, list[float]] = {"mmtrain": [], "webdataset": []}
    for _ in range(windows):
        start = time.perf_counter()
        source = ShardFolder.open(folder)
        layout = Layout(1, 0, RESUMED_BATCH, RESUMED_BATCH)
        position = int(RESUMED_AT * len(source)) // RESUMED_BATCH
        plan = Planner(len(source), layout, SEED).plan(position)
        asked = [index for index in plan.bins[0][0] if index != PADDING]
        decoded = [open_images(source.read(index)) for index in asked]
        found["mmtrain"].append(time.perf_counter() - start)
        start = time.perf_counter()
        # Skipped before they are decoded: the cheapest that a pipeline without positions can do.
        rest = stock(folder).slice(position * RESUMED_BATCH, None).decode("pilrgb")
        others = list(islice(rest, RESUMED_BATCH))
        found["webdataset"].append(time.perf_counter() - start)
        assert len(decoded) == len(others) > 0
    return found


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, dict[str, list[float]]]:
    """Every row's windows of both sides."""
    folder = scratch / "shards"
    write_ours(folder, list(samples(args.samples)))
    found = {"building": building(scratch / "built", list(samples(args.per_window)), args.windows)}
    rows: dict[str, tuple[Callable[[Sample], object], Sequence[str], Callable[[Any], object]]] = {
        "reading": (lambda sample: sample, [], lambda sample: sample),
        "and decoding": (open_images, ["pilrgb"], lambda sample: sample),
    }
    for name, (family, processor) in processors().items():
        check_equal(folder, family, processor, args.per_window)
        rows[f"and {name}'s pixels"] = (
            pixels_of(family, processor),
            ["pilrgb"],
            their_pixels(processor),
        )
    for name, (mine, decode, other) in rows.items():
        sides = {"mmtrain": ours(folder, mine), "webdataset": theirs(folder, decode, other)}
        found[name] = cpu_windows(sides, args.windows, args.per_window)
        print(f"  {name}: {', '.join(map(shown, found[name].values()))}", flush=True)
    return found | {RESUMING: resuming(folder, args.windows)}


RESUMING = "seconds to resume at 75 %"


def ratios(name: str, found: Mapping[str, Sequence[float]]) -> list[float]:
    """How many times better we are, window beside window."""
    pairs = zip(found["mmtrain"], found["webdataset"], strict=True)
    return [theirs / mine if name == RESUMING else mine / theirs for mine, theirs in pairs]


def table(args: argparse.Namespace, found: Mapping[str, Any], where: Mapping[str, Any]) -> str:
    """What is kept as Markdown."""
    versions = ", ".join(f"{name} {installed_version(name)}" for name in PACKAGES)
    megabytes = args.samples * statistics.mean(map(len, photos())) / 1e6
    lines = [
        "# Shards beside stock webdataset",
        "",
        f"{time.strftime('%Y-%m-%d')}, {where['cpu']}, {where['cores']} cores; {versions}.",
        f"{args.samples} samples with a JPEG of {PHOTO[0]} x {PHOTO[1]} each, {megabytes:.0f} MB.",
        f"Samples per second of CPU time, median (min–max) of {args.windows} alternating windows",
        f"of {args.per_window} samples; for a resume, seconds until the first decoded batch of",
        f"{RESUMED_BATCH}. mmtrain reads by a keyed order over all shards and checks digests,",
        "webdataset reads samples as they lie, and transformers' image processors make its",
        "pixels; tensors are equal to the bit. Building, mmtrain also decodes and indexes each",
        "sample, webdataset only writes it.",
        "",
        "| | mmtrain | webdataset | times better |",
        "|---|---|---|---|",
    ]
    for name, sides in found.items():
        cells = [shown(sides["mmtrain"]), shown(sides["webdataset"]), shown(ratios(name, sides))]
        if name == RESUMING:
            cells[:2] = [f"{statistics.median(one):.4f}" for one in sides.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(args: argparse.Namespace, found: Mapping[str, Any]) -> Path:
    """The record, and the table beside it."""
    where = machine("cpu")
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)", "", where["cpu"].lower())).strip("-")
    path = args.out or RESULTS / f"data-{name}.json"
    record = {
        "benchmark": "data",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {**where, **{name: installed_version(name) for name in PACKAGES}},
        "samples": args.samples,
        "samples_per_window": args.per_window,
        "windows": found,
        "times_better": {name: spread(ratios(name, sides)) for name, sides in found.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(args, found, where), encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--samples", type=int, default=1500, help="in the shards")
    parser.add_argument("--windows", type=int, default=7, help="timed windows per side and row")
    parser.add_argument("--per-window", type=int, default=30, help="samples of a window")
    parser.add_argument(
        "--out", type=Path, help="JSON file; default: by name in the results folder"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mmtrain-benchmark-") as scratch:
        path = write(args, measure(args, Path(scratch)))
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
