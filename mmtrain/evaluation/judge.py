"""A language model as judge of free answers, as MMHAL-Bench has it.

The judge sees no picture but a list of what is in it, the question, a person's answer and the
model's. Its verdicts are kept one by one as they come: a repeat asks only for what is missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO

from pydantic import TypeAdapter, ValidationError

from mmtrain.data.shards import ShardFolder
from mmtrain.errors import DataError, MmtrainError, nearest
from mmtrain.evaluation.chat import Reply, read_reply, request_body
from mmtrain.evaluation.evaluate import Prediction
from mmtrain.evaluation.judged import HALLUCINATION_RATE, Column, Judged
from mmtrain.files import lock, read_regular
from mmtrain.tasks.interface import Metric, Sample
from mmtrain.tasks.templates import filled, placeholders

VERDICTS = "verdicts.jsonl"
JUDGE_SCORE = Metric("judge_score", larger_is_better=True, unit="points")
_HIGHEST = 6
_HALLUCINATED_BELOW = 3
_MOST_BYTES = 2**30
_PATH = "/v1/chat/completions"

# Structure and scale are MMHAL-Bench's; words are ours, and it shows no worked examples.
PROMPT = """\
You are a strict and fair judge. A multimodal model was asked a question about a picture. Judge its
response by two things: how informative it is as an answer to the question, and whether it
hallucinates. To hallucinate is to state something about the picture that its contents, or the
answer that a person gave, do not bear out or contradict. You do not see the picture. What is in it
is listed below; the list names objects and may lack some, so rely on the person's answer, too.
Additional facts that are true of the world and fit the picture are no hallucination. A response
that rightly says that the question assumes something false is informative.

Rate the response on this scale:
6: very informative, with good reasoning or detail, no hallucination
5: very informative, no hallucination
4: somewhat informative, no hallucination
3: not informative, no hallucination
2: very informative, with hallucination
1: somewhat informative, with hallucination
0: not informative, with hallucination

First explain your judgement in a few sentences. Then end with one line of the form
Rating: N
where N is the number, and write the word rating nowhere else.

### Image Contents
{image_contents}

### Question
{question}

### Standard Human-Generated Answer
{reference}

### LMM Response to Evaluate
{response}
"""
_PLACES = ("image_contents", "question", "reference", "response")
_NEEDED = {"question", "response"}


@dataclass(frozen=True)
class Asked:
    """What the judge is asked about one prediction. `kind`: the type of its question, if any."""

    id: str
    prompt: str
    kind: str

    def key(self, model: str) -> str:
        """What names a verdict: the judge and every word that it is asked."""
        return sha256(f"{model}\0{self.prompt}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class Verdict:
    """One line of verdicts.jsonl."""

    key: str
    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


_LINE = TypeAdapter(Verdict)


def checked_prompt(text: str, source: str) -> str:
    """A judge's prompt of one's own, whose names in braces are known."""
    try:
        names = placeholders(text)
    except ValueError as fault:
        raise MmtrainError(f"{source}: {fault}.") from fault
    unknown = [name for name in names if name not in _PLACES]
    if unknown:
        hint = nearest(unknown[0], _PLACES)
        raise MmtrainError(f"{source}: nobody knows {{{unknown[0]}}};", hint)
    missing = sorted(_NEEDED - set(names))
    if missing:
        raise MmtrainError(f"{source}: lacks {{{missing[0]}}}.", "Put it where it belongs.")
    return text


def asked_of(
    predictions: Iterable[Prediction], shards: ShardFolder, prompt: str = PROMPT
) -> list[Asked]:
    """What the judge is asked about each prediction; the shards say what is in the picture."""
    needs_contents = "image_contents" in placeholders(prompt)
    asked = []
    for one in predictions:
        sample = shards.find(one.id)
        known = {
            "image_contents": _contents(sample) if needs_contents else "",
            "question": one.prompt,
            "reference": one.target,
            "response": one.prediction,
        }
        asked.append(
            Asked(one.id, filled(prompt, known), str(sample.meta.get("question_type", "")))
        )
    return asked


def _contents(sample: Sample) -> str:
    contents = sample.meta.get("image_content")
    if not isinstance(contents, str):
        raise DataError(
            f"sample {sample.id!r} does not say what is in its picture (image_content);",
            "judge MMHAL-Bench, data of your own with such a column, or give --prompt a text that"
            " does without {image_contents}.",
        )
    return contents


def rating(text: str) -> int | None:
    """The published rule: the only number of the scale behind `rating:`; of none or several, no."""
    said = text.lower()
    found = [number for number in range(_HIGHEST + 1) if f"rating: {number}" in said]
    return found[0] if len(found) == 1 else None


def judged_by(asked: Sequence[Asked], texts: Mapping[str, str]) -> Judged:
    """Scores of the verdicts by sample; a verdict that cannot be read counts as the lowest."""
    scores = {one.id: float(rating(texts[one.id]) or 0) for one in asked}
    by_kind: dict[str, list[float]] = {}
    for one in asked:
        if one.kind:
            by_kind.setdefault(one.kind, []).append(scores[one.id])
    every = tuple(scores.values())
    rates = tuple(float(score < _HALLUCINATED_BELOW) for score in every)
    columns = [Column(JUDGE_SCORE, every), Column(HALLUCINATION_RATE, rates)]
    for kind, values in by_kind.items():
        metric = Metric(f"{JUDGE_SCORE.name}_{kind}", larger_is_better=True, unit=JUDGE_SCORE.unit)
        columns.append(Column(metric, tuple(values)))
    return Judged(tuple(columns), scores)


class VerdictFile:
    """Verdicts by key, on the disk as soon as they are known."""

    def __init__(self, file: IO[bytes], known: dict[str, Verdict]) -> None:
        self._file, self._known = file, known

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Verdict:
        return self._known[key]

    def missing(self, asked: Iterable[Asked], model: str) -> dict[str, Asked]:
        """By key, what has no verdict yet; the same question twice is one."""
        by_key = {one.key(model): one for one in asked}
        return {key: one for key, one in by_key.items() if key not in self}

    def add(self, verdict: Verdict) -> None:
        """Keep one for ever."""
        self._file.write(json.dumps(asdict(verdict)).encode() + b"\n")
        self._file.flush()
        self._known[verdict.key] = verdict


@contextmanager
def verdicts_in(folder: Path) -> Iterator[VerdictFile]:
    """The verdicts of a folder, for one process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / VERDICTS
    with path.open("ab") as file:
        if not lock(file):
            raise MmtrainError(f"{folder}: another process judges it.", "Wait until it has ended.")
        content = read_regular(path, _MOST_BYTES)
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # a kill cut the last line: it is asked again
            os.truncate(path, len(whole))
        yield VerdictFile(file, {one.key: one for one in _read(whole, path)})


def _read(content: bytes, path: Path) -> Iterator[Verdict]:
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            yield _LINE.validate_python(json.loads(line))
        except (ValueError, ValidationError) as fault:
            raise DataError(
                f"'{path}', line {number}: no verdict;", "remove the line, and it is asked again."
            ) from fault


def ask_for(
    missing: Mapping[str, Asked],
    ask: Callable[[str], Reply],
    verdicts: VerdictFile,
    parallel: int,
    on_verdict: Callable[[], None],
) -> None:
    """So many questions at a time; after a fault, what is under way is still kept."""

    def keep(future: Future[Reply], key: str) -> None:
        if key not in verdicts:
            verdicts.add(Verdict(key, **asdict(future.result())))
            on_verdict()

    with ThreadPoolExecutor(parallel) as pool:
        pending = {pool.submit(ask, one.prompt): key for key, one in missing.items()}
        try:
            for future in as_completed(pending):
                keep(future, pending[future])
        finally:  # after a fault or Ctrl-C nothing more is asked; what is under way is paid for
            pool.shutdown(wait=True, cancel_futures=True)
            for future, key in pending.items():
                if not future.cancelled() and future.exception() is None:
                    keep(future, key)


def exported(missing: Mapping[str, Asked], model: str) -> Iterator[str]:
    """Lines of a batch file: OpenAI's batches and `vllm run-batch` answer such files."""
    for key, one in missing.items():
        body = request_body(model, one.prompt)
        line = {"custom_id": key, "method": "POST", "url": _PATH, "body": body}
        yield json.dumps(line) + "\n"


def imported(content: bytes, path: Path) -> Iterator[Verdict]:
    """Verdicts of a batch's results, less what failed, or of lines with custom_id and text."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            key, text = row["custom_id"], row.get("text")
            if isinstance(text, str):
                yield Verdict(key, text)
            elif (row.get("response") or {}).get("status_code") == 200:
                yield Verdict(key, **asdict(read_reply(row["response"]["body"])))
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as fault:
            raise DataError(
                f"'{path}', line {number}: no judgement ({type(fault).__name__}: {fault});",
                "give the results of a batch, or lines with custom_id and text.",
            ) from fault
