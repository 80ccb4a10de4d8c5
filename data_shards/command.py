"""`mmtrain shards`: build shard folders from raw files, take in others', and verify them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from data_shards.build import build_split
from data_shards.index import take_inventory, write_manifest
from data_shards.progress import building, counting, measuring
from data_shards.publish import exclusive
from data_shards.push import push_folder
from data_shards.reading import Recipe
from data_shards.writer import DEFAULT_SAMPLES_PER_SHARD, EmptySplit
from mmtrain import plugins
from mmtrain.commands.arguments import folder_here, positive, share
from mmtrain.data.examine import num_cores
from mmtrain.data.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    read_manifest,
    shard_files,
)
from mmtrain.data.remote import Place, RemoteFolder, place_of_shards
from mmtrain.data.verify import shortened, verify_folder
from mmtrain.errors import ConfigError, DataError, nearest
from mmtrain.files import replace_file
from mmtrain.safe_text import presentable
from mmtrain.tasks.interface import Task

HELP = "build shards from raw files, index those of other programs, and verify them"
_EXAMPLES = """examples:
  mmtrain shards build digits --out shards/digits
  mmtrain shards build digits --out shards/shifted --set domain=shifted
  mmtrain shards build scienceqa --raw ~/ScienceQA --out shards/scienceqa --split train --split val
  mmtrain shards build jsonl --raw photos.jsonl --images photos --out shards/photos --val 5%
  mmtrain shards index /data/their-tars/train --task scienceqa
  mmtrain shards show shards/photos/train --run run.yaml
  mmtrain shards verify shards/digits
  mmtrain shards push shards/digits s3://bucket/digits
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mmtrain shards`."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(
        dest="shards_action", metavar="build|index|push|show|verify", required=True
    )
    _configure_build(
        actions.add_parser("build", help="write OUT/<split>/ for each split of a task")
    )
    index = actions.add_parser(
        "index", help="give a stock webdataset folder a manifest, so that it trains here"
    )
    index.add_argument("folder", type=Path, metavar="DIR", help="folder with the tars of one split")
    index.add_argument("--task", required=True, help=f"one of: {', '.join(plugins.names('task'))}")
    index.add_argument("--split", metavar="S", help="default: the folder's name")
    index.add_argument(
        "--overwrite", action="store_true", help="replace the manifest that is there"
    )
    _add_workers(index)
    push = actions.add_parser("push", help="send built shards to a store, for runs to read there")
    push.add_argument("folder", type=Path, metavar="DIR", help="folder of one split, or its parent")
    push.add_argument("url", metavar="URL", help="of any store that fsspec knows: s3://, gs://, …")
    push.add_argument("--overwrite", action="store_true", help="replace the shards that are there")
    _configure_show(
        actions.add_parser("show", help="write a page of samples as the model will see them")
    )
    verify = actions.add_parser("verify", help="check every byte and every sample")
    verify.add_argument(
        "folders", nargs="+", metavar="DIR", help="folder, its parent, or the URL of one split"
    )


def _configure_build(build: argparse.ArgumentParser) -> None:
    build.add_argument("task", help=f"one of: {', '.join(plugins.names('task'))}")
    build.add_argument("--raw", type=Path, help="folder with the files as downloaded, or one file")
    build.add_argument(
        "--images", metavar="DIR", help="folder that picture names start from (own data)"
    )
    build.add_argument(
        "--val", metavar="SHARE", help="share of the pictures that validate (own data; default 5%%)"
    )
    build.add_argument(
        "--drop",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="leave out up to this share of raw samples that cannot be built; default: none",
    )
    build.add_argument(
        "--out", type=folder_here, required=True, help="folder that gets one per split"
    )
    build.add_argument("--split", action="append", metavar="S", help="repeatable; default: all")
    build.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a build option of the task"
    )
    build.add_argument(
        "--samples-per-shard",
        type=positive,
        default=DEFAULT_SAMPLES_PER_SHARD,
        metavar="N",
        help="default %(default)s",
    )
    build.add_argument(
        "--limit", type=positive, metavar="N", help="keep N samples drawn at random by --seed"
    )
    build.add_argument(
        "--seed", type=int, default=0, metavar="N", help="keys --limit; default %(default)s"
    )
    build.add_argument(
        "--resize",
        type=positive,
        metavar="N",
        help="make pictures smaller until their shortest side has N pixels; default: as they are",
    )
    build.add_argument(
        "--overwrite", action="store_true", help="replace a folder built from something else"
    )
    _add_workers(build)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=positive,
        default=num_cores(),
        metavar="N",
        help="processes that look at samples; default: one per core",
    )


def _configure_show(show: argparse.ArgumentParser) -> None:
    show.add_argument("folder", metavar="DIR", help="folder of one split, or its URL")
    show.add_argument(
        "--run", metavar="RUN.yaml", help="its template, and tokens as its checkpoint counts them"
    )
    show.add_argument("--num", type=positive, default=24, metavar="N", help="default %(default)s")
    show.add_argument(
        "--seed", type=int, default=0, metavar="N", help="which samples; default %(default)s"
    )
    show.add_argument(
        "--out", type=Path, default=Path("samples.html"), metavar="FILE", help="default %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    """Run `mmtrain shards build`, `index`, `push`, `show` or `verify`."""
    actions = {
        "build": _build,
        "index": _index,
        "push": _push,
        "show": _show,
        "verify": _verify,
    }
    return actions[args.shards_action](args)


def _build(args: argparse.Namespace) -> int:
    task: Task = plugins.load("task", args.task)
    splits = _splits(args.task, task, args.split)
    own = {"image_folder": args.images, "val": args.val}
    given = [f"{key}={value}" for key, value in own.items() if value is not None]
    options = _options(args.task, task, [*args.set, *given])
    raw = _raw(args.task, task, args.raw)
    given_of_all = (args.limit, args.samples_per_shard, args.drop, args.resize)
    recipe = Recipe(args.task, "", raw, options, args.seed, *given_of_all)
    empty = []
    with exclusive(args.out):
        for split in splits:
            try:
                with building(f"{args.task} {split}") as progress:
                    part, folder = replace(recipe, split=split), args.out / split
                    built = build_split(part, folder, args.overwrite, progress, args.workers)
            except EmptySplit as fault:
                empty.append(fault)
                if args.split or len(empty) == len(splits):
                    raise
                print(f"{args.out / split}: the raw files have no such samples")
                continue
            how = "reused, nothing has changed" if built.reused else "written"
            print(_summary(built.folder, built.manifest, how))
            for line in built.left_out:
                print(f"  left out {presentable(line)}")
    return 0


def _summary(folder: Path, found: Manifest, how: str) -> str:
    size = f"{found.num_bytes / 2**20:.1f} MiB"
    return f"{folder}: {found.samples} samples, {len(found.shards)} shard(s), {size}, {how}"


def _splits(name: str, task: Task, asked: list[str] | None) -> list[str]:
    for split in asked or []:
        if split not in task.splits:
            raise DataError(f"task '{name}' has no split '{split}';", nearest(split, task.splits))
    return list(dict.fromkeys(asked or task.splits))


def _raw(name: str, task: Task, raw: Path | None) -> Path | None:
    if not task.needs_raw:
        if raw is not None:
            raise DataError(f"task '{name}' brings its own files;", "leave --raw out.")
        return None
    if raw is None:
        raise DataError(f"task '{name}' needs the downloaded files;", "give their folder as --raw.")
    if not raw.exists():
        raise DataError(f"there is no --raw '{raw}';", "give the folder of the download.")
    return raw


def _options(name: str, task: Task, settings: list[str]) -> BaseModel:
    """The task's own options, every wrong setting reported at once."""
    valid = task.build_options.model_fields
    values: dict[str, str] = {}
    problems = []
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            problems.append(f"'{setting}' is not of the form key=value")
        elif key not in valid:
            problems.append(f"unknown option '{key}'; {nearest(key, valid)}")
        values[key] = value
    try:
        options = task.build_options.model_validate(
            {key: value for key, value in values.items() if key in valid}
        )
    except ValidationError as fault:
        problems += [f"{error['loc'][0]}: {error['msg']}" for error in fault.errors()]
    if problems:
        raise ConfigError(problems, source=f"build options of task '{name}'")
    return options


# --- index --------------------------------------------------------------------------------------


def _index(args: argparse.Namespace) -> int:
    folder, task = args.folder, plugins.load("task", args.task)
    if not folder.is_dir() or not shard_files(folder):
        raise DataError(
            f"'{folder}' holds no .tar;", "give the folder with the unpacked .tar files."
        )
    split = args.split or folder.resolve().name
    if split not in task.splits:
        splits = ", ".join(task.splits)
        raise DataError(f"task '{args.task}' has no split '{split}';", f"give --split: {splits}.")
    with exclusive(folder):
        if (folder / MANIFEST_NAME).exists() and not args.overwrite:
            raise DataError(
                f"'{folder}' has a manifest;", "verify it, or pass --overwrite to write another."
            )
        with measuring(f"index {folder}") as advance:
            inventory = take_inventory(folder, args.task, advance, args.workers)
        if inventory.problems:
            return _failed(shortened(list(inventory.problems)))
        print(_summary(folder, write_manifest(folder, inventory, args.task, split), "indexed"))
    return 0


def _push(args: argparse.Namespace) -> int:
    target = place_of_shards(args.url)
    if isinstance(target, Path):
        raise DataError(f"'{args.url}' is a folder here;", "copy it there, or give a URL.")
    for folder in _shard_folders(args.folder):
        alone = folder == args.folder
        there = target if alone else RemoteFolder(target / folder.name)
        with measuring(f"push {folder}") as advance:
            manifest, reused = push_folder(folder, there, args.overwrite, advance)
        how = f"is at {there} already" if reused else f"sent to {there}"
        print(_summary(folder, manifest, how))
    return 0


def _show(args: argparse.Namespace) -> int:
    # Imported here: with a run file it loads tokenizers, which no other action needs.
    from data_shards.show import contact_sheet

    with counting(f"show {args.folder}") as count:
        text = contact_sheet(args.folder, args.run, args.num, args.seed, count)
    replace_file(args.out, text)
    print(f"wrote {args.out}: open it in a browser")
    return 0


# --- verify -------------------------------------------------------------------------------------


def _verify(args: argparse.Namespace) -> int:
    folders = [found for text in args.folders for found in _folders_at(text)]
    table = Table("folder", "task", "split", "samples", "shards", "MiB", "result")
    table.columns[0].overflow = "fold"  # a path cut short names nothing
    problems = []
    for folder in folders:
        with measuring(f"verify {folder}") as advance:
            found = verify_folder(folder, advance)
        problems += found
        result = f"{len(found)} problem{'s' if len(found) > 1 else ''}" if found else "ok"
        table.add_row(str(folder), *_described(folder), result)
    Console().print(table)
    return _failed(problems) if problems else 0


def _failed(problems: list[str]) -> int:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return DataError.exit_code


def _folders_at(text: str) -> Sequence[Place]:
    place = place_of_shards(text)
    return [place] if isinstance(place, RemoteFolder) else _shard_folders(place)


def _shard_folders(folder: Path) -> list[Path]:
    """The folder itself, or the shard folders directly inside it."""
    if not folder.is_dir():
        raise DataError(f"there is no folder '{folder}';", "build it with `mmtrain shards build`.")
    if _looks_like_shards(folder):
        return [folder]
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    found = [path for path in inside if _looks_like_shards(path)]
    if not found:
        raise DataError(
            f"'{folder}' holds no shards;", "give a folder made by `mmtrain shards build`."
        )
    return found


def _looks_like_shards(folder: Path) -> bool:
    # Not the manifest alone: a folder that lost it must be reported, not passed over.
    named = any((folder / name).exists() for name in (MANIFEST_NAME, INDEX_NAME))
    return named or bool(shard_files(folder))


def _described(folder: Place) -> list[str]:
    try:
        manifest, _ = read_manifest(folder)
    except DataError:
        return ["?"] * 5  # verify_folder has reported why
    mebibytes = f"{manifest.num_bytes / 2**20:.1f}"
    counts = [str(manifest.samples), str(len(manifest.shards)), mebibytes]
    return [manifest.task, manifest.split, *counts]
