"""mmtrain judge: what only a judge can score: a language model, people, or CLIP."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmtrain.commands.arguments import positive

if TYPE_CHECKING:
    from rich.table import Table

    from mmtrain.data.shards import ShardFolder
    from mmtrain.evaluation.judge import Asked, VerdictFile
    from mmtrain.evaluation.judged import Column, Judged
    from mmtrain.report.answers import Answers

HELP = "score stored answers by a judge: a language model, people, or CLIP"
_EXAMPLES = """examples:
  export MMTRAIN_JUDGE_URL=https://api.openai.com/v1 MMTRAIN_JUDGE_KEY=...
  mmtrain judge runs/lora --split mmhal-test --data shards/mmhal/test --model gpt-4o
  mmtrain judge runs/lora/evaluation/mmhal-test --data shards/mmhal/test --model gpt-4o \\
      --export questions.jsonl              asks nobody; then --import answers.jsonl
  mmtrain judge runs/lora runs/ia3 --split flickr30k-test --data shards/flickr30k/test \\
      --sheet sheet.csv                     people fill it in; then --labels sheet.csv
  mmtrain judge runs/lora --split flickr30k-test --data shards/flickr30k/test --clip clip-vit"""
_PER_PRICE = 1_000_000
_MOST_PROMPT_BYTES, _MOST_IMPORTED_BYTES = 2**20, 2**31


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders of predictions"
    )
    parser.add_argument("--split", default="val", help="folder in evaluation/ (default: val)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="shards that were answered")
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--model", metavar="NAME", help="ask this model at MMTRAIN_JUDGE_URL")
    ways.add_argument("--clip", type=Path, metavar="DIR", help="CLIP score by this model's folder")
    ways.add_argument(
        "--sheet", type=Path, metavar="FILE", help="write a CSV for people to fill in"
    )
    ways.add_argument("--labels", type=Path, metavar="FILE", help="read a filled-in sheet")
    parser.add_argument("--prompt", type=Path, metavar="FILE", help="with --model: words of yours")
    parser.add_argument(
        "--price",
        nargs=2,
        type=_price,
        metavar=("IN", "OUT"),
        help="with --model: of a million tokens read and written, to show the cost",
    )
    parser.add_argument(
        "--parallel", type=positive, default=4, metavar="N", help="with --model: questions at once"
    )
    offline = parser.add_mutually_exclusive_group()
    offline.add_argument("--export", type=Path, metavar="FILE", help="with --model: write, not ask")
    offline.add_argument(
        "--import",
        dest="imported",
        type=Path,
        metavar="FILE",
        help="with --model: read the answers",
    )
    parser.add_argument("--num", type=positive, metavar="N", help="with --sheet: so many samples")
    parser.add_argument(
        "--clip-prefix", default="", metavar="TEXT", help="with --clip: stands before every answer"
    )


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price < float("inf"):
        raise argparse.ArgumentTypeError(f"got '{text}'; give a price such as 2.5")
    return price


def run(args: argparse.Namespace) -> int:
    """Judge, keep the result beside what was judged, and print it."""
    from mmtrain.report.answers import read_answers

    _refuse_idle(args)
    answers = [read_answers(one, args.split) for one in args.runs]
    if args.sheet:
        return _write_sheet(args, answers)
    if args.export:
        return _export(args, answers)
    way = "labelled" if args.labels else "clip" if args.clip else "judged"
    judge: Callable[..., list[Judged]] = {"labelled": _people, "clip": _clip, "judged": _model}[way]
    _keep(answers, judge(args, answers), way)
    return 0


def _refuse_idle(args: argparse.Namespace) -> None:
    """An argument that would do nothing is a mistake."""
    from mmtrain.errors import MmtrainError

    of = {"model": ("prompt", "price", "export", "imported"), "sheet": ("num",)}
    of["clip"] = ("clip_prefix",)
    for way, names in of.items():
        idle = [name for name in names if getattr(args, name)]
        if idle and not getattr(args, way):
            name = idle[0].replace("imported", "import").replace("_", "-")
            raise MmtrainError(f"--{name} goes with --{way} only.", "Leave it out.")
    if args.data is None and not (args.labels or args.sheet):
        raise MmtrainError("--data is missing.", "Give the shard folder that was answered.")


def _shards(args: argparse.Namespace) -> ShardFolder:
    from mmtrain.data.shards import ShardFolder

    return ShardFolder.open(args.data)


# --- a language model -----------------------------------------------------------------------------


def _asked(args: argparse.Namespace, answers: Sequence[Answers]) -> list[list[Asked]]:
    from mmtrain.evaluation.judge import PROMPT, asked_of, checked_prompt
    from mmtrain.files import read_regular

    prompt = PROMPT
    if args.prompt:
        text = read_regular(args.prompt, _MOST_PROMPT_BYTES).decode("utf-8", "replace")
        prompt = checked_prompt(text, str(args.prompt))
    shards = _shards(args)
    return [asked_of(one.by_id.values(), shards, prompt) for one in answers]


def _export(args: argparse.Namespace, answers: Sequence[Answers]) -> int:
    """What has no verdict yet, of all runs in one file."""
    from mmtrain.evaluation.judge import exported, verdicts_in
    from mmtrain.files import replace_file

    missing: dict[str, Asked] = {}
    for one, asked in zip(answers, _asked(args, answers), strict=True):
        with verdicts_in(_place(one, "judged")) as verdicts:
            missing |= verdicts.missing(asked, args.model)
    replace_file(args.export, "".join(exported(missing, args.model)))
    print(f"wrote {len(missing)} questions to {args.export}")
    return 0


def _model(args: argparse.Namespace, answers: Sequence[Answers]) -> list[Judged]:
    from mmtrain.evaluation.judge import judged_by, verdicts_in

    complete = _import if args.imported else _ask
    judged = []
    for one, asked in zip(answers, _asked(args, answers), strict=True):
        with verdicts_in(_place(one, "judged")) as verdicts:
            num_missing = len(verdicts.missing(asked, args.model))
            complete(args, one, asked, verdicts)
            texts = {each.id: verdicts[each.key(args.model)].text for each in asked}
            _tell(args, f"{one.name}, {num_missing} new", asked, verdicts)
        judged.append(judged_by(asked, texts))
    return judged


def _import(
    args: argparse.Namespace, answers: Answers, asked: Sequence[Asked], verdicts: VerdictFile
) -> None:
    from mmtrain.errors import MmtrainError
    from mmtrain.evaluation.judge import imported
    from mmtrain.files import read_regular

    missing = verdicts.missing(asked, args.model)
    content = read_regular(args.imported, _MOST_IMPORTED_BYTES)
    for verdict in imported(content, args.imported):
        if missing.pop(verdict.key, None):
            verdicts.add(verdict)
    if missing:
        raise MmtrainError(
            f"{answers.name}: {len(missing)} of {len(asked)} answers have no verdict yet.",
            "Those that are there are kept; --export writes the others, for the same --model.",
        )


def _ask(
    args: argparse.Namespace, answers: Answers, asked: Sequence[Asked], verdicts: VerdictFile
) -> None:
    from functools import partial

    from mmtrain.evaluation.chat import endpoint_of
    from mmtrain.evaluation.judge import ask_for
    from mmtrain.training.progress import Progress

    missing = verdicts.missing(asked, args.model)
    if not missing:
        return
    ask = partial(endpoint_of().ask, args.model)
    with Progress(answers.name, len(missing), enabled=True) as progress:
        done: list[None] = []

        def count() -> None:
            done.append(None)
            progress.update(len(done))

        ask_for(missing, ask, verdicts, args.parallel, count)


def _tell(
    args: argparse.Namespace, label: str, asked: Sequence[Asked], verdicts: VerdictFile
) -> None:
    """What the verdicts took, those of earlier commands too, and what could not be read."""
    from mmtrain.evaluation.judge import rating

    found = {key: verdicts[key] for key in (one.key(args.model) for one in asked)}
    read = sum(one.prompt_tokens for one in found.values())
    written = sum(one.completion_tokens for one in found.values())
    line = f"{len(asked)} verdicts of {label}: {read:,} tokens read, {written:,} written"
    if args.price:
        cost = (read * args.price[0] + written * args.price[1]) / _PER_PRICE
        line += f", cost {cost:.4f}"
    print(line)
    if unread := sum(rating(one.text) is None for one in found.values()):
        print(f"{unread} of them without exactly one rating count as 0")


# --- people ---------------------------------------------------------------------------------------


def _write_sheet(args: argparse.Namespace, answers: Sequence[Answers]) -> int:
    from mmtrain.files import replace_file
    from mmtrain.report.answers import compare
    from mmtrain.report.labels import rows_of, sheet_csv, sheet_page

    rows = rows_of(compare(answers), args.num)
    if args.data:
        pictures = args.sheet.with_suffix(".html")
        replace_file(pictures, sheet_page(rows, _shards(args)))
        print(f"wrote {pictures}: the rows with their pictures")
    replace_file(args.sheet, sheet_csv(rows))
    print(f"wrote {args.sheet}: {len(rows)} answers; write yes or no into the last column")
    return 0


def _people(args: argparse.Namespace, answers: Sequence[Answers]) -> list[Judged]:
    from mmtrain.report.answers import compare
    from mmtrain.report.labels import labelled, read_labels

    return labelled(compare(answers), read_labels(args.labels))


# --- CLIP -----------------------------------------------------------------------------------------


def _clip(args: argparse.Namespace, answers: Sequence[Answers]) -> list[Judged]:
    from mmtrain.data.source import open_images
    from mmtrain.errors import MmtrainError
    from mmtrain.evaluation.clip_score import Clip, Pair, clip_judged
    from mmtrain.training.progress import Progress

    shards, clip = _shards(args), Clip(args.clip)

    def pairs(run: Answers) -> Iterator[Pair]:
        for name, one in run.by_id.items():
            images = open_images(shards.find(name))
            if not images:
                raise MmtrainError(f"{name} has no picture.", "CLIP scores need one.")
            yield name, args.clip_prefix + one.prediction, images

    judged = []
    for run in answers:
        with Progress(run.name, len(run.by_id), enabled=True) as progress:
            judged.append(clip_judged(clip, pairs(run), progress.update))
    return judged


# --- all ------------------------------------------------------------------------------------------


def _place(answers: Answers, way: str) -> Path:
    return answers.folder.with_name(f"{answers.folder.name}-{way}")


def _keep(answers: Sequence[Answers], judged: Sequence[Judged], way: str) -> None:
    from rich.console import Console

    from mmtrain.evaluation.judged import keep_judged

    for one, verdict in zip(answers, judged, strict=True):
        keep_judged(_place(one, way), one.by_id, verdict)
    Console().print(_table(answers, judged))
    for one, verdict in zip(answers, judged, strict=True):
        num = len(verdict.scores)
        print(f"{one.name}: {num} of {len(one.by_id)} answers, kept in {_place(one, way)}")


def _table(answers: Sequence[Answers], judged: Sequence[Judged]) -> Table:
    """Metrics down, runs across, each with its interval."""
    from rich.table import Table

    from mmtrain.evaluation.uncertainty import PERCENT
    from mmtrain.report.units import with_arrow

    columns = {column.metric.name: column.metric for one in judged for column in one.columns}
    table = Table(title=f"{PERCENT} % intervals")
    table.add_column("metric", no_wrap=True)
    for run in answers:
        table.add_column(run.name)
    for name, metric in columns.items():
        cells = []
        for one in judged:
            found = next((column for column in one.columns if column.metric == metric), None)
            cells.append("" if found is None else _cell(found))
        table.add_row(with_arrow(name, columns), *cells)
    return table


def _cell(column: Column) -> str:
    """`62.5 % (53.1 to 71.9)`: the unit once."""
    from mmtrain.report.units import value_text

    found, unit = column.interval, column.metric.unit
    low, high = (
        value_text(unit, one).removesuffix(unit).rstrip() for one in (found.low, found.high)
    )
    return f"{value_text(unit, column.value)} ({low} to {high})"
