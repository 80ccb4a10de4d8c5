"""mmtrain predict: one answer to one question about an image."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

HELP = "answer one question with a trained run"
_EXAMPLES = """examples:
  mmtrain predict runs/r64 --image cat.jpg "What is on the sofa?"
  mmtrain predict runs/r64 "Which is the largest planet?"          no image"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", help="run folder, or run file")
    parser.add_argument("question", help="the question, as the model should read it")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="image file")
    parser.add_argument("--base", action="store_true", help="the base model, nothing trained")


def run(args: argparse.Namespace) -> int:
    """Answer and print."""
    from mmtrain import distributed
    from mmtrain.models.encoding import encode
    from mmtrain.tasks.interface import Rendered, Turn
    from mmtrain.training.inference import ready_from_argument

    images = [_image(Path(name)) for name in args.image]
    ready = ready_from_argument(args.run, ["parallel.deepspeed=zero1"], args.base)
    rendered = Rendered((Turn("user", args.question),), target="")
    data = ready.config.data
    family = ready.assembled.family
    example = encode(
        family,
        ready.assembled.processor,
        "question",
        rendered,
        images,
        (data.max_length if data else None) or family.default_max_length,
        data.truncation_side if data else "left",
    )
    print(ready.engine.generate([example], ready.config.generation)[0])
    distributed.shut_down()
    return 0


def _image(path: Path) -> Image:
    from mmtrain.data.codec import MAX_PIXELS, decode_image
    from mmtrain.errors import DataError

    try:
        if not path.is_file():  # a device or a pipe may have no end
            raise DataError(f"--image {path}: there is no such file.", "Correct the path.")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"--image {path}: {error.strerror}.", "Correct the path.") from error
    try:
        return decode_image(data, path.name)
    except DataError as error:
        raise DataError(
            f"--image {path}: no image that can be read here.",
            f"Give an intact JPEG, PNG or WebP file of at most {MAX_PIXELS:,} pixels.",
        ) from error
