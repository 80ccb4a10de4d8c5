"""VL-RewardBench: 1,250 queries about pictures, each with two responses that people compared.

Raw: the parquet file of `MMInstruction/VL-RewardBench`, or its folder. The query is asked, and the
response that people preferred is the target. A fifth of the rows, 250, validates, drawn by a hash
of their ids that --set split_seed=N keys; a picture may be in both parts.

The paper prints no prompt, so `alghamdi2025` asks the query as it stands, as `plain` does. ROUGE is
the mean F1 over samples, BLEU that of the set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mmtrain.errors import DataError
from mmtrain.tasks.interface import Dropped, Metric, Rendered, Sample, Template
from mmtrain.tasks.metrics import mean
from mmtrain.tasks.overlap import BLEU, ROUGE, bleu, mean_of, rouge
from mmtrain.tasks.own_data import Names
from mmtrain.tasks.parquet_rows import parquet_rows
from mmtrain.tasks.pictures import Unusable, encoded
from mmtrain.tasks.templates import plain
from mmtrain.tasks.words import ptb_words

ROUGE_L = ROUGE[-1]
_VAL_SHARE = 0.2


class RewardOptions(BaseModel):
    """Options of `mmtrain shards build vl_rewardbench --set key=value`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split_seed: int = Field(0, description="keys which fifth of the rows validates")


def alghamdi2025(sample: Sample) -> Rendered:
    """The query alone, answered by the preferred response."""
    return plain(sample)


class VlRewardBench:
    """The VL-RewardBench task."""

    description = "1,250 queries about pictures, answered by the response that people preferred"
    splits: tuple[str, ...] = ("train", "val")
    build_options: type[BaseModel] = RewardOptions
    needs_raw = True
    templates: Mapping[str, Template] = {
        "alghamdi2025": Template(alghamdi2025),
        "plain": Template(plain),
    }
    metrics: tuple[Metric, ...] = (*ROUGE, *BLEU)
    primary_metric = ROUGE_L

    def read(
        self, raw: Path | None, split: str, options: RewardOptions
    ) -> Iterator[Sample | Dropped]:
        """The rows of a split in the order of the file."""
        assert raw is not None, "needs_raw is True"
        files = [raw] if raw.is_file() else sorted(raw.rglob("*.parquet"))
        if not files:
            raise DataError(f"'{raw}' holds no parquet file;", "give the file as --raw.")
        names = _names(files)
        validating = _validating(names, options.split_seed)
        rows = (row for file in files for _, row in parquet_rows(file))
        for name, row in zip(names, rows, strict=True):
            if (name in validating) != (split == "val"):
                continue
            try:
                yield _sample(name, row)
            except Unusable as fault:
                yield fault.dropped(name)

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """How much of the wanted response is said; each sample's score is its `rouge_l`."""
        said = [ptb_words(one) for one in predictions]
        wanted = [[ptb_words(template(sample).target)] for sample in samples]
        each = [rouge(*pair) for pair in zip(said, wanted, strict=True)]
        scores = [one[ROUGE_L.name] for one in each]
        metrics = {ROUGE_L.name: mean(scores, ROUGE_L.name)}
        return metrics | mean_of(each) | bleu(said, wanted), scores


def _names(files: Sequence[Path]) -> list[str]:
    """The ids of all rows; one that is there already gets a number."""
    given, names = Names(), []
    for file in files:
        for place, row in parquet_rows(file):
            names.append(given.free(str(row.get("id") or place)))
    return names


def _validating(names: Sequence[str], seed: int) -> frozenset[str]:
    def drawn(name: str) -> bytes:
        return sha256(f"{seed}/{name}".encode("utf-8", "surrogatepass")).digest()

    return frozenset(sorted(names, key=drawn)[: round(len(names) * _VAL_SHARE)])


def _sample(name: str, row: Mapping[str, Any]) -> Sample:
    query, responses, ranking = (row.get(key) for key in ("query", "response", "human_ranking"))
    if not isinstance(query, str) or not isinstance(responses, list) or len(responses) != 2:
        raise Unusable("it lacks a query or two responses", "Download the file again.")
    if ranking not in ([0, 1], [1, 0]):
        raise Unusable("its human_ranking prefers neither response", "Leave it out.", str(ranking))
    preferred, other = (responses[ranking.index(place)] for place in (0, 1))
    if not isinstance(preferred, str) or not preferred.strip():
        raise Unusable("the response that people preferred is empty", "Leave it out.")
    image = row.get("image")
    data = image.get("bytes") if isinstance(image, Mapping) else image
    if not isinstance(data, bytes):
        raise Unusable("it has no picture", "Download the file again.")
    meta = {"rejected": str(other)}
    return Sample(name, (encoded(data),), question=query, answers=(preferred,), meta=meta)


TASK = VlRewardBench()
