"""The node-local cache of decoded arrays: built once under a lock, published whole, checked on every opening.

    <cache>/<dataset digest>-v<layout>/
      arrays.json       written last: name -> dtype, shape, bytes, sha256
      *.bin             one raw array each
    <cache>/<the same>.lock
    <cache>/<the same>.checked.json   which files were verified, by size and modification time

A checksum costs a full read, so a file is read again only when its size or modification time has changed since it was
last found whole. That holds for the dataset's shards, wherever they lie, and for the cache's own arrays alike. What is
decoded is decoded from the very bytes that were checked, so a shard in an object store is downloaded once.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from filelock import FileLock
from torch import Tensor

from sibra_dist.data.manifest import REMEDY, Manifest, Shard, read_shard, read_verified_shard, sha256_of, verify_shard
from sibra_dist.data.storage import Place, write_atomically
from sibra_dist.errors import DatasetError

CONTENTS = "arrays.json"
LAYOUT = 2
"""Raised when the arrays of a dataset change, so that no version reads those of another."""
ASKED_AT_ONCE = 16
"""Shards whose size and modification time are asked for at a time: an object store takes its time over each."""
Arrays = dict[str, Tensor]
Status = tuple[int, int]
ReadColumns = Callable[[Shard, Sequence[str]], pa.Table]
Decode = Callable[[Manifest, ReadColumns, "ArrayWriter"], None]


def default_cache() -> Path:
    """`$SIBRA_CACHE`, or `sibra-dist` in the user's cache folder. Safe to delete while nothing runs."""
    if chosen := os.environ.get("SIBRA_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sibra-dist"


def cache_folder(manifest: Manifest, root: Path) -> Path:
    """Where a dataset's arrays lie in the cache `root`."""
    return root / f"{manifest.digest[:32]}-v{LAYOUT}"


class ArrayWriter:
    """Appends to named arrays on disk, so that decoding needs the memory of one shard."""

    def __init__(self, folder: Path) -> None:
        """Start writing into an empty `folder`."""
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._about: dict[str, tuple[str, list[int]]] = {}
        self._totals: dict[str, int] = {}

    def append(self, name: str, values: npt.NDArray[Any]) -> None:
        """Add rows to the end of array `name`."""
        if name not in self._files:
            self._files[name] = (self._folder / _file_name(name)).open("wb")
            self._about[name] = (values.dtype.str, [0, *values.shape[1:]])
        self._about[name][1][0] += len(values)
        self._files[name].write(np.ascontiguousarray(values).data)

    def append_lengths(self, name: str, lengths: npt.NDArray[np.int64]) -> None:
        """Continue the CSR row pointer `name` by rows of these lengths; it starts with 0 by itself."""
        if name not in self._totals:
            self._totals[name] = 0
            self.append(name, np.zeros(1, np.int64))
        ends = self._totals[name] + np.cumsum(lengths, dtype=np.int64)
        self._totals[name] = int(ends[-1]) if len(ends) else self._totals[name]
        self.append(name, ends)

    def finish(self) -> None:
        """Flush every array to the disk and write the table of contents, last."""
        contents = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            path = self._folder / _file_name(name)
            dtype, shape = self._about[name]
            contents[name] = {"dtype": dtype, "shape": shape, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        write_atomically(self._folder / CONTENTS, json.dumps(contents).encode())

    def close(self) -> None:
        """Close every file."""
        for file in self._files.values():
            file.close()


def cached_arrays(place: Place, manifest: Manifest, cache: Path | None, decode: Decode) -> Arrays:
    """The arrays of a dataset, memory-mapped, private to this process when written to.

    Args:
        place: where the dataset lies.
        manifest: its manifest.
        cache: the cache folder; by default `default_cache()`.
        decode: turns the columns of shards, which it is given a way to read, into arrays.

    Raises:
        DatasetError: a shard is damaged, or the cache cannot be written.
    """
    root = cache or default_cache()
    folder = cache_folder(manifest, root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            checked = _Checked(folder.with_suffix(".checked.json"))
            shards = _Shards(place, manifest, checked)
            if not _is_whole(folder, checked):
                _build(manifest, folder, decode, shards.read)
                cached = Place.at(folder)
                for name in map(_file_name, _contents(folder)):
                    checked.remember(f"{cached / name}", cached.status(name))
            shards.verify_others()
            checked.save()
            return {name: _map(folder / _file_name(name), about) for name, about in _contents(folder).items()}
    except OSError as error:
        raise DatasetError(
            f"the cache {root} cannot be used: {error}. Free some space, or set SIBRA_CACHE to a folder that can be written"
        ) from error


class _Shards:
    """The shards of a dataset, of which those are checked that may have changed since they were last found whole."""

    def __init__(self, place: Place, manifest: Manifest, checked: "_Checked") -> None:
        self._place = place
        self._checked = checked
        shards = list(manifest.all_shards())
        try:
            with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
                statuses = list(pool.map(place.status, [shard.path for shard in shards]))
        except OSError as error:
            raise DatasetError(f"{error.filename} cannot be read: {error.strerror}. {REMEDY}") from error
        self._unsure = {
            shard.path: (shard, status)
            for shard, status in zip(shards, statuses, strict=True)
            if not checked.unchanged(f"{place / shard.path}", status, shard.bytes)
        }

    def read(self, shard: Shard, columns: Sequence[str]) -> pa.Table:
        if shard.path not in self._unsure:
            return read_shard(self._place, shard, columns)
        table = read_verified_shard(self._place, shard, columns)
        self._now_sure(shard)
        return table

    def verify_others(self) -> None:
        for shard, _ in list(self._unsure.values()):
            verify_shard(self._place, shard)
            self._now_sure(shard)

    def _now_sure(self, shard: Shard) -> None:
        # The status from before the reading: what was altered meanwhile has another one by now.
        _, status = self._unsure.pop(shard.path)
        self._checked.remember(f"{self._place / shard.path}", status)


def _build(manifest: Manifest, folder: Path, decode: Decode, read: ReadColumns) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with closing(ArrayWriter(aside)) as writer:
            decode(manifest, read, writer)
            writer.finish()
        # A process that mapped a damaged folder before keeps its pages: the files are unlinked, not overwritten.
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_whole(folder: Path, checked: "_Checked") -> bool:
    try:
        contents = _contents(folder)
    except (OSError, ValueError):
        return False
    place = Place.at(folder)
    for name, about in contents.items():
        file = _file_name(name)
        status = place.status(file)
        if not checked.unchanged(f"{place / file}", status, about["bytes"]):
            if status is None or status[0] != about["bytes"] or sha256_of(folder / file) != about["sha256"]:
                return False
            checked.remember(f"{place / file}", status)
    return True


def _contents(folder: Path) -> dict[str, dict[str, Any]]:
    contents: dict[str, dict[str, Any]] = json.loads((folder / CONTENTS).read_text())
    return contents


def _map(path: Path, about: dict[str, Any]) -> Tensor:
    shape = tuple(about["shape"])
    dtype = np.dtype(about["dtype"])
    if math.prod(shape) == 0:  # an empty file cannot be mapped
        return torch.from_numpy(np.empty(shape, dtype))
    # "c", copy on write: torch wants writable memory, and no write can reach the file.
    return torch.from_numpy(np.memmap(path, dtype, mode="c", shape=shape))


def _file_name(name: str) -> str:
    return name.replace("/", ".") + ".bin"


class _Checked:
    """Which files were found whole, by size and modification time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._seen: dict[str, list[int]] = json.loads(path.read_text())
        except (OSError, ValueError):
            self._seen = {}
        self._changed = False

    def unchanged(self, uri: str, status: Status | None, size: int) -> bool:
        return status is not None and status[0] == size and self._seen.get(uri) == list(status)

    def remember(self, uri: str, status: Status | None) -> None:
        if status is not None:
            self._seen[uri] = list(status)
            self._changed = True

    def save(self) -> None:
        if self._changed:
            write_atomically(self._path, json.dumps(self._seen).encode())
