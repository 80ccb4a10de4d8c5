"""Finished shard folders sent to a store, whole or not at all for who reads there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

from mmtrain.data.manifest import INDEX_NAME, MANIFEST_NAME, Manifest
from mmtrain.data.remote import RemoteFolder
from mmtrain.data.shards import ShardFolder
from mmtrain.errors import DataError
from mmtrain.files import file_sha256

OnBytes = Callable[[int, int], None]  # bytes done, bytes in all


def push_folder(
    folder: Path, target: RemoteFolder, overwrite: bool, progress: OnBytes
) -> tuple[Manifest, bool]:
    """Send one folder; its manifest, and whether the same was there already.

    The manifest goes last, and an old one first: nobody takes a folder for whole that is not.
    """
    local = ShardFolder.open(folder)
    sizes = target.sizes()
    if _is_there(local, target, sizes):
        return local.manifest, True
    old = [name for name in sizes if name.endswith(".tar")]
    if (old or MANIFEST_NAME in sizes) and not overwrite:
        raise DataError(
            f"'{target}' holds other shards, or a part of these;",
            "choose another folder there, or pass --overwrite to replace them.",
        )
    if MANIFEST_NAME in sizes:
        target.remove(MANIFEST_NAME)
    done = 0
    for shard in local.manifest.shards:
        path = folder / shard.name
        if file_sha256(path) != shard.sha256:
            raise DataError(
                f"'{path}' is not what was built (its sha256 differs);", "build it again."
            )
        target.put(shard.name, path)
        done += shard.bytes
        progress(done, local.manifest.num_bytes)
    target.put(INDEX_NAME, folder / INDEX_NAME)
    for name in sorted(set(old) - {shard.name for shard in local.manifest.shards}):
        target.remove(name)
    target.put(MANIFEST_NAME, folder / MANIFEST_NAME)
    return local.manifest, False


def _is_there(local: ShardFolder, target: RemoteFolder, sizes: Mapping[str, int]) -> bool:
    """Whether the very folder is there already, complete."""
    if MANIFEST_NAME not in sizes or INDEX_NAME not in sizes:
        return False
    if any(sizes.get(shard.name) != shard.bytes for shard in local.manifest.shards):
        return False
    data = target.read(MANIFEST_NAME, sizes[MANIFEST_NAME])
    return sha256(data).hexdigest() == local.digest
