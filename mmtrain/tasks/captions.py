"""Captions of pictures: reading, asking and scoring that several data sets share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mmtrain.tasks.cider import cider, cider_d
from mmtrain.tasks.interface import Dropped, Metric, Rendered, Sample, Template, Turn
from mmtrain.tasks.metrics import mean
from mmtrain.tasks.overlap import BLEU, ROUGE, bleu, mean_of, rouge
from mmtrain.tasks.pictures import Unusable
from mmtrain.tasks.published import PictureOptions, picture
from mmtrain.tasks.vqa_templates import SIGNS
from mmtrain.tasks.words import ptb_words, spaced_words

CIDER = Metric("cider", larger_is_better=True)
CIDER_D = Metric("cider_d", larger_is_better=True)
CIDER_UNCLIPPED = Metric("cider_unclipped", larger_is_better=True)
METRICS = (CIDER, CIDER_D, CIDER_UNCLIPPED, *BLEU, *ROUGE)

PROMPTS = (
    "Share a concise interpretation of the image provided.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Offer a succinct explanation of the picture presented.",
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Create a compact narrative representing the image presented.",
    "Relay a brief, clear account of the picture shown.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
)
_LONGEST_WORDS = 50


class CaptionOptions(PictureOptions):
    """Build options of caption data sets."""

    rows: Literal["captions", "pictures"] = Field(
        "captions",
        description="train: a sample for each caption, or for each picture with its first one",
    )


@dataclass(frozen=True)
class Captioned:
    """A raw row: a picture by its file's name, and what people say of it."""

    id: str
    picture: str
    captions: tuple[str, ...]


def captioned(sample_id: Any, file_name: Any, captions: Any) -> Captioned | Dropped:
    """A row as a file gives it, if it is one; folders before the picture's name do not count."""
    texts = tuple(one for one in captions if not isinstance(one, str) or one.strip())
    if not isinstance(file_name, str) or not file_name or not texts:
        missing = Unusable("it has no picture or no caption", "Download the file again.")
        return missing.dropped(str(sample_id))
    if not all(isinstance(one, str) for one in texts):
        return Unusable("a caption is no text", "Download the file again.").dropped(str(sample_id))
    return Captioned(str(sample_id), Path(file_name).name, texts)


def samples(
    rows: Iterable[Captioned | Dropped], folders: Sequence[Path], split: str, rows_of: str
) -> Iterator[Sample | Dropped]:
    """A sample for each caption of `train`, else one for each picture; all captions are answers."""
    for row in rows:
        if isinstance(row, Dropped):
            yield row
            continue
        try:
            images = (picture(row.picture, folders),)
        except Unusable as fault:
            yield fault.dropped(row.id)
            continue
        if split != "train" or rows_of == "pictures":
            yield Sample(row.id, images, answers=row.captions)
            continue
        for number, caption in enumerate(row.captions):
            others = row.captions[:number] + row.captions[number + 1 :]
            yield Sample(f"{row.id}-{number + 1}", images, answers=(caption, *others))


# --- templates ----------------------------------------------------------------------------------


def zhou2024(sample: Sample) -> Rendered:
    """One of ten prompts, drawn by the sample's id (Zhou et al. 2024); the caption as it is."""
    digest = sha256(sample.id.encode("utf-8", "surrogatepass")).digest()
    prompt = PROMPTS[int.from_bytes(digest[:8], "big") % len(PROMPTS)]
    return Rendered((Turn("user", prompt),), sample.answers[0])


def plain(sample: Sample) -> Rendered:
    """One short prompt for all; the caption as it is."""
    return Rendered((Turn("user", "Describe the image."),), sample.answers[0])


def cleaned(caption: str) -> str:
    """As InstructBLIP's processor has captions: lower case, without nine signs, 50 words."""
    return " ".join(SIGNS.sub(" ", caption.lower()).split()[:_LONGEST_WORDS])


def wang2024_with(prompt: str) -> Template:
    """The template of Wang et al. 2024, which has a prompt for each data set."""

    def wang2024(sample: Sample) -> Rendered:
        """The data set's own prompt; the caption cleaned (Wang et al. 2024)."""
        return Rendered((Turn("user", prompt),), cleaned(sample.answers[0]))

    return Template(wang2024)


def templates(wang2024_prompt: str) -> Mapping[str, Template]:
    """The ways to ask for a caption."""
    return {
        "zhou2024": Template(zhou2024),
        "wang2024": wang2024_with(wang2024_prompt),
        "plain": Template(plain),
    }


# --- scores -------------------------------------------------------------------------------------


def score(
    given: Sequence[Sample], predictions: Sequence[str], template: Template
) -> tuple[dict[str, float], list[float]]:
    """All caption metrics over the set; each sample's score is its `cider`."""
    references = [_references(sample, template) for sample in given]
    words, of_people = _cut(ptb_words, predictions, references)
    each = cider_d(words, of_people)
    metrics = {CIDER.name: mean(each, CIDER.name)}
    metrics[CIDER_D.name] = mean(cider_d(*_cut(spaced_words, predictions, references)))
    metrics[CIDER_UNCLIPPED.name] = mean(cider(words, of_people))
    metrics |= bleu(words, of_people)
    metrics |= mean_of([rouge(*pair) for pair in zip(words, of_people, strict=True)])
    return metrics, each


def _references(sample: Sample, template: Template) -> tuple[str, ...]:
    """What people say, as the template writes it: what it wants, for the first of them."""
    wanted, others = template(sample).target, sample.answers[1:]
    if template.name == "wang2024":
        others = tuple(cleaned(one) for one in others)
    return (wanted, *others)


def _cut(
    cut: Callable[[str], list[str]],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
) -> tuple[list[list[str]], list[list[list[str]]]]:
    return (
        [cut(one) for one in predictions],
        [[cut(one) for one in of_picture] for of_picture in references],
    )
