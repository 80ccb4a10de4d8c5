"""Pictures of published data sets, which lie where their archives put them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from mmtrain.tasks.interface import ImageBytes
from mmtrain.tasks.pictures import Unusable, encoded, locate


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
    for folder in folders[:-1]:
        try:
            return encoded(locate(name, folder))
        except Unusable:
            continue
    return encoded(locate(name, folders[-1]))
