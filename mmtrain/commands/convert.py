"""mmtrain convert: a checkpoint as its authors published it, as a standard Hugging Face folder.

The folder is written beside its place, read back, and takes its place only when the logits of two
samples, one with an image and one without, are those of the source.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.errors import CheckpointError, MmtrainError, nearest
from mmtrain.files import replaced_folder

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from mmtrain.models.interface import Batch, Family, ModelOptions

HELP = "write a checkpoint as a standard Hugging Face folder, with proof of equal logits"
EXAMPLES = """examples:
  mmtrain convert llava-v1.5-7b llava-1.5-7b-hf --vision-tower clip-vit-large-patch14-336
  mmtrain convert ShareGPT4V-7B sharegpt4v-7b-hf --vision-tower ShareGPT4V-tower --dtype fp32
"""
GIB = 2**30
_OTHER_FILES_BYTES = 64 * 2**20  # tokenizer, configuration, the index
# Largest difference of logits, as a share of the largest logit where that is above 1. Weights are
# the same bits: nothing but the head's matrix product may be rounded otherwise, where rows were
# added to it. In bf16 that is up to two units in the last place.
_ALLOWED_SHARE = {"fp32": 1e-5, "bf16": 2.0**-7}


@dataclass(frozen=True)
class Evidence:
    """What a model makes of the two samples."""

    batches: Sequence[Batch]
    logits: Sequence[torch.Tensor]  # of the answers' tokens, fp32, one per sample


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = EXAMPLES
    parser.add_argument("source", metavar="SRC", help="checkpoint folder")
    parser.add_argument("target", metavar="DST", help="folder to write")
    parser.add_argument("--family", metavar="NAME", help="default: by model_type in config.json")
    parser.add_argument(
        "--vision-tower", metavar="DIR", help="folder of the tower, where the checkpoint lacks it"
    )
    parser.add_argument(
        "--dtype",
        choices=sorted(_ALLOWED_SHARE),
        default="bf16",
        help="precision to write (default: bf16; fp32 keeps every bit of fp16 weights)",
    )


def run(args: argparse.Namespace) -> int:
    """Write, prove, put in place."""
    from mmtrain.distributed import quieten_libraries
    from mmtrain.models.interface import ModelOptions

    quieten_libraries()
    source, target = Path(args.source), Path(args.target)
    _refuse_filled(target)
    name, family = _family_of(source, args.family)
    options = ModelOptions(
        str(source),
        None,
        dtype=args.dtype,
        base_dropout="stored",
        vision_tower=args.vision_tower,
    )
    refuse_full_disk(_bytes_to_write(family, options), target)
    with replaced_folder(target) as folder:
        print(f"reading {source} as {name} in {args.dtype}", flush=True)
        wanted, model_class = _write(family, options, folder)
        print("written; reading it back", flush=True)
        difference = prove(family, wanted, folder, model_class, args.dtype)
        _refuse_filled(target)  # meanwhile
    print(f"largest difference of logits, with and without an image: {difference:.3g}")
    if not _is_of_transformers(model_class):
        print(f"transformers has no {model_class.__name__}: the folder is for mmtrain")
    print(f"wrote {target}")
    return 0


def _refuse_filled(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise MmtrainError(f"DST {target} is not empty.", "Choose another folder, or empty it.")


def _family_of(source: Path, chosen: str | None) -> tuple[str, Family]:
    """The family that reads such folders."""
    from mmtrain import plugins
    from mmtrain.models.configuration import readers
    from mmtrain.models.weights import read_json

    if chosen is not None:
        return chosen, plugins.load("family", chosen)
    if not source.is_dir():
        raise CheckpointError(f"SRC {source} is no folder.", "Correct the path.")
    found = read_json(source / "config.json").get("model_type")
    known = readers()
    if found not in known:
        raise CheckpointError(
            f"{source}: no family reads a '{found}' checkpoint; {nearest(str(found), known)}",
            "Name the family with --family, or correct config.json.",
        )
    return known[found], plugins.load("family", known[found])


def _bytes_to_write(family: Family, options: ModelOptions) -> int:
    """The size of the weights, counted on the meta device."""
    import torch

    from mmtrain.models.weights import DTYPES

    config = family.code.model_config(options)
    with torch.device("meta"):
        model = family.code.skeleton(config)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return numbers * DTYPES[options.dtype].itemsize + _OTHER_FILES_BYTES


def refuse_full_disk(wanted_bytes: int, target: Path) -> None:
    """Before hours of reading, not after."""
    there = next(path for path in target.absolute().parents if path.exists())
    free_bytes = shutil.disk_usage(there).free
    if free_bytes < wanted_bytes:
        raise MmtrainError(
            f"DST {target} takes about {wanted_bytes / GIB:.1f} GiB, {there} has"
            f" {free_bytes / GIB:.1f} GiB free.",
            "Free some space, choose another disk, or write --dtype bf16.",
        )


def _write(family: Family, options: ModelOptions, folder: Path) -> tuple[Evidence, type]:
    """Save the source in the folder; what it computes, and its class. It is not kept in memory."""
    loaded = family.code.load(options, None)
    wanted = _evidence(family, loaded.model, loaded.processor)
    family.code.save(loaded.model, loaded.processor, dict(loaded.model.named_parameters()), folder)
    return wanted, type(loaded.model)


def prove(family: Family, wanted: Evidence, folder: Path, model_class: type, dtype: str) -> float:
    """The largest difference between the source's logits and the folder's, read in two ways.

    One is the family's own; the other, for classes of transformers, is `from_pretrained`.
    """
    from mmtrain.models.interface import ModelOptions

    again = family.code.load(ModelOptions(str(folder), None, dtype=dtype), None)
    found = _evidence(family, again.model, again.processor)
    _refuse_other_samples(wanted, found)
    differences = [_checked_difference(wanted, found, dtype)]
    if _is_of_transformers(model_class):
        processor = again.processor
        del again  # one model at a time
        model = _by_transformers(model_class, folder, dtype)
        found = _evidence(family, model, processor)
        differences.append(_checked_difference(wanted, found, dtype))
    return max(differences)


def _is_of_transformers(model_class: type) -> bool:
    return model_class.__module__.startswith("transformers.")


def _evidence(family: Family, model: Any, processor: object) -> Evidence:
    """Logits of the answers' tokens, caught where the head computes them."""
    import torch

    from mmtrain.models.decoding import forward
    from mmtrain.models.encoding import encode
    from mmtrain.tasks.interface import Rendered, Turn

    device = next(model.parameters()).device
    head = model.get_output_embeddings()
    caught: list[torch.Tensor] = []
    handle = head.register_forward_hook(lambda *call: caught.append(call[-1].float().cpu()))
    rendered = Rendered((Turn("user", "What is to be seen here?"),), "A red field, then a blue one")
    batches = []
    for name, images in (("with an image", [_image()]), ("without", [])):
        example = encode(
            family, processor, name, rendered, images, family.default_max_length, "left"
        )
        batches.append(family.code.collate([example], processor))
        with torch.no_grad():
            forward(family, model, batches[-1].to(device))
    handle.remove()
    return Evidence(batches, caught)


def _image() -> Image:
    """Wide, with every colour running another way."""
    from PIL import Image as pillow

    down = pillow.linear_gradient("L")
    across = down.rotate(90)
    return pillow.merge("RGB", (down, across, down.rotate(180))).resize((96, 64))


def _refuse_other_samples(wanted: Evidence, found: Evidence) -> None:
    import torch

    for ours, theirs in zip(wanted.batches, found.batches, strict=True):
        for name, tensor in ours.tensors.items():
            if not torch.equal(tensor, theirs.tensors[name]):
                raise CheckpointError(
                    f"the written processor makes other {name} of the sample '{ours.ids[0]}'.",
                    "Nothing was kept. Check tokenizer and preprocessor files of the source.",
                )


def _checked_difference(wanted: Evidence, found: Evidence, dtype: str) -> float:
    """The largest difference; too large a one is an error. Rows that `save` added do not count."""
    differences, largest = [], 1.0
    for ours, theirs in zip(wanted.logits, found.logits, strict=True):
        differences.append(float((theirs[..., : ours.shape[-1]] - ours).abs().max()))
        largest = max(largest, float(ours.abs().max()))
    allowed = _ALLOWED_SHARE[dtype] * largest
    difference = max(differences)
    if not difference <= allowed:
        raise CheckpointError(
            f"the written folder computes other logits: they differ by {difference:.3g},"
            f" {allowed:.3g} is allowed in {dtype}.",
            "Nothing was kept. Check that the source is complete.",
        )
    return difference


def _by_transformers(model_class: Any, folder: Path, dtype: str) -> object:
    """The folder as anybody else loads it."""
    import torch

    from mmtrain.models.weights import DTYPES

    model, report = model_class.from_pretrained(
        str(folder), dtype=DTYPES[dtype], local_files_only=True, output_loading_info=True
    )
    misfits = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if misfits:
        raise CheckpointError(
            f"transformers does not read all of the written folder: {misfits}.",
            "Nothing was kept. Install the version of transformers in constraints.txt.",
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")
