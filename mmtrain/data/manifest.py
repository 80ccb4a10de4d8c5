"""What a shard folder says about itself: `manifest.json` and `index.npy`.

The manifest pins the sha256 of every shard and of the index, and the index pins every sample, so
the sha256 of the manifest alone names the data of a run.
"""

from __future__ import annotations

import json
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmtrain.data.codec import BLOCK_BYTES, DIGEST_BYTES
from mmtrain.errors import DataError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
SHARD_GLOB = "shard-*.tar"

# One row per sample, in the order of the samples. A record is all tar bytes of one sample.
INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("characters", "<u4"),
        ("image_digest", "u1", (DIGEST_BYTES,)),  # zero for a sample without a picture
        ("record_digest", "u1", (DIGEST_BYTES,)),
    ]
)

_SHA256 = r"^[0-9a-f]{64}$"
_BUILD_AGAIN = "copy the folder again, or build it with `mmtrain shards build`."


class ShardInfo(BaseModel):
    """One shard as it was when it was finished."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # The pattern also keeps a manifest from naming files elsewhere.
    name: str = Field(pattern=r"^shard-\d{6}\.tar$")
    samples: int = Field(ge=1)
    members: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=_SHA256)


class Manifest(BaseModel):
    """The content of `manifest.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    task: str
    split: str
    seed: int = Field(description="keys which samples `limit` keeps")
    limit: int | None = Field(description="samples drawn from the split; null keeps all")
    build_options: dict[str, Any] = Field(description="the task's own options")
    samples: int = Field(ge=1)
    shards: tuple[ShardInfo, ...]
    index_sha256: str = Field(pattern=_SHA256)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards together."""
        return sum(shard.bytes for shard in self.shards)

    def to_json(self) -> str:
        """The text of `manifest.json`: the same bytes for the same content."""
        return json.dumps(self.model_dump(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def shard_name(number: int) -> str:
    """File name of the shard with that number."""
    return f"shard-{number:06d}.tar"


def sample_name(index: int) -> str:
    """The key of a sample's members: its place, so that a misplaced sample is noticed."""
    return f"{index:09d}"


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest of a shard folder and its sha256."""
    if not folder.is_dir():
        raise DataError(
            f"there is no shard folder '{folder}';", "build it with `mmtrain shards build`."
        )
    try:
        data = (folder / MANIFEST_NAME).read_bytes()
    except OSError as fault:
        raise DataError(
            f"'{folder}' has no readable {MANIFEST_NAME} ({fault.strerror});",
            f"without it lost data cannot be noticed: {_BUILD_AGAIN}",
        ) from fault
    return _parse_manifest(data, folder / MANIFEST_NAME), sha256(data).hexdigest()


def _parse_manifest(data: bytes, path: Path) -> Manifest:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as fault:
        raise DataError(f"'{path}' is not valid JSON: {fault};", _BUILD_AGAIN) from fault
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"'{path}' has format_version {version!r}, this mmtrain reads {FORMAT_VERSION};",
            "build the shards again, or use the mmtrain that wrote them.",
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"'{path}': {where}: {first['msg']};", _BUILD_AGAIN) from fault
    if [shard.name for shard in manifest.shards] != [
        shard_name(number) for number in range(len(manifest.shards))
    ] or sum(shard.samples for shard in manifest.shards) != manifest.samples:
        raise DataError(f"'{path}' contradicts itself in its list of shards;", _BUILD_AGAIN)
    return manifest


def surplus_shards(folder: Path, manifest: Manifest) -> list[str]:
    """Shard files that the manifest does not know: stock readers with a glob would read them."""
    known = {shard.name for shard in manifest.shards}
    return sorted(path.name for path in folder.glob(SHARD_GLOB) if path.name not in known)


def read_index(folder: Path, manifest: Manifest) -> np.ndarray:
    """The checked index of a shard folder, read-only."""
    path = folder / INDEX_NAME
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise DataError(f"'{path}' is not readable ({fault.strerror});", _BUILD_AGAIN) from fault
    if sha256(data).hexdigest() != manifest.index_sha256:
        raise DataError(
            f"'{path}' ({len(data)} bytes) is not the one the manifest names;", _BUILD_AGAIN
        )
    try:
        index = np.load(BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as fault:
        raise DataError(f"'{path}' is no numpy array: {fault};", _BUILD_AGAIN) from fault
    if not isinstance(index, np.ndarray) or not _fits(index, manifest):
        raise DataError(f"'{path}' does not fit the manifest beside it;", _BUILD_AGAIN)
    index.setflags(write=False)
    return index


def _fits(index: np.ndarray, manifest: Manifest) -> bool:
    """Whether every row points at whole blocks inside its shard, sample after sample."""
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.samples,):
        return False
    expected = np.repeat(
        np.arange(len(manifest.shards)), [shard.samples for shard in manifest.shards]
    )
    if not np.array_equal(index["shard"], expected):
        return False
    shard_bytes = np.array([shard.bytes for shard in manifest.shards], dtype=np.uint64)[expected]
    offsets, sizes = index["offset"], index["size"]
    # Compared by subtraction: the sum of two unsigned numbers from a file may wrap around.
    inside = (offsets < shard_bytes) & (sizes <= shard_bytes - np.minimum(offsets, shard_bytes))
    whole_blocks = (offsets % BLOCK_BYTES == 0) & (sizes % BLOCK_BYTES == 0) & (sizes > 0)
    return bool((inside & whole_blocks).all())
