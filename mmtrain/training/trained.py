"""Trained weights in files: a run's best checkpoint, or what it exported."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from mmtrain.assemble import Assembled
from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.main_rank import on_main
from mmtrain.peft.trainable import Trainable
from mmtrain.resolve import adapter_files, is_run_folder
from mmtrain.training import checkpoint as checkpoints
from mmtrain.training.checkpoint import WEIGHTS, CheckpointFolder
from mmtrain.training.run_folder import read_status
from mmtrain.training.tensor_file import Place, Places, Shapes, read_shapes

log = logging.getLogger("mmtrain")


def trained_files(folder: Path) -> list[Path]:
    """The weight files of a run folder (its best checkpoint, else its export) or of an export."""
    if is_run_folder(folder):
        exported = exported_files(folder / "adapter")
        if exported and not (folder / "checkpoints").is_dir():
            return exported  # a copy for others
        return [chosen_checkpoint(folder) / WEIGHTS]
    return exported_files(folder)


def exported_files(adapter: Path) -> list[Path]:
    """What a run exported: its adapters, and beside their folder what it trained in full."""
    return [*adapter_files(adapter), *sorted((adapter.parent / "full").glob("*.safetensors"))]


def chosen_checkpoint(run_dir: Path) -> Path:
    """The best intact checkpoint of a run, else the newest intact one."""
    folder = CheckpointFolder(run_dir, keep=1)
    best = read_status(run_dir).get("best_step")
    damage = None if best is None else checkpoints.find_damage(folder.path(best))
    if best is not None and damage is None:
        return folder.path(best)
    if damage is not None:
        log.warning(
            "the best checkpoint, step-%s, is not used: %s; trying the newest", best, damage
        )
    newest = folder.newest_good()
    if newest is None:
        raise CheckpointError(
            f"{run_dir}: no intact checkpoint.",
            "Train it first; evaluate and predict take --base for the base.",
        )
    return newest


def load_trained(assembled: Assembled, files: Sequence[Path], source: str) -> None:
    """Put them into what trains, on every rank; `source` names them where they do not fit."""
    parameters = assembled.trained_parameters()
    shapes, _ = checkpoints.tensor_shapes(parameters)
    found = on_main(lambda: trained_places(files, shapes, assembled.trainable, source))
    checkpoints.load_weights(found, parameters)


def trained_places(
    files: Sequence[Path], wanted: Shapes, trainable: Trainable, source: str
) -> Places:
    """Where the files have what trains; one error for all that they lack, or have otherwise."""
    exported: dict[str, str | None] = {}
    for attachment in trainable.attachments:
        # What is stored beside what trains is made again from seed and name.
        exported |= dict.fromkeys(attachment.exported(attachment.added.stored))
        exported |= attachment.exported(attachment.added.trained)
    places: dict[str, Place] = {}
    problems = []
    for path in files:
        for key, shape in read_shapes(path).items():
            name = exported.get(key, key)
            if name is None:
                continue
            if name not in wanted:
                problems.append(f"{name}: is there, but this run does not train it")
            elif shape != wanted[name]:
                there, here = "x".join(map(str, shape)), "x".join(map(str, wanted[name]))
                problems.append(f"{name}: is {there} there, {here} in this run")
            places[name] = Place(path, key, shape)
    problems += [f"{name}: is not there" for name in wanted if name not in places]
    if problems:
        raise ConfigError(problems, source)
    return {name: places[name] for name in wanted}
