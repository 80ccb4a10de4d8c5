"""Samples on a page, as a model will see them: pictures, prompt, answer, tokens."""

from __future__ import annotations

import base64
from collections.abc import Callable
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image

from mmtrain import plugins
from mmtrain.assemble import source_to_look_at
from mmtrain.config.load import load_run_file
from mmtrain.data.order import epoch_order
from mmtrain.data.shards import ShardFolder
from mmtrain.data.source import Source, open_images, render
from mmtrain.report.html import cards, page, section
from mmtrain.tasks.interface import Rendered, Sample

_THUMBNAIL_PIXELS = 320
_JPEG_QUALITY = 85
_STYLE = """<style>
main { max-width: 80rem; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1rem; }
.sheet section { margin: 0; } dl { margin: 0; }
.shown { display: flex; flex-wrap: wrap; gap: .6rem; margin-bottom: .8rem; }
.shown figure { margin: 0; } figcaption, .count { color: #6b6963; font-size: .8rem; }
dt { color: #6b6963; font-size: .8rem; margin-top: .5rem; }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
dd.target { color: #0b6e99; font-weight: 600; }
</style>"""


def contact_sheet(
    folder: Path, run: str | None, num: int, seed: int, progress: Callable[[int], None]
) -> str:
    """The page of `num` samples, drawn by seed; with a run file, in its words and tokens."""
    shards = ShardFolder.open(folder)
    source = None if run is None else source_to_look_at(load_run_file(run), str(folder))
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
    sheet = f'<div class="sheet">{"".join(samples)}</div>'
    title = f"{shards.manifest.task}, {shards.manifest.split}"
    return page(title, [_STYLE, cards(facts), sheet], footer)


def _counts(source: Source, index: int, lengths: list[int]) -> str:
    """Tokens as the run's tokenizer makes them; `lengths` gets one more."""
    example = source.example(index)
    lengths.append(len(example.input_ids))
    answer = sum(label >= 0 for label in example.labels)
    return f"{lengths[-1]} tokens, loss on {answer}"


def _card(sample: Sample, rendered: Rendered, counts: str) -> str:
    pictures = "".join(_figure(image) for image in open_images(sample))
    lines = []
    for number, turn in enumerate(rendered.turns):
        elsewhere = sum(other.images for other in rendered.turns[1:])
        images = turn.images if number else len(sample.images) - elsewhere
        shown = f", {images} picture{'s' if images > 1 else ''} before it" if images else ""
        lines.append(f"<dt>{escape(turn.role)}{shown}</dt><dd>{escape(turn.text)}</dd>")
    lines.append(f'<dt>to be answered</dt><dd class="target">{escape(rendered.target)}</dd>')
    if rendered.candidates:
        listed = escape(" | ".join(rendered.candidates))
        lines.append(f"<dt>choices to rank</dt><dd>{listed}</dd>")
    if rendered.instruction not in (None, rendered.turns[-1].text):
        lines.append(f"<dt>for the Q-Former</dt><dd>{escape(str(rendered.instruction))}</dd>")
    told = f'<div class="count">{escape(counts)}</div>' if counts else ""
    return section(sample.id, f'<div class="shown">{pictures}</div><dl>{"".join(lines)}</dl>{told}')


def _figure(image: Image.Image) -> str:
    size = f"{image.width} x {image.height}"
    image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    file = BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    caption = f"<figcaption>{size}</figcaption>"
    return f'<figure><img alt="picture" src="data:image/jpeg;base64,{data}">{caption}</figure>'
