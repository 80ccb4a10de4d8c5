"""What a shard folder says about itself: `manifest.json` and `index.npy`.

The manifest pins the sha256 of every shard and of the index, and the index pins every sample, so
the sha256 of the manifest alone names the data of a run.
"""

from __future__ import annotations

import ast
import json
from hashlib import sha256
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmtrain.data.cache import ShardCache
from mmtrain.data.codec import DIGEST_BYTES
from mmtrain.data.remote import Place, RemoteFolder
from mmtrain.data.tar import BLOCK_BYTES
from mmtrain.errors import DataError
from mmtrain.files import read_regular

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
MAX_RECORD_BYTES = 2**30  # all members of one sample

# One row per sample, in the order of the samples. A record is all tar bytes of one sample.
INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("characters", "<u4"),
        ("id_key", "<u8"),  # hash of the sample's id: no two are equal
        ("image_digest", "u1", (DIGEST_BYTES,)),  # zero for a sample without an image
        ("record_digest", "u1", (DIGEST_BYTES,)),
    ]
)

_SHA256 = r"^[0-9a-f]{64}$"
_BUILD_AGAIN = "copy the folder again, or build it with `mmtrain shards build`."
INDEX_AGAIN = (
    "copy the folder again, or write new ones: `mmtrain shards index DIR --task T --overwrite`."
)
_MAX_MANIFEST_BYTES = 64 * 2**20
_MAX_HEADER_BYTES = 4096  # of an .npy file; ours takes 384
_NPY_START_BYTES = 10  # magic, version and the length of the header
_LEAST_RECORD_BYTES = 2 * BLOCK_BYTES  # a sample has a JSON member: a header and a block
_MAX_BYTES = 2**63 - 1


class ShardInfo(BaseModel):
    """One shard as it was when it was finished."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # The pattern also keeps a manifest from naming files elsewhere, and out of the way.
    name: str = Field(pattern=r"^[^./\x00-\x1f\x7f][^/\x00-\x1f\x7f]*\.tar$", max_length=255)
    samples: int = Field(ge=1)
    members: int = Field(ge=1)
    bytes: int = Field(ge=1, le=_MAX_BYTES)
    sha256: str = Field(pattern=_SHA256)


class Manifest(BaseModel):
    """The content of `manifest.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    task: str
    split: str
    seed: int = Field(description="keys which samples `limit` keeps")
    limit: int | None = Field(description="samples drawn from the split; null keeps all")
    build_options: dict[str, object] = Field(description="the task's own options")
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


def shard_files(folder: Place) -> list[str]:
    """The tars of a folder in the order of their names, which is the order of the samples."""
    if isinstance(folder, RemoteFolder):
        names = [name for name in folder.sizes() if name.endswith(".tar")]
    else:
        names = [path.name for path in folder.glob("*.tar")]
    return sorted(name for name in names if not name.startswith("."))


def read_manifest(folder: Place, task: str | None = None) -> tuple[Manifest, str]:
    """The manifest of a shard folder and its sha256; it must be of `task`, if one is given."""
    if isinstance(folder, Path) and not folder.is_dir():
        raise DataError(
            f"there is no shard folder '{folder}';", "build it with `mmtrain shards build`."
        )
    try:
        data = _read(folder, MANIFEST_NAME, _MAX_MANIFEST_BYTES)
    except OSError as fault:
        raise DataError(
            f"'{folder}' has no readable {MANIFEST_NAME} ({fault.strerror});",
            f"without it lost data cannot be noticed: {_BUILD_AGAIN} Tars of another program get"
            " one by `mmtrain shards index`.",
        ) from fault
    manifest = _parse_manifest(data, folder)
    if task is not None and manifest.task != task:
        raise DataError(
            f"the shards in '{folder}' are of task '{manifest.task}', data.task is '{task}';",
            "correct one of the two; samples that fit this task as well get another manifest by"
            f" `mmtrain shards index {folder} --task {task} --overwrite`.",
        )
    return manifest, sha256(data).hexdigest()


def _read(folder: Place, name: str, max_bytes: int) -> bytes:
    if isinstance(folder, RemoteFolder):
        return folder.read(name, max_bytes)
    return read_regular(folder / name, max_bytes)


def _parse_manifest(data: bytes, folder: Place) -> Manifest:
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as fault:
        raise DataError(f"'{path}' is not valid JSON: {fault};", _BUILD_AGAIN) from fault
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"'{path}' has format_version {version!r}, this mmtrain reads {FORMAT_VERSION};",
            f"build them again, or `mmtrain shards index {folder} --task T --overwrite`.",
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"'{path}': {where}: {first['msg']};", _BUILD_AGAIN) from fault
    if not _agrees_with_itself(manifest):
        raise DataError(f"'{path}' contradicts itself in its list of shards;", _BUILD_AGAIN)
    return manifest


def _agrees_with_itself(manifest: Manifest) -> bool:
    names = [shard.name for shard in manifest.shards]
    return (
        names == sorted(set(names))
        and sum(shard.samples for shard in manifest.shards) == manifest.samples
        and all(shard.samples * _LEAST_RECORD_BYTES <= shard.bytes for shard in manifest.shards)
    )


def surplus_shards(folder: Place, manifest: Manifest) -> list[str]:
    """Shard files that the manifest does not know: stock readers with a glob would read them."""
    known = {shard.name for shard in manifest.shards}
    return [name for name in shard_files(folder) if name not in known]


def read_index(folder: Place, manifest: Manifest, cache: ShardCache | None = None) -> np.ndarray:
    """The checked index of a shard folder, read-only; that of a remote one is kept in a cache."""
    path = folder / INDEX_NAME
    try:
        # Bounded before it is read: a damaged or made-up file must not fill the memory.
        most = _MAX_HEADER_BYTES + manifest.samples * INDEX_DTYPE.itemsize
        if isinstance(folder, RemoteFolder) and cache is not None:
            data = cache.read(folder, INDEX_NAME, most, manifest.index_sha256)
        else:
            data = _read(folder, INDEX_NAME, most)
    except OSError as fault:
        raise DataError(f"'{path}' is not readable ({fault.strerror});", INDEX_AGAIN) from fault
    if sha256(data).hexdigest() != manifest.index_sha256:
        raise DataError(
            f"'{path}' ({len(data)} bytes) is not the one the manifest names;", INDEX_AGAIN
        )
    index = _parse_index(data, path, manifest)
    if not _fits(index, manifest):
        raise DataError(f"'{path}' does not fit the manifest beside it;", INDEX_AGAIN)
    _, first, times = np.unique(index["id_key"], return_index=True, return_counts=True)
    if (times > 1).any():
        number = int(first[times > 1].min())
        raise DataError(
            f"'{path}': {int((times > 1).sum())} ids stand for several samples, the first is that"
            f" of sample {number};",
            "give every sample an id of its own, then build or index the folder again.",
        )
    return index


def _parse_index(data: bytes, path: Path | str, manifest: Manifest) -> np.ndarray:
    """The rows of an `.npy` file, without trusting the number of rows that its header claims."""
    start = _NPY_START_BYTES + int.from_bytes(data[8:10], "little")
    expected = {
        "descr": np.lib.format.dtype_to_descr(INDEX_DTYPE),
        "fortran_order": False,
        "shape": (manifest.samples,),
    }
    rows = memoryview(data)[start:]
    if (
        data[:8] != b"\x93NUMPY\x01\x00"
        or _literal(data[_NPY_START_BYTES:start]) != expected
        or len(rows) != manifest.samples * INDEX_DTYPE.itemsize
    ):
        raise DataError(
            f"'{path}' is damaged: its header and its {len(data)} bytes are not those of"
            f" {manifest.samples} samples;",
            INDEX_AGAIN,
        )
    return np.frombuffer(rows, dtype=INDEX_DTYPE)


def _literal(text: bytes) -> object:
    try:
        return ast.literal_eval(text.decode("latin-1"))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _fits(index: np.ndarray, manifest: Manifest) -> bool:
    """Whether every row points at whole blocks inside its shard, sample after sample."""
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
    return bool((inside & whole_blocks & (sizes <= MAX_RECORD_BYTES)).all())
