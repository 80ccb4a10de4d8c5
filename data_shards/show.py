"""Samples on a page, as a model will see them: pictures, prompt, answer, tokens."""

from __future__ import annotations

from collections.abc import Callable

from mmtrain import plugins
from mmtrain.assemble import source_to_look_at
from mmtrain.config.load import load_run_file
from mmtrain.data.order import epoch_order
from mmtrain.data.shards import ShardFolder
from mmtrain.data.source import Source, open_images, render
from mmtrain.report.html import cards, page
from mmtrain.report.samples import card, sheet
from mmtrain.tasks.interface import Rendered, Sample


def contact_sheet(
    folder: str, run: str | None, num: int, seed: int, progress: Callable[[int], None]
) -> str:
    """The page of `num` samples, drawn by seed; with a run file, in its words and tokens."""
    shards = ShardFolder.open(folder)
    source = None if run is None else source_to_look_at(load_run_file(run), folder)
    task = plugins.load("task", shards.manifest.task)
    template = source.template if source else next(iter(task.templates.values()))
    chosen = sorted(epoch_order(len(shards), seed, epoch=0)[:num].tolist())
    samples, lengths = list[str](), list[int]()
    for done, index in enumerate(chosen, start=1):
        sample = shards.read(index)
        rendered = render(template, sample)
        counts = "" if source is None else _counts(source, index, lengths)
        samples.append(_card(sample, rendered, counts))
        progress(done)
    facts = [
        (f"{len(shards):,}", "samples in the folder"),
        (template.name, "template"),
        (template.mode, "how validation finds answers"),
    ]
    if lengths:
        mean, most = sum(lengths) / len(lengths), max(lengths)
        facts.append(
            (f"{mean:.0f}", f"tokens per sample on average, {most} at most, of those shown")
        )
    footer = f"{len(chosen)} of {len(shards)} samples of {folder}, drawn by seed {seed}"
    title = f"{shards.manifest.task}, {shards.manifest.split}"
    return page(title, [cards(facts), sheet(samples)], footer)


def _counts(source: Source, index: int, lengths: list[int]) -> str:
    """Tokens as the run's tokenizer makes them; `lengths` gets one more."""
    example = source.example(index)
    lengths.append(len(example.input_ids))
    answer = sum(label >= 0 for label in example.labels)
    return f"{lengths[-1]} tokens, loss on {answer}"


def _card(sample: Sample, rendered: Rendered, counts: str) -> str:
    texts = []
    elsewhere = sum(turn.images for turn in rendered.turns[1:])
    for number, turn in enumerate(rendered.turns):
        images = turn.images if number else len(sample.images) - elsewhere
        shown = f", {images} picture{'s' if images > 1 else ''} before it" if images else ""
        texts.append((f"{turn.role}{shown}", turn.text, ""))
    texts.append(("to be answered", rendered.target, "target"))
    if rendered.candidates:
        texts.append(("choices to rank", " | ".join(rendered.candidates), ""))
    if rendered.instruction not in (None, rendered.turns[-1].text):
        texts.append(("for the Q-Former", str(rendered.instruction), ""))
    return card(sample.id, open_images(sample), texts, counts)
