"""Pictures of published data sets, which lie where their archives put them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from mmtrain.tasks.interface import ImageBytes
from mmtrain.tasks.pictures import encoded, locate


class PictureOptions(BaseModel):
    """Build options of data sets whose pictures are files of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Not part of the manifest: shards are the same wherever the pictures lay.
    image_folder: Path | None = Field(
        None,
        exclude=True,
        description="folder of the pictures, if not below --raw; --images says the same",
    )


def picture(name: str, folders: Sequence[Path]) -> ImageBytes:
    """A picture from the first folder that has it; `Unusable` where none does."""
    with_it = (folder for folder in folders if (folder / name).is_file())
    return encoded(locate(name, next(with_it, folders[0])))
